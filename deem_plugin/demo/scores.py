"""Reads lmms-eval's own files, and says how far a score may be trusted."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deem_plugin.evaluation.pope import CATEGORIES
from deem_plugin.evaluation.robustvqa import SPLITS
from deem_plugin.evaluation.sample_logs import Answer, TaskLog, read_run
from deem_plugin.evaluation.statistics import bootstrap_means, cluster_totals

from .sets import DETAIL_CATEGORIES

# Of the differences between arms, the ones that the demo is about.
HEADLINES = ("details", "POPE", "RobustVQA")


@dataclass
class Metric:
    """
    A score with what is needed to resample it: per image the sum of its questions' scores and their number.

    Args:
        value (`float`): The mean over questions, averaged over the sets.
        sets (`list[np.ndarray]`): For each set an array `(images, 2)` of sums and counts.
    """

    value: float
    sets: list[np.ndarray]

    @classmethod
    def of(cls, *sets: list[tuple[str, float]]) -> "Metric":
        """Makes a metric of sets of `(image, score)`, one entry a question."""
        totals = [cluster_totals([score for _, score in rows], [image for image, _ in rows]) for rows in sets]
        return cls(float(np.mean([total[:, 0].sum() / total[:, 1].sum() for total in totals])), totals)

    def interval(self, other: "Metric | None" = None) -> tuple[float, float]:
        """
        Returns the 95 % interval of the score, or of its difference to `other` on the same images.

        The same images are drawn for both, so that the difference is paired.
        """
        samples = bootstrap_means(*self.sets) - (0 if other is None else bootstrap_means(*other.sets))
        low, high = np.quantile(samples, (0.025, 0.975))
        return float(low), float(high)


def read_metrics(folder: Path) -> dict[str, Metric]:
    """
    Reads an evaluation's results.

    Args:
        folder (`Path`): Where lmms-eval wrote its files.

    Returns:
        `dict[str, Metric]`: Scores by name, headlines first.

    Raises:
        SampleLogError: If there are no files of an evaluation, or damaged ones.
        RuntimeError: If the sample logs do not add up to the results file.
    """
    tasks = read_run(folder).tasks
    details, pope = (_scored(tasks[name], f"{name}_accuracy") for name in ("deem_details", "pope"))
    robust = {split: _scored(tasks[f"robustvqa_{split}"], "robustvqa_accuracy") for split in SPLITS}
    metrics = {
        "details": Metric.of(_by_image(details)),
        "POPE": Metric.of(_by_image(pope)),
        "RobustVQA": Metric.of(*map(_by_image, robust.values())),
    }
    pairs: dict[str, list[tuple[Answer, float]]] = {}
    for answer, score in details:
        pairs.setdefault(answer.pair, []).append((answer, score))
    worse = [min(rows, key=lambda row: row[1]) for rows in pairs.values()]
    metrics["details, both of a pair right"] = Metric.of(_by_image(worse))
    for category in DETAIL_CATEGORIES:
        rows = [row for row in details if row[0].pair.split()[1] == category]
        metrics[f"details: {category}"] = Metric.of(_by_image(rows))
    for category in CATEGORIES:
        rows = [row for row in pope if row[0].question_id.startswith(category)]
        metrics[f"POPE: {category}"] = Metric.of(_by_image(rows))
    for split, rows in robust.items():
        metrics[f"RobustVQA-{split.upper()}"] = Metric.of(_by_image(rows))
    return metrics


def _scored(log: TaskLog, metric: str) -> list[tuple[Answer, float]]:
    """Returns the answers with their scores."""
    rows = [(answer, answer.scores[metric]) for answer in log.answers]
    mean, reported = float(np.mean([score for _, score in rows])), log.results[metric]
    if abs(mean - reported) > 1e-6:
        raise RuntimeError(
            f"lmms-eval reports a {metric} of {reported}, but its sample log {log.path} adds up to {mean}. The folder "
            f"holds files of different runs: delete it and evaluate again."
        )
    return rows


def _by_image(rows: list[tuple[Answer, float]]) -> list[tuple[str, float]]:
    """Returns the image of each answer with its score; POPE's logs tell it only within the demo's question ids."""
    return [(answer.image_id or answer.question_id.split("-")[1], score) for answer, score in rows]
