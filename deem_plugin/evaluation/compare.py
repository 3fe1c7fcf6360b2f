"""Compares two runs of lmms-eval question by question: differences with their uncertainty, and what flipped."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deem_plugin.evaluation.documents import Documents, find_documents
from deem_plugin.evaluation.sample_logs import Answer, RunLog, TaskLog, read_run
from deem_plugin.evaluation.statistics import Estimate, cluster_totals, estimate, mcnemar

_SHOWN = 5  # rows named in an error


class CompareError(ValueError):
    """Two runs cannot be compared."""


@dataclass(frozen=True)
class Flip:
    """A question that one run answered right and the other wrong; of its answers the first is the base's."""

    doc_id: int
    question: str
    prompt: str
    target: str
    base_answer: str
    new_answer: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """
    Two runs on one task, or on the tasks of a group.

    Args:
        task (`str`): Task or group.
        metric (`str`): The metric, 0 or 1 for each question.
        questions (`int`): How many questions.
        images (`int`, *optional*): How many images they are about; `None` where nothing tells, so that questions were
            taken for independent.
        same_data (`bool`): Whether the content hashes of the data are known and equal; otherwise only the ids,
            prompts and targets are known to be equal.
        base (`float`): Mean score of the base.
        new (`float`): Mean score of the new run.
        difference (`Estimate`): New minus base.
        lost (`list[Flip]`): Right in the base, wrong now.
        gained (`list[Flip]`): Wrong in the base, right now.
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
    lost: list[Flip]
    gained: list[Flip]
    totals: list[np.ndarray]
    documents: Documents | None = None

    @property
    def p_value(self) -> float:
        """McNemar's exact test of the flips."""
        return mcnemar(len(self.lost), len(self.gained))


@dataclass(frozen=True)
class Comparisons:
    """
    Two runs on all that they have in common.

    Args:
        base (`RunLog`): The run that is compared with.
        new (`RunLog`): The run in question.
        tasks (`list[Comparison]`): By name.
        groups (`list[Comparison]`): Groups of which both runs have every task; tasks count alike.
        left_out (`dict[str, str]`): Tasks that are not compared, and why.
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
        metric = base.tasks[task].metric()
        if metric is None or any(metric not in pair[1].scores for pair in pairs):
            left_out[task] = "no metric that is 0 or 1 for every question"
            continue
        documents = find_documents(new.tasks[task])
        tasks.append(_compare(task, metric, pairs, same_data, documents))
    if not tasks:
        raise CompareError(
            f"None of the common tasks {', '.join(common)} has a metric that is 0 or 1 for every question, as paired "
            f"tests need. Compare runs of a task with an accuracy."
        )
    compared = {comparison.task: comparison for comparison in tasks}
    groups = [
        _compare_group(name, [compared[member] for member in members])
        for name, members in sorted(new.groups.items())
        if len(members) > 1 and base.groups.get(name) == members and compared.keys() >= set(members)
    ]
    return Comparisons(base, new, tasks, groups, left_out)


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
    task: str, metric: str, pairs: list[tuple[Answer, Answer]], same_data: bool, documents: Documents | None
) -> Comparison:
    clusters = [answer.image_id for answer, _ in pairs]
    if None in clusters and documents is not None:
        clusters = [documents.image_id(answer.doc_id) for answer, _ in pairs]
    known = None not in clusters
    base, new = ([pair[side].scores[metric] for pair in pairs] for side in (0, 1))
    totals = cluster_totals(
        [after - before for before, after in zip(base, new, strict=True)], clusters if known else range(len(pairs))
    )
    flips = {
        change: [
            Flip(a.doc_id, a.question_id or f"doc_id {a.doc_id}", a.prompt, a.target, a.answer, b.answer)
            for a, b in pairs
            if b.scores[metric] - a.scores[metric] == change
        ]
        for change in (-1, 1)
    }
    return Comparison(
        task=task,
        metric=metric,
        questions=len(pairs),
        images=len(totals) if known else None,
        same_data=same_data,
        base=sum(base) / len(pairs),
        new=sum(new) / len(pairs),
        difference=estimate(totals),
        lost=flips[-1],
        gained=flips[1],
        totals=[totals],
        documents=documents,
    )


def _compare_group(name: str, members: list[Comparison]) -> Comparison:
    """Puts tasks together, which count alike whatever their size."""
    totals = [total for member in members for total in member.totals]
    images = [member.images for member in members]
    return Comparison(
        task=name,
        metric=", ".join(dict.fromkeys(member.metric for member in members)),
        questions=sum(member.questions for member in members),
        images=None if None in images else sum(images),
        same_data=all(member.same_data for member in members),
        base=sum(member.base for member in members) / len(members),
        new=sum(member.new for member in members) / len(members),
        difference=estimate(*totals),
        lost=[flip for member in members for flip in member.lost],
        gained=[flip for member in members for flip in member.gained],
        totals=totals,
    )
