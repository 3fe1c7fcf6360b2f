"""Reads lmms-eval's own files, and says how far a score may be trusted."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deem_plugin.evaluation.pope import CATEGORIES
from deem_plugin.evaluation.robustvqa import SPLITS
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
        RuntimeError: If the sample logs do not add up to the results file.
    """
    results = json.loads(_newest(folder, "_results.json").read_text(encoding="utf-8"))["results"]
    details = _samples(folder, "deem_details", "deem_details_accuracy")
    pope = _samples(folder, "pope", "pope_accuracy")
    robust = {split: _samples(folder, f"robustvqa_{split}", "robustvqa_accuracy") for split in SPLITS}

    def scored(rows: list[dict]) -> list[tuple[str, float]]:
        return [(_image(row), row["score"]) for row in rows]

    metrics = {
        "details": Metric.of(scored(details)),
        "POPE": Metric.of(scored(pope)),
        "RobustVQA": Metric.of(*(scored(rows) for rows in robust.values())),
    }
    for name, reported in (
        ("details", results["deem_details"]["deem_details_accuracy,none"]),
        ("POPE", results["pope"]["pope_accuracy,none"]),
        ("RobustVQA", results["robustvqa"]["robustvqa_accuracy,none"]),
    ):
        if abs(metrics[name].value - reported) > 1e-6:
            raise RuntimeError(
                f"lmms-eval reports {reported} for {name}, but its sample logs in {folder} add up to "
                f"{metrics[name].value}. The folder holds files of different runs: delete it and evaluate again."
            )
    metrics["details, both of a pair right"] = Metric.of(_pairs(details))
    for category in DETAIL_CATEGORIES:
        metrics[f"details: {category}"] = Metric.of(scored([row for row in details if row["category"] == category]))
    for category in CATEGORIES:
        chosen = [row for row in pope if row["question_id"].startswith(category)]
        metrics[f"POPE: {category}"] = Metric.of(scored(chosen))
    for split, rows in robust.items():
        metrics[f"RobustVQA-{split.upper()}"] = Metric.of(scored(rows))
    return metrics


def _newest(folder: Path, ending: str) -> Path:
    return max(folder.rglob(f"*{ending}"), key=lambda path: path.name)


def _samples(folder: Path, task: str, metric: str) -> list[dict]:
    lines = _newest(folder, f"_samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[metric] for line in lines]


def _image(row: dict) -> str:
    """Returns the image that a question is about; POPE's logs tell it only within the demo's question ids."""
    return row.get("image_id") or row["question_id"].split("-")[1]


def _pairs(rows: list[dict]) -> list[tuple[str, float]]:
    """Returns for each pair of questions its image and whether both answers are right."""
    pairs: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row["image_id"], row["category"])
        pairs[key] = min(pairs.get(key, 1.0), row["score"])
    return [(image, score) for (image, _), score in pairs.items()]
