"""Writes the comparison of feedback methods: one table, one budget."""

import json
from pathlib import Path

from .arms import ALL_ARMS, ARMS, METHOD_ARMS, RESULTS_FOLDER, STAGES, START, TOKENS_FILE
from .methods import FIRST_STAGE_STEPS, METHODS
from .report import BASELINE, FAST, LEGEND_ONE_SEED, LEGEND_SEEDS
from .scores import HEADLINES, read_metrics
from .tables import cell, difference_cell, mean, table

METHODS_ARMS = {BASELINE: ARMS[BASELINE], **METHOD_ARMS}

INTRODUCTION = """\
Seeds: {seeds}. Every row starts from the same model and sees the same data in the same order for as many steps, with
one weight for all kinds of feedback; the rest is as its recipe says (docs/methods.md names what the demo's size
changes). {first_stages} get {steps} steps more on images alone, in which the tower is frozen. Scores are lmms-eval's
on held-out scenes."""
LEGEND = """\
*Shape* and *background* are accuracies of linear probes on frozen tokens (chance 0.13 and 0.25), *position* and *size*
their R2. *Zero-shot* is how often the vector that the encoder learned for a shape's name before the training still
fits best: what it has retained. *Time* is that of the two stages, two rows side by side."""


def write_methods_report(out: Path, folders: list[Path], fast: bool) -> Path:
    """
    Writes `methods.md`.

    Args:
        out (`Path`): The demo's folder.
        folders (`list[Path]`): The seeds' folders.
        fast (`bool`): Whether it was the short form, whose scores mean nothing.
    """
    metrics = [{name: read_metrics(folder / name / RESULTS_FOLDER) for name in METHODS_ARMS} for folder in folders]
    first_stages = " and ".join(ALL_ARMS[name].title for name, method in METHODS.items() if method.first_stage)
    parts = [
        "# Feedback methods on one budget",
        *([FAST] if fast else []),
        INTRODUCTION.format(seeds=len(folders), first_stages=first_stages, steps=FIRST_STAGE_STEPS),
        _scores(metrics),
        LEGEND_ONE_SEED if len(folders) == 1 else LEGEND_SEEDS,
        "## Against no feedback",
        _differences(metrics),
        "## What is in the tokens",
        _tokens(folders),
        LEGEND,
    ]
    report = out / "methods.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def _scores(metrics) -> str:
    rows = [
        [arm.title, *(cell([seed[name][metric] for seed in metrics]) for metric in HEADLINES)]
        for name, arm in METHODS_ARMS.items()
    ]
    return table(["", *HEADLINES], rows)


def _differences(metrics) -> str:
    rows = []
    for name, arm in METHOD_ARMS.items():
        cells = []
        for metric in HEADLINES:
            ours, others = ([seed[key][metric] for seed in metrics] for key in (name, BASELINE))
            cells.append(difference_cell(ours, others))
        rows.append([arm.title, *cells])
    return table(["", *HEADLINES], rows)


def _tokens(folders: list[Path]) -> str:
    reports = [{name: _read(folder / name / TOKENS_FILE) for name in METHODS_ARMS} for folder in folders]
    start = _read(folders[0] / START / TOKENS_FILE)
    probes = list(start["probes"])

    def row(title: str, tokens: list[dict], time: str) -> list[str]:
        means = [f"{mean([report['probes'][probe] for report in tokens]):.3f}" for probe in probes]
        return [title, *means, f"{mean([report['zero_shot'] for report in tokens]):.3f}", time]

    rows = [row("before training", [start], "")]
    for name, arm in METHODS_ARMS.items():
        logs = [[_read(folder / name / stage / "trainer_state.json") for stage in STAGES] for folder in folders]
        seconds = mean([sum(state["log_history"][-1]["train_runtime"] for state in states) for states in logs])
        rows.append(row(arm.title, [report[name] for report in reports], f"{seconds:.0f} s"))
    return table(["", *probes, "zero-shot", "time"], rows)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
