"""Tables of scores: one seed with its interval, several with their standard error."""

import numpy as np

from .scores import Metric


def mean(values: list[float]) -> float:
    """Returns the mean over seeds."""
    return float(np.mean(values))


def standard_error(values: list[float]) -> float:
    """Returns the standard error of the mean over seeds."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Renders a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def cell(seeds: list[Metric]) -> str:
    """Renders one score: with its interval for one seed, with its standard error over seeds for several."""
    if len(seeds) == 1:
        low, high = seeds[0].interval()
        return f"{seeds[0].value:.3f} [{low:.3f}, {high:.3f}]"
    values = [seed.value for seed in seeds]
    return f"{mean(values):.3f} ({standard_error(values):.3f})"


def difference_cell(ours: list[Metric], others: list[Metric]) -> str:
    """Renders the difference of two scores within each seed, as [`cell`] renders one."""
    differences = [a.value - b.value for a, b in zip(ours, others, strict=True)]
    if len(differences) == 1:
        low, high = ours[0].interval(others[0])
        return f"{differences[0]:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{mean(differences):+.3f} ({standard_error(differences):.3f})"
