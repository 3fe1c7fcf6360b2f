"""Reads yes or no out of an answer, strictly, and scores such answers."""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

YES, NO, UNKNOWN = "yes", "no", "unknown"

_YES = re.compile(r"(?<![\w-])yes(?![\w-]|'\w)")
# "no" is a verdict where it opens the answer, ends a clause, goes before a conjunction, or follows "answer is". It is
# none in "there is no dog".
_NO = re.compile(
    r"""(?<![\w-])no(?![\w-]|'\w)
        (?: (?<=^no) (?![ ]idea\b)
          | (?<=answer\ is\ no)
          | (?![ \t]+[a-z0-9])
          | (?=[ ](?:and|or|but|because|since|as)\b) )""",
    re.VERBOSE,
)
_MARGIN = re.compile(r"\(margin (-?[\d.]+(?:e[+-]\d+)?)\)$")
_OPENING = " \t\r\n\"'`*_([{:.,-<>"

_AUXILIARIES = (
    "is|are|was|were|am|do|does|did|can|could|has|have|had|will|would|shall|should|may|might|must"
    "|isn't|aren't|wasn't|weren't|doesn't|don't|didn't|can't|couldn't|hasn't|haven't|won't|wouldn't|shouldn't"
)
_POLAR_QUESTION = re.compile(rf"(?:^|[.?!:,\n])\s*(?:{_AUXILIARIES})\b[^.?!\n]*\?", re.IGNORECASE)
_ASKS_FOR_EITHER = re.compile(r"\b(?:yes|no) ?(?:or|/) ?(?:yes|no)\b", re.IGNORECASE)
_ASKS_FOR_A_WORD = re.compile(r"\b(?:single|one) word\b", re.IGNORECASE)
_ASKS_FOR_MORE = re.compile(
    r"\b(?:explain|explanation|why|reason|reasons|describe|justify|step by step)\b", re.IGNORECASE
)


def parse_yes_no(answer: str) -> str:
    """
    Returns `"yes"`, `"no"`, or `"unknown"` where the answer says neither or both.

    Only the words themselves count. "No, it is not", "The answer is: yes" and "Yes it is" are verdicts; "yes or no",
    "This is a cat", "There is no dog" (whose meaning hangs on the question), "nope" and the empty answer are not.
    """
    text = answer.lower().lstrip(_OPENING)
    says_yes, says_no = bool(_YES.search(text)), bool(_NO.search(text))
    if says_yes == says_no:
        return UNKNOWN
    return YES if says_yes else NO


def write_margin(margin: float) -> str:
    """
    Writes a verdict that carries how sure it is: "yes (margin 1.25)", "no (margin -0.5)".

    Args:
        margin (`float`): log P(yes) - log P(no). No margin of zero is a no.
    """
    return f"{YES if margin > 0 else NO} (margin {margin:.6g})"


def read_margin(answer: str) -> float:
    """Returns the margin that an answer carries; of one that carries none 1 for yes, -1 for no, 0 for neither."""
    if carried := _MARGIN.search(answer):
        return float(carried[1])
    return {YES: 1.0, NO: -1.0, UNKNOWN: 0.0}[parse_yes_no(answer)]


def asks_yes_or_no(prompt: str) -> bool:
    """
    Tells whether a prompt wants the one word yes or no.

    It does when it asks for one of the two ("yes or no"), or asks a question that opens with an auxiliary verb ("Is
    there ...?") and wants one word; never when it also asks for an explanation.
    """
    wants_verdict = _ASKS_FOR_EITHER.search(prompt) or (
        _ASKS_FOR_A_WORD.search(prompt) and _POLAR_QUESTION.search(prompt)
    )
    return bool(wants_verdict) and not _ASKS_FOR_MORE.search(prompt)


def settle_answer(prompt: str, answer: str) -> str:
    """
    Reduces the answer to a yes-or-no question to that word, for tasks that compare it letter by letter.

    POPE, for one, counts "Yes." and "Yes, there is a dog" as wrong. The answer is left as it is unless the prompt
    `asks_yes_or_no`, and also when the verdict is not clear.
    """
    if not asks_yes_or_no(prompt):
        return answer
    verdict = parse_yes_no(answer)
    return answer if verdict == UNKNOWN else verdict


def accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the share of predictions that equal their target; an unknown one is wrong."""
    return _share([prediction == target for prediction, target in zip(predictions, targets, strict=True)])


def pair_accuracy(predictions: Sequence[str], targets: Sequence[str], groups: Sequence[Hashable]) -> float:
    """
    Returns the share of groups (the questions about one image) of which every answer is right.

    A group of one question is half a pair, cut off by a limit on the number of samples, and does not count.
    """
    right = defaultdict(list)
    for prediction, target, group in zip(predictions, targets, groups, strict=True):
        right[group].append(prediction == target)
    return _share([all(answers) for answers in right.values() if len(answers) > 1])


def precision(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the share of the yes predictions that are right; 0 when there is none."""
    return _share(
        [target == YES for prediction, target in zip(predictions, targets, strict=True) if prediction == YES]
    )


def recall(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the share of the yes targets that were predicted as yes; 0 when there is none."""
    return _share(
        [prediction == YES for prediction, target in zip(predictions, targets, strict=True) if target == YES]
    )


def f1(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the harmonic mean of precision and recall; 0 when both are 0."""
    p, r = precision(predictions, targets), recall(predictions, targets)
    return 2 * p * r / (p + r) if p + r else 0.0


def auc(margins: Sequence[float], targets: Sequence[str]) -> float:
    """
    Returns the area under the ROC curve: how often a question answered by yes has the larger margin.

    Threshold-free, so a model that leans to yes or to no loses nothing. Of answers without margins (see `read_margin`)
    it is the mean of both classes' accuracies, an unknown one half right. `nan` where all targets are the same.
    """
    from sklearn.metrics import roc_auc_score

    truths = [target == YES for target in targets]
    return float(roc_auc_score(truths, margins)) if len(set(truths)) == 2 else float("nan")


def yes_ratio(predictions: Sequence[str]) -> float:
    """Returns the share of all predictions that are yes; the sign of a model that always says the same."""
    return _share([prediction == YES for prediction in predictions])


def unknown_rate(predictions: Sequence[str]) -> float:
    """Returns the share of all predictions that say neither yes nor no."""
    return _share([prediction == UNKNOWN for prediction in predictions])


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
