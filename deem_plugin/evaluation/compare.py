"""Compares two runs of lmms-eval question by question: differences with their uncertainty, and what flipped."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deem_plugin.evaluation.documents import Documents, find_documents
from deem_plugin.evaluation.sample_logs import Answer, RunLog, TaskLog, read_run
from deem_plugin.evaluation.statistics import Estimate, cluster_totals, estimate, sign_test

_SHOWN = 5  # rows named in an error
# Scores of a whole set, which a mean may equal by chance.
_NO_MEAN = re.compile(r"precision|recall|f1|auc|ratio|rate", re.IGNORECASE)


class CompareError(ValueError):
    """Two runs cannot be compared."""


@dataclass(frozen=True)
class Flip:
    """A question or pair that one run answered better than the other; of its answers the first is the base's."""

    doc_id: int
    question: str
    prompt: str
    target: str
    base_answer: str
    new_answer: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """
    Two runs by one metric of a task, or of the tasks of a group.

    Args:
        task (`str`): Task or group.
        metric (`str`): The metric.
        questions (`int`): How many questions; of a metric of pairs, how many pairs.
        images (`int`, *optional*): How many images they are about; `None` where nothing tells, so that questions were
            taken for independent.
        same_data (`bool`): Whether the content hashes of the data are known and equal; otherwise only the ids,
            prompts and targets are known to be equal.
        base (`float`): Mean score of the base.
        new (`float`): Mean score of the new run.
        difference (`Estimate`): New minus base.
        p_value (`float`, *optional*):
            The exact sign test of what changed (McNemar's for scores of 0 and 1). `None` for groups: it would weigh
            tasks by their size, as their mean does not.
        lost (`list[Flip]`): Better in the base.
        gained (`list[Flip]`): Better in the new run.
        totals (`list[np.ndarray]`): What `difference` was estimated from, see `statistics.cluster_totals`.
        documents (`Documents`, *optional*): The data, if it is still where the run had it.
    """

    task: str
    metric: str
    questions: int
    images: int | None
    same_data: bool
    base: float
    new: float
    difference: Estimate
    p_value: float | None
    lost: list[Flip]
    gained: list[Flip]
    totals: list[np.ndarray]
    documents: Documents | None = None


@dataclass(frozen=True)
class Comparisons:
    """
    Two runs on all that they have in common.

    Args:
        base (`RunLog`): The run that is compared with.
        new (`RunLog`): The run in question.
        tasks (`list[Comparison]`): By name and metric.
        groups (`list[Comparison]`): Groups of which both runs have every task; tasks count alike.
        left_out (`dict[str, str]`): Tasks and metrics that are not compared, and why.
    """

    base: RunLog
    new: RunLog
    tasks: list[Comparison]
    groups: list[Comparison]
    left_out: dict[str, str]


def compare_runs(base_dir: str | Path, new_dir: str | Path) -> Comparisons:
    """
    Compares two run directories of lmms-eval.

    Args:
        base_dir (`str` or `Path`): The run that is compared with.
        new_dir (`str` or `Path`): The run in question.

    Raises:
        SampleLogError: If a directory holds no sample logs or damaged ones.
        CompareError: If the runs have no task in common, or saw different data.
    """
    base, new = read_run(base_dir), read_run(new_dir)
    common = sorted(base.tasks.keys() & new.tasks.keys())
    if not common:
        raise CompareError(
            f"The runs have no task in common: {base.folder} has {', '.join(base.tasks)}, {new.folder} has "
            f"{', '.join(new.tasks)}. Evaluate both on the same tasks."
        )
    left_out = {task: f"only in {run.folder}" for run in (base, new) for task in run.tasks.keys() - common}
    tasks = []
    for task in common:
        pairs, same_data = _pair(task, base.tasks[task], new.tasks[task])
        documents = find_documents(new.tasks[task])
        for metric in base.tasks[task].results:
            units = _units(metric, pairs)
            values = _values(metric, units)
            reported = [run.tasks[task].results.get(metric, np.nan) for run in (base, new)]
            if without := int(np.isnan(values).any(1).sum()) if values else 0:
                left_out[f"{task}, {metric}"] = f"no score of {without} of {len(values)} questions or pairs"
            elif _NO_MEAN.search(metric) or not _is_mean(values, reported):
                left_out[f"{task}, {metric}"] = "no mean over questions or pairs"
            else:
                result = _compare(task, metric, units, values, same_data, documents)
                lower = metric in new.tasks[task].lower_is_better
                tasks.append(replace(result, lost=result.gained, gained=result.lost) if lower else result)
    if not tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise CompareError(
            f"None of the common tasks {', '.join(common)} has a metric that is the mean of what the sample logs say "
            f"of each question or pair ({reasons or 'there are no metrics'}). Compare runs of a task with an accuracy."
        )
    groups = []
    for name, members in sorted(new.groups.items()):
        if len(members) > 1 and base.groups.get(name) == members:
            for metric in dict.fromkeys(result.metric for result in tasks if result.task in members):
                own = [result for result in tasks if result.task in members and result.metric == metric]
                if len(own) == len(members):
                    groups.append(_compare_group(name, own))
    return Comparisons(base, new, tasks, groups, left_out)


# A question with its two answers, or the questions of a pair.
_Unit = list[tuple[Answer, Answer]]


