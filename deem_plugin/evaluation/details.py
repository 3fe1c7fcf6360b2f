"""Questions about details that captions leave out (where, how big, on what background), by category."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deem_plugin.evaluation import questions, yes_no

COLUMNS = ("question_id", "image_id", "image", "question", "category", "answer")
METRICS = ("accuracy", "pair_acc", "by_category", "yes_ratio", "unknown_rate")


def write_details(rows: Iterable[dict[str, Any]], path: str | Path) -> Path:
    """
    Writes `details.parquet`; the rows are those of `questions.write_questions`.

    Args:
        rows (`Iterable[dict]`):
            `question_id`, `image_id`, `image`, `question` (the whole prompt), `category`, `answer`. The questions of
            one image in one category make a pair.
        path (`str` or `Path`): File to write.

    Raises:
        QuestionDataError: If a row is not as described or the file cannot be written.
    """
    return questions.write_questions(rows, path, COLUMNS)


def details_file() -> str:
    """
    Finds `details.parquet` in `$DEEM_DETAILS`, else `$DEEM_HOME/details`, else the user's cache folder.

    Raises:
        QuestionDataError: If the file is missing, unreadable, or lacks columns.
    """
    remedy = "Write it with `deem_plugin.evaluation.details.write_details`, as `deem demo` does."
    return questions.find_questions("DEEM_DETAILS", "details", "details.parquet", COLUMNS, remedy)


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Returns the question as it stands in the file."""
    return doc["question"]


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """Returns the metric rows of one answer."""
    return yes_no.score(doc, results, "deem_details", METRICS)
