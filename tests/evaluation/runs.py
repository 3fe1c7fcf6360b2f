"""Run directories as lmms-eval writes them, made without it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lmms_eval.tasks.mmvp import utils as mmvp
from lmms_eval.tasks.pope import utils as pope

from deem_plugin.evaluation import robustvqa, yes_no

DATE = "20260101_000000"


def robustvqa_log(rows: list[dict], answers: Callable[[int, dict], str]) -> list[dict]:
    """Returns the lines of a sample log of RobustVQA, answered by row number and row."""
    lines = []
    for index, row in enumerate(rows):
        answer = answers(index, row)
        lines.append(
            {
                "doc_id": index,
                "target": row["answer"],
                "filtered_resps": answer,
                "token_counts": [None],
                "doc_hash": "74234e98",
                **robustvqa.process_results(row, [answer]),
                "input": robustvqa.doc_to_text(row),
            }
        )
    return lines


def pope_log(questions: Iterable[tuple[str, str]], answer: str) -> list[dict]:
    """Returns the lines of a sample log of the stock task `pope`: `(question_id, target)` by row, one answer."""
    lines = []
    for index, (question_id, target) in enumerate(questions):
        row = {"question_id": question_id, "score": float(answer == target), "prediction": answer}
        metrics = {f"pope_{name}": {**row, "ground_truth": target} for name in ("accuracy", "precision", "recall")}
        head = {"doc_id": index, "target": target, "filtered_resps": answer, "token_counts": [None]}
        lines.append({**head, **metrics, "input": "Is there a dog in the image?"})
    return lines


# How each metric is aggregated: by lmms-eval's own code and by ours.
AGGREGATIONS = {
    **{f"robustvqa_{name}": getattr(yes_no, name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")},
    "robustvqa_pair_acc": yes_no.pair_accuracy,
    **{f"pope_{name}": getattr(pope, f"pope_aggregate_{name}") for name in ("accuracy", "precision", "recall")},
    "mmvp_accuracy": mmvp.mmvp_aggregate_results,
    "mmvp_pair_accuracy": mmvp.mmvp_aggregate_pair_results,
}


def mmvp_log(answers: list[str]) -> list[dict]:
    """Returns the lines of a sample log of the stock task `mmvp`, whose right answers are A and B in turn."""
    lines = []
    for index, answer in enumerate(answers):
        doc = {
            "Index": index + 1,
            "Question": "Open?",
            "Options": "(a) Yes (b) No",
            "Correct Answer": "(a)(b)"[3 * (index % 2) :][:3],
        }
        head = {"doc_id": index, "target": mmvp.mmvp_doc_to_target(doc), "filtered_resps": answer, "input": "Open?"}
        lines.append({**head, **mmvp.mmvp_process_results(doc, [answer])})
    return lines


def aggregate(lines: list[dict]) -> dict[str, float]:
    """Returns what a results file reports of a task; a metric that is a number is averaged."""
    reported = {}
    for metric in lines[0]:
        if metric in AGGREGATIONS:
            reported[f"{metric},none"] = AGGREGATIONS[metric]([line[metric] for line in lines])
        elif metric in ("exact_match", "anls"):
            reported[f"{metric},none"] = sum(line[metric] for line in lines) / len(lines)
        elif metric == "rating":
            reported[f"{metric},none"] = 100.0
    return reported


def write_run(
    folder: Path,
    logs: dict[str, list[dict]],
    configs: dict[str, dict[str, Any]] | None = None,
    groups: dict[str, list[str]] | None = None,
    model: str = "model",
    date: str = DATE,
) -> Path:
    """Writes a run directory: the sample logs, and a results file with what is read of it, aggregated by the tasks."""
    place = folder / model
    place.mkdir(parents=True, exist_ok=True)
    for task, lines in logs.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (place / f"{date}_samples_{task}.jsonl").write_text(text, encoding="utf-8")
    results = {
        "config": {"model": "deem", "model_args": f"pretrained={model}"},
        "configs": configs or {},
        "group_subtasks": groups or {task: [] for task in logs},
        "results": {task: aggregate(lines) for task, lines in logs.items()},
    }
    (place / f"{date}_results.json").write_text(json.dumps(results))
    return folder
