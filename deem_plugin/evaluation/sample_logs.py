"""Reads what an lmms-eval run left behind: its sample logs, and what its results file adds to them."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(?P<date>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl")
# What lmms-eval writes about every question; the other entries of a line are the task's metrics.
_NO_METRICS = {
    "doc_id", "doc", "doc_hash", "target", "arguments", "input", "input_media", "resps", "filtered_resps",
    "token_counts",
}  # fmt: skip
# What tasks call the score of a question, where a metric's entry is a dictionary.
_SCORES = ("score", "is_correct", "correct", "exact_match", "acc", "accuracy")
_REMEDY = "Run `deem eval`, or lmms-eval with `--log_samples --output_path DIR`."


# Of a results file, what is read: objects whose values are of a kind.
_SECTIONS = {"config": object, "configs": dict, "group_subtasks": list, "higher_is_better": dict, "results": dict}


class SampleLogError(ValueError):
    """A run's files are missing or not as lmms-eval writes them."""


@dataclass(frozen=True)
class Answer:
    """
    One line of a sample log.

    Args:
        doc_id (`int`): Place of the question in the task's data.
        question_id (`str`, *optional*): Where the task tells it. POPE's are not unique.
        image_id (`str`, *optional*): Where the task tells it.
        pair (`str`, *optional*): What the questions of one pair share: their number, or their image (and category).
        prompt (`str`): The question as it was asked.
        target (`str`): The right answer.
        answer (`str`): What the model said.
        scores (`dict[str, float]`): What each metric logs of this question.
    """

    doc_id: int
    question_id: str | None
    image_id: str | None
    pair: str | None
    prompt: str
    target: str
    answer: str
    scores: dict[str, float]


@dataclass(frozen=True)
class TaskLog:
    """
    A task's answers.

    Args:
        path (`Path`): The sample log.
        answers (`list[Answer]`): In order of `doc_id`, which is not that of the file when several processes wrote it.
        config (`dict`): The task's configuration in the results file.
        results (`dict[str, float]`): What lmms-eval reports of each metric. Of a task with several filters of its
            answers, the first counts, here and in `answers`.
        lower_is_better (`frozenset[str]`): Metrics that are errors.
    """

    path: Path
    answers: list[Answer]
    config: dict[str, Any]
    results: dict[str, float]
    lower_is_better: frozenset[str]


@dataclass(frozen=True)
class RunLog:
    """
    What one evaluation, or several of one model into the same folder, left behind.

    Args:
        folder (`Path`): The run directory.
        model (`str`): Model and arguments as in the results file, or the folder's name without one.
        dates (`list[str]`): When the evaluations were started, as in the files' names.
        tasks (`dict[str, TaskLog]`): The newest log of each task.
        groups (`dict[str, list[str]]`): Tasks of each group.
    """

    folder: Path
    model: str
    dates: list[str]
    tasks: dict[str, TaskLog]
    groups: dict[str, list[str]]


def read_run(folder: str | Path) -> RunLog:
    """
    Reads the newest sample log of each task in a run directory.

    Raises:
        SampleLogError: If the folder is missing, holds no sample log or those of several models, or a file is damaged.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise SampleLogError(f"No such run directory: {folder}. Expected a folder that lmms-eval wrote. {_REMEDY}")
    found = sorted((path for path in folder.rglob("*.jsonl") if _NAME.fullmatch(path.name)), key=lambda p: p.name)
    if not found:
        raise SampleLogError(
            f"{folder} holds no sample logs; expected files named <date>_samples_<task>.jsonl in it. {_REMEDY}"
        )
    if len(places := sorted({path.parent for path in found})) > 1:
        raise SampleLogError(
            f"{folder} holds the sample logs of {len(places)} models; expected those of one. Give one of "
            f"{', '.join(map(str, places))}."
        )
    newest = {_NAME.fullmatch(path.name)["task"]: path for path in found}
    dates = sorted({_NAME.fullmatch(path.name)["date"] for path in newest.values()})
    results = {date: _read_results(places[0] / f"{date}_results.json") for date in dates}
    tasks, groups = {}, {}
    for task, path in sorted(newest.items()):
        run = results[_NAME.fullmatch(path.name)["date"]]
        reported, filters = {}, set()
        for name, value in run.get("results", {}).get(task, {}).items():
            if isinstance(value, int | float) and not abs(value) > 2**53 and "_stderr" not in name:
                metric, *filter_name = name.split(",")
                reported.setdefault(metric, value)
                filters.update(filter_name)
        errors = {name for name, higher in run.get("higher_is_better", {}).get(task, {}).items() if higher is False}
        answers = _read_answers(path, len(filters))
        tasks[task] = TaskLog(path, answers, run.get("configs", {}).get(task, {}), reported, frozenset(errors))
    for date in dates:
        groups.update({name: members for name, members in results[date].get("group_subtasks", {}).items() if members})
    config = results[dates[-1]].get("config", {})
    model = f"{config['model']} ({config.get('model_args', '')})" if "model" in config else places[0].name
    return RunLog(folder, model, dates, tasks, groups)


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results, dict) or not all(
            isinstance(values := results.get(name, {}), dict)
            and all(isinstance(each, kind) for each in values.values())
            for name, kind in _SECTIONS.items()
        ):
            raise ValueError(f"expected objects {', '.join(_SECTIONS)}, as lmms-eval writes them")
        return results
    except FileNotFoundError as error:
        raise SampleLogError(f"{path} is missing, which lmms-eval writes before the sample logs. {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise SampleLogError(f"{path} is no whole results file ({error}). Evaluate again, or delete it.") from error


def _read_answers(path: Path, filters: int) -> list[Answer]:
    """Reads the answers of a log, the first of each question; there is a line for each of the `filters`."""
    answers: dict[int, Answer] = {}
    times: Counter[int] = Counter()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                answer = _read_answer(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise SampleLogError(
                    f"{where}: expected a JSON object with doc_id, target, filtered_resps and the task's metrics "
                    f"({error!r}). The log is damaged or was cut off while it was written: evaluate again."
                ) from error
            times[answer.doc_id] += 1
            if times[answer.doc_id] > max(filters, 1):
                raise SampleLogError(f"{where}: doc_id {answer.doc_id} comes once too often. Evaluate again.")
            answers.setdefault(answer.doc_id, answer)
    if not answers:
        raise SampleLogError(f"{path} is empty; expected a line for each question. Evaluate again.")
    return [answers[doc_id] for doc_id in sorted(answers)]


def _read_answer(line: dict[str, Any]) -> Answer:
    metrics = {name: value for name, value in line.items() if name not in _NO_METRICS}
    rows = [value for value in metrics.values() if isinstance(value, dict)]
    scores = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            value = next((value[key] for key in _SCORES if key in value), None)
        if isinstance(value, int | float):
            scores[name] = float(value)

    def first(key: str) -> str | None:
        return next((str(row[key]) for row in rows if row.get(key) is not None), None)

    said = line["filtered_resps"]
    # Answers by log-likelihood are numbers; the task's reading of them says more.
    answer = said if isinstance(said, str) else first("prediction") or json.dumps(said)
    return Answer(
        doc_id=int(line["doc_id"]),
        question_id=first("question_id"),
        image_id=first("image_id"),
        pair=first("pair_index")
        or (image := first("image_id"))
        and " ".join(filter(None, [image, first("category")])),
        prompt=str(line.get("input", "")),
        target=str(line["target"]),
        answer=answer,
        scores=scores,
    )
