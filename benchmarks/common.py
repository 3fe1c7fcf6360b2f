"""What the benchmarks share: their clock, their options, and what becomes of the figures."""

import argparse
import json
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import torch


def check_names(what: str, given: Iterable[str], known: Collection[str]):
    """Raises ValueError, with the choices, if a given name is not known."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"There is no {what} {unknown[0]!r}; choose from {', '.join(known)}.")


def clock_of(device: torch.device):
    """
    Returns a clock and its name: CPU seconds where one thread does all the work, so that what else runs on the machine
    counts little; wall time elsewhere.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time, "CPU seconds"
    return time.perf_counter, "wall time"


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser of the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--options", nargs="+", metavar="OPTION", help="those of the table; all by default")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="file for a picture")
    return parser


def show(bench, table: str, figures: dict, draw, arguments):
    """Prints a benchmark's table, and writes its figures and its picture where the arguments ask for them."""
    print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))
    if arguments.plot is not None:
        draw(bench, arguments.plot)
