"""Reads yes or no out of an answer, strictly, and scores such answers inside lmms-eval."""

import re
from collections.abc import Iterable
from math import isnan

YES, NO, UNKNOWN = "yes", "no", "unknown"
# What is scored where likelihoods answer; lmms-eval writes a space before each.
CHOICES = ["Yes", "No"]

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
_OPENING = " \t\r\n\"'`*_([{:.,-<>"


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


# lmms-eval calls these with one document, or with the list of the rows that `score` or `score_likelihoods` returned.


def score(doc: dict, results: list[str], name: str, metrics: Iterable[str]) -> dict[str, dict]:
    """
    Returns the rows of a generated answer that the aggregations below get, one for each metric of the task `name`.

    Each row carries the ids of its question, because lmms-eval's sample logs hold no document, and `is_correct`. Only
    the accuracy's has a `score`: lmms-eval derives a standard error from it, wrong beside the other metrics.
    """
    return rows_of(doc, parse_yes_no(results[0]), name, metrics)


def score_likelihoods(doc: dict, results: list, name: str, metrics: Iterable[str]) -> dict[str, dict]:
    """
    Returns rows as `score` does, of the likelihoods of `CHOICES`; yes is the answer where it is the likelier one.

    Args:
        doc (`dict`): The question.
        results (`list`): For each of `CHOICES` minus its log-probability, and whether greedy decoding gives it.
        name (`str`), metrics (`Iterable[str]`): As in `score`.

    Raises:
        ValueError: If they are no numbers.
    """
    # lmms-eval 0.7.3 makes strings of them: "(1.5, False)", and "(nan, False)", which is no Python.
    pairs = (result.strip("()").split(",") if isinstance(result, str) else result for result in results)
    yes, no = (float(cost) for cost, _ in pairs)
    margin = no - yes  # log P(yes) - log P(no)
    if isnan(margin):
        raise ValueError(
            f"The log-likelihoods of yes and no to question {doc.get('question_id')} are {-yes} and {-no}: the model "
            f"overflows. Evaluate it with `dtype=bfloat16` or `dtype=float32` in `--model_args`."
        )
    return rows_of(doc, YES if margin > 0 else NO, name, metrics, margin=margin)


def rows_of(doc: dict, prediction: str, name: str, metrics: Iterable[str], **more: float) -> dict[str, dict]:
    """Returns the rows of an answer that was read already; see `score`."""
    ids = {key: doc[key] for key in ("question_id", "image_id", "category") if key in doc}
    right = prediction == doc["answer"]
    row = {**ids, "prediction": prediction, "target": doc["answer"], "is_correct": right, **more}
    rows = {f"{name}_{metric}": row for metric in metrics}
    return {**rows, f"{name}_accuracy": {**row, "score": float(right)}}


def accuracy(rows: list[dict]) -> float:
    """Aggregates rows to the share of right answers; an unknown one is wrong."""
    return _share(row["is_correct"] for row in rows)


def pair_accuracy(rows: list[dict]) -> float:
    """
    Aggregates rows to the share of images (of a category, if there are any) with all answers right.

    An image with one question is half a pair, cut off by a limit on the number of samples, and does not count.
    """
    right: dict[tuple, list[bool]] = {}
    for row in rows:
        right.setdefault((row["image_id"], row.get("category")), []).append(row["is_correct"])
    return _share(all(answers) for answers in right.values() if len(answers) > 1)


def precision(rows: list[dict]) -> float:
    """Aggregates rows to the share of the yes answers that are right; 0 when there is none."""
    return _of_yes(rows, 0)


def recall(rows: list[dict]) -> float:
    """Aggregates rows to the share of the questions with the answer yes that got it; 0 when there is none."""
    return _of_yes(rows, 1)


def f1(rows: list[dict]) -> float:
    """Aggregates rows to the harmonic mean of precision and recall; 0 when both are 0."""
    return _of_yes(rows, 2)


def _of_yes(rows: list[dict], index: int) -> float:
    from sklearn.metrics import precision_recall_fscore_support

    targets, predictions = ([row[key] for row in rows] for key in ("target", "prediction"))
    values = precision_recall_fscore_support(targets, predictions, labels=[YES], zero_division=0)
    return float(values[index][0])


def auc(rows: list[dict]) -> float:
    """
    Aggregates rows of `score_likelihoods` to the area under the ROC curve: how often a question whose answer is yes
    has the larger margin than one whose answer is no. A leaning to either costs nothing. `nan` without both kinds.
    """
    from sklearn.metrics import roc_auc_score

    truths = [row["target"] == YES for row in rows]
    return float(roc_auc_score(truths, [row["margin"] for row in rows])) if len(set(truths)) == 2 else float("nan")


def yes_ratio(rows: list[dict]) -> float:
    """Aggregates rows to the share of answers that are yes; the sign of a model that always says the same."""
    return _share(row["prediction"] == YES for row in rows)


def unknown_rate(rows: list[dict]) -> float:
    """Aggregates rows to the share of answers that are neither yes nor no."""
    return _share(row["prediction"] == UNKNOWN for row in rows)


def accuracy_by_category(rows: list[dict]) -> dict[str, float]:
    """Aggregates rows to the accuracy of each category, in order of name."""
    categories = sorted({row["category"] for row in rows})
    return {category: accuracy([row for row in rows if row["category"] == category]) for category in categories}


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0