def _units(metric: str, answers: list[tuple[Answer, Answer]]) -> list[_Unit]:
    """Returns what the metric is the mean of: questions, or where its name says so pairs, but no half ones."""
    if "pair" not in metric:
        return [[both] for both in answers]
    units: dict[str, _Unit] = {}
    for both in answers:
        units.setdefault(both[0].pair or "", []).append(both)
    return [unit for pair, unit in units.items() if pair and len(unit) > 1]


def _values(metric: str, units: list[_Unit]) -> list[list[float]]:
    """Returns the scores of each unit in both runs; all questions of a pair must be right."""
    return [
        [float(np.min([answer.scores.get(metric, np.nan) for answer in side])) for side in zip(*unit, strict=True)]
        for unit in units
    ]


def _is_mean(values: list[list[float]], reported: list[float]) -> bool:
    """Tells whether what lmms-eval reports of both runs, a share or in percent, is the mean of the units' scores."""
    if not values:
        return False
    means = np.mean(values, axis=0)
    return any(np.allclose(scale * means, reported, atol=1e-6) for scale in (1, 100))


def _pair(task: str, base: TaskLog, new: TaskLog) -> tuple[list[tuple[Answer, Answer]], bool]:
    """
    Joins the answers to the same questions; tells whether the data is known to be the same to the pixel.

    Raises:
        CompareError: If questions are missing on one side, or differ; it names them.
    """
    key = _key(base, new)
    ours, theirs = ({key(answer): answer for answer in log.answers} for log in (base, new))
    problems = []
    for known, other, log in ((ours, theirs, base), (theirs, ours, new)):
        if alone := [name for name in known if name not in other]:
            problems.append(f"{_count(len(alone), 'question')} only in {log.path}: {_some(alone)}")
    for field in ("prompt", "target", "image_id"):
        differing = [
            name for name in ours if name in theirs and getattr(ours[name], field) != getattr(theirs[name], field)
        ]
        if differing:
            first = (repr(getattr(side[differing[0]], field)) for side in (ours, theirs))
            problems.append(
                f"{_count(len(differing), 'question')} with another {field}: {_some(differing)}; the first has "
                f"{' in the base and '.join(first)} in the new run"
            )
    hashes = [_data_hash(log) for log in (base, new)]
    if not problems and None not in hashes and hashes[0] != hashes[1]:
        problems.append(
            f"ids, prompts and targets are alike, but not the content hashes ({hashes[0]} and {hashes[1]}), so that "
            f"images differ"
        )
    if problems:
        raise CompareError(
            f"The runs saw different data of {task}, expected the same questions about the same images.\n  "
            + "\n  ".join(problems)
            + f"\nEvaluate both on the same data (with the same --limit), or compare without {base.path} and "
            f"{new.path}."
        )
    return [(ours[name], theirs[name]) for name in ours], None not in hashes


def _key(*logs: TaskLog) -> Callable[[Answer], str]:
    """Returns what a question is known by: its id if every question of both runs has one of its own, or its place."""
    for log in logs:
        ids = [answer.question_id for answer in log.answers]
        if None in ids or len(set(ids)) < len(ids):
            return lambda answer: f"doc_id {answer.doc_id}"
    return lambda answer: answer.question_id


def _data_hash(log: TaskLog) -> str | None:
    metadata = log.config.get("metadata")
    return metadata.get("data") if isinstance(metadata, dict) else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _compare(
    task: str,
    metric: str,
    units: list[_Unit],
    values: list[list[float]],
    same_data: bool,
    documents: Documents | None,
) -> Comparison:
    clusters = [unit[0][0].image_id for unit in units]
    if None in clusters and documents is not None:
        clusters = [documents.image_id(unit[0][0].doc_id) for unit in units]
    known = None not in clusters
    changes = [after - before for before, after in values]
    totals = cluster_totals(changes, clusters if known else range(len(units)))
    lost, gained = (
        [_flip(unit) for unit, change in zip(units, changes, strict=True) if change * sign > 0] for sign in (-1, 1)
    )
    base, new = np.mean(values, axis=0).tolist()
    return Comparison(
        task=task,
        metric=metric,
        questions=len(units),
        images=len(totals) if known else None,
        same_data=same_data,
        base=base,
        new=new,
        difference=estimate(totals),
        p_value=sign_test(len(lost), len(gained)),
        lost=lost,
        gained=gained,
        totals=[totals],
        documents=documents,
    )


def _flip(unit: _Unit) -> Flip:
    bases, news = zip(*unit, strict=True)

    def joined(values: list[str]) -> str:
        return " / ".join(values if len(set(values)) > 1 else values[:1])

    first = bases[0]
    name = first.question_id or f"doc_id {first.doc_id}"
    return Flip(
        doc_id=first.doc_id,
        question=name if len(unit) == 1 else f"pair {first.pair}",
        prompt=joined([answer.prompt for answer in bases]),
        target=joined([answer.target for answer in bases]),
        base_answer=joined([answer.answer for answer in bases]),
        new_answer=joined([answer.answer for answer in news]),
    )


def _compare_group(name: str, members: list[Comparison]) -> Comparison:
    """Puts tasks together, which count alike whatever their size."""
    totals = [total for member in members for total in member.totals]
    images = [member.images for member in members]
    return Comparison(
        task=name,
        metric=members[0].metric,
        questions=sum(member.questions for member in members),
        images=None if None in images else sum(images),
        same_data=all(member.same_data for member in members),
        base=sum(member.base for member in members) / len(members),
        new=sum(member.new for member in members) / len(members),
        difference=estimate(*totals),
        p_value=None,
        lost=[flip for member in members for flip in member.lost],
        gained=[flip for member in members for flip in member.gained],
        totals=totals,
    )
