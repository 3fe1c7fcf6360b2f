"""What `benchmarks.feedback_step` finds, and how it is shown: a table, a picture and its figures."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

PARTS = ("encode", "tower", "denoise", "denoise backward", "tower backward")
# What no option can leave out.
NEEDED_PARTS = ("tower", "denoise", "denoise backward", "tower backward")


@dataclass
class Timing:
    """
    What one option gains.

    Args:
        name (`str`): The option.
        exact (`bool`): Whether it is meant to change nothing but rounding.
        ratio (`float`): Median over pairs of the plain step's time by this one's.
        seconds (`dict[str, float]`): Median time of each part, and of the whole as `step`.
        loss_error, gradient_error (`float`): Relative difference to the plain step's loss and tower gradients.
        first_step (`float`): Wall time of the first step, compiling included.
        peak_bytes (`int`, *optional*): Most memory of weights and step on a GPU; None elsewhere.
    """

    name: str
    exact: bool
    ratio: float
    seconds: dict[str, float]
    loss_error: float
    gradient_error: float
    first_step: float
    peak_bytes: int | None = None

    @property
    def above_needed(self) -> float:
        """What the step takes above the tower and the denoiser, which must run, as a share of what these take."""
        return self.seconds["step"] / sum(self.seconds[part] for part in NEEDED_PARTS) - 1


@dataclass
class Bench:
    """
    A whole benchmark.

    Args:
        config (`str`): Name of the sizes.
        device (`str`): Where it ran.
        threads (`int`): CPU threads.
        clock (`str`): What was counted.
        pairs (`int`): Pairs of steps for each option.
        timings (`list[Timing]`): The plain step, and the options.
        skipped (`dict[str, str]`): Options that cannot run here, and why.
    """

    config: str
    device: str
    threads: int
    clock: str
    pairs: int
    timings: list[Timing] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def table(bench: Bench) -> str:
    """Returns the benchmark as a Markdown table, with what could not run below."""
    columns = [
        "step",
        "times as fast",
        *PARTS,
        "whole",
        "above tower and denoiser",
        "loss differs",
        "gradient differs",
    ]
    columns += ["loss differs", "gradient differs", "first step", "peak memory"]
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
    cells += [f"{timing.above_needed:+.0%}", f"{timing.loss_error:.1e}", f"{timing.gradient_error:.1e}"]
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


def figures(bench: Bench) -> dict:
    """Returns all figures of a benchmark as JSON can hold them."""
    rows = asdict(bench)
    for row, timing in zip(rows["timings"], bench.timings, strict=True):
        row["above_needed"] = timing.above_needed
    return rows
