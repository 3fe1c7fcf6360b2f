"""RobustVQA as a choice between the right class and the wrong one, asked in both orders (DEEM, Table 9)."""

import re
from typing import TYPE_CHECKING

from deem_plugin.evaluation import yes_no

if TYPE_CHECKING:
    from datasets import Dataset

METRICS = ("accuracy", "pair_acc", "truth_first", "truth_second", "order_bias", "unknown_rate")
# As the authors ask it.
PROMPT = "What is the main object in this image? Choose from the following list:[{first}, {second}]"

FIRST, SECOND = "first", "second"


def as_choices(dataset: "Dataset") -> "Dataset":
    """
    Makes choices of the yes/no questions: the one answered by yes becomes the order with the right class first.

    Args:
        dataset (`datasets.Dataset`): Rows of a RobustVQA file.

    Returns:
        `datasets.Dataset`: As many rows, with the columns `first` and `second` (class names), `truth` (the right one)
            and `answer` ("first" or "second").
    """
    captions = {
        (image, answer): caption
        for image, answer, caption in zip(dataset["image_id"], dataset["answer"], dataset["caption"], strict=True)
    }
    made = {name: [] for name in ("question_id", "first", "second", "truth", "answer")}
    for image, answer in zip(dataset["image_id"], dataset["answer"], strict=True):
        right, wrong = captions[image, yes_no.YES], captions[image, yes_no.NO]
        place = FIRST if answer == yes_no.YES else SECOND
        values = (f"{image}#{place}", *((right, wrong) if place == FIRST else (wrong, right)), right, place)
        for column, value in zip(made.values(), values, strict=True):
            column.append(value)
    dataset = dataset.remove_columns(["question_id", "caption", "answer"])
    for name, column in made.items():
        dataset = dataset.add_column(name, column)
    return dataset


def choice_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Returns the question as published."""
    return PROMPT.format(first=doc["first"], second=doc["second"])


def parse_choice(answer: str, first: str, second: str) -> str:
    """
    Returns `"first"` or `"second"`, the class that an answer names, or `"unknown"` where it names neither or both.

    Names count as whole words, whatever their case and whether written with underscores or spaces. A name that is
    part of the other ("slug", "sea slug") counts where it stands apart from it.
    """
    names = {FIRST: _plain(first), SECOND: _plain(second)}
    text, named = _plain(answer), []
    for place in sorted(names, key=lambda place: -len(names[place])):
        text, times = re.subn(rf"(?<!\w){re.escape(names[place])}(?!\w)", "", text)
        if times:
            named.append(place)
    return named[0] if len(named) == 1 else yes_no.UNKNOWN


def _plain(text: str) -> str:
    return text.replace("_", " ").casefold().strip()


def choice_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """Returns the metric rows of one answer; see `yes_no.score`."""
    prediction = parse_choice(results[0], doc["first"], doc["second"])
    return yes_no.rows_of(doc, prediction, "robustvqa_choice", METRICS)


def truth_first(rows: list[dict]) -> float:
    """Aggregates rows of `choice_results` to the accuracy where the right class comes first."""
    return yes_no.accuracy([row for row in rows if row["target"] == FIRST])


def truth_second(rows: list[dict]) -> float:
    """Aggregates rows of `choice_results` to the accuracy where the right class comes second."""
    return yes_no.accuracy([row for row in rows if row["target"] == SECOND])


def order_bias(rows: list[dict]) -> float:
    """Aggregates rows of `choice_results` to how much better the right class is found first than second, -1 to 1."""
    return truth_first(rows) - truth_second(rows)
