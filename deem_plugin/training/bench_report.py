"""What `deem bench feedback` shows: a table, a picture and a file of its figures."""

import json
from dataclasses import asdict
from pathlib import Path

from deem_plugin.training.bench import PARTS, Bench, Timing


def table(bench: Bench) -> str:
    """Returns the benchmark as a Markdown table, with what could not run below."""
    columns = ["step", "times as fast", *PARTS, "whole", "denoiser's share", "loss differs", "gradient differs"]
    columns += ["first step", "peak memory"]
    where = f"{bench.device}, {bench.threads} threads, {bench.clock}"
    lines = [
        f"config {bench.config}, {where}, medians of {bench.pairs} pairs",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *map(_row, bench.timings),
    ]
    if bench.skipped:
        lines += ["", *(f"Not run: {name}. {reason}" for name, reason in bench.skipped.items())]
    return "\n".join(lines)


def _row(timing: Timing) -> str:
    cells = [timing.name, f"{timing.ratio:.2f}", *(f"{timing.seconds[part]:.3f} s" for part in (*PARTS, "step"))]
    cells += [f"{timing.denoiser_share:.0%}", f"{timing.loss_error:.1e}", f"{timing.gradient_error:.1e}"]
    cells += [
        f"{timing.first_step:.0f} s",
        "–" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**30:.2f} GiB",
    ]
    return f"| {' | '.join(cells)} |"


def draw_parts(bench: Bench, path: str | Path):
    """Draws where the time of each step goes, as stacked bars."""
    from matplotlib import pyplot as plt

    names = [timing.name for timing in bench.timings]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(names) + 1.2))
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [timing.seconds[part] for timing in bench.timings]
        axes.barh(names, widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds ({bench.clock})")
    axes.legend(ncols=len(PARTS), fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def write_json(bench: Bench, path: str | Path):
    """Writes all figures of a benchmark."""
    figures = asdict(bench)
    for row, timing in zip(figures["timings"], bench.timings, strict=True):
        row["denoiser_share"] = timing.denoiser_share
    Path(path).write_text(json.dumps(figures, indent=1))
