"""Scores from lmms-eval's files: they add up, and their intervals are those of images, not of questions."""

import json

import numpy as np
import pytest

from deem_plugin.demo.scores import Metric, read_metrics


def test_metric_is_the_mean_over_sets_of_the_mean_over_questions():
    metric = Metric.of([("a", 1.0), ("a", 0.0), ("b", 1.0)], [("c", 0.0)])
    assert metric.value == pytest.approx((2 / 3 + 0) / 2)


def test_interval_of_paired_questions_is_that_of_images():
    """Two questions that are always right or wrong together tell no more than one."""
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.6).astype(float)
    single = Metric.of([(f"{i:03}", score) for i, score in enumerate(right)])
    double = Metric.of([(f"{i:03}", score) for i, score in enumerate(right) for _ in range(2)])
    assert single.interval() == double.interval()
    low, high = single.interval()
    expected = 1.96 * (single.value * (1 - single.value) / 400) ** 0.5
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)


def test_difference_of_an_arm_to_itself_is_certain():
    metric = Metric.of([(str(i), float(i % 3 == 0)) for i in range(50)])
    assert metric.interval(metric) == (0.0, 0.0)


@pytest.fixture
def evaluation(tmp_path):
    """lmms-eval's files of one run, with two images a set."""
    logs = {"deem_details": [], "pope": [], "robustvqa_a": [], "robustvqa_r": [], "robustvqa_v2": []}
    for image in ("0", "1"):
        for category in ("horizontal", "vertical", "size", "background"):
            for answer in ("yes", "no"):
                row = {"question_id": f"{image}-{category}-{answer}", "image_id": image, "category": category}
                score = float(answer == "yes" or image == "1")
                logs["deem_details"].append({"deem_details_accuracy": {**row, "score": score}})
        for category in ("random", "popular", "adversarial"):
            row = {"question_id": f"{category}-{image}-yes", "score": float(category == "random")}
            logs["pope"].append({"pope_accuracy": row})
        for split in ("a", "r", "v2"):
            row = {"question_id": f"{split}-{image}-yes", "image_id": f"{split}-{image}", "score": float(split == "a")}
            logs[f"robustvqa_{split}"].append({"robustvqa_accuracy": row})
    for task, entries in logs.items():
        head = {"target": "yes", "filtered_resps": "yes"}
        lines = "\n".join(json.dumps({"doc_id": index, **head, **entry}) for index, entry in enumerate(entries))
        (tmp_path / f"20260101_000000_samples_{task}.jsonl").write_text(lines)
    results = {
        "deem_details": {"deem_details_accuracy,none": 0.75},
        "pope": {"pope_accuracy,none": 1 / 3},
        **{f"robustvqa_{split}": {"robustvqa_accuracy,none": float(split == "a")} for split in ("a", "r", "v2")},
    }
    (tmp_path / "20260101_000000_results.json").write_text(json.dumps({"results": results}))
    return tmp_path


def test_scores_are_read_by_task_category_and_pair(evaluation):
    values = {name: metric.value for name, metric in read_metrics(evaluation).items()}
    assert values["details"] == 0.75
    assert values["details, both of a pair right"] == 0.5
    assert values["details: size"] == 0.75
    assert values["POPE: random"] == 1.0
    assert values["POPE: popular"] == 0.0
    assert values["RobustVQA-A"] == 1.0
    assert values["RobustVQA"] == pytest.approx(1 / 3)


def test_logs_that_do_not_add_up_to_the_results_are_refused(evaluation):
    file = evaluation / "20260101_000000_results.json"
    file.write_text(file.read_text().replace("0.75", "0.76"))
    with pytest.raises(
        RuntimeError, match="reports a deem_details_accuracy of 0.76, but its sample log .* adds up to 0.75"
    ):
        read_metrics(evaluation)
