"""RobustVQA: is this class the main object of a picture that fools CLIP? (DEEM, https://arxiv.org/abs/2405.15232)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deem_plugin.evaluation import questions, yes_no
from deem_plugin.evaluation.manifest import check_manifest

# The three sets that the pictures are from: ImageNet-A, ImageNet-R and ImageNet-V2.
SPLITS = ("a", "r", "v2")
COLUMNS = ("question_id", "image_id", "image", "caption", "answer", "source")
METRICS = ("accuracy", "pair_acc", "precision", "recall", "f1", "yes_ratio")
# As the authors ask it, misspelling included: another wording gives another benchmark.
PROMPT = "Is {caption} the main object in this image? Please anwser yes or no"
REWORDED_PROMPT = "Is {caption} the main object in this image? Please answer yes or no."
# Around the question in the authors' evaluation: the words before the picture, and how the answer begins.
PAPER_OPENING, PAPER_ANSWER = "Based on the image, please answer the question. ", "The answer is"


def write_robustvqa(rows: Iterable[dict[str, Any]], path: str | Path) -> Path:
    """
    Writes one split as `robustvqa_<split>.parquet`; the rows are those of `questions.write_questions`.

    Args:
        rows (`Iterable[dict]`):
            `question_id`, `image_id`, `image`, `caption` (class name in the question), `answer`, `source` (where the
            image is from, such as its path in ImageNet-A).
        path (`str` or `Path`): File to write.

    Raises:
        QuestionDataError: If a row is not as described or the file cannot be written.
    """
    return questions.write_questions(rows, path, COLUMNS)


def robustvqa_file(split: str) -> str:
    """
    Finds the file of a split in `$DEEM_ROBUSTVQA`, else `$DEEM_HOME/robustvqa`, else the user's cache folder.

    Raises:
        ValueError: If there is no such split.
        QuestionDataError: If the file is missing, unreadable, lacks columns, or does not match the manifest beside it.
    """
    if split not in SPLITS:
        raise ValueError(f"RobustVQA has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    remedy = "The data is not shipped: build it with `deem robustvqa build` from ImageNet-A, -R and -V2."
    path = questions.find_questions("DEEM_ROBUSTVQA", "robustvqa", f"robustvqa_{split}.parquet", COLUMNS, remedy)
    check_manifest(path)
    return path


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Returns the question as published."""
    return PROMPT.format(caption=doc["caption"])


def reworded_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Returns the question in correct spelling, with spaces for the underscores of published class names."""
    return REWORDED_PROMPT.format(caption=doc["caption"].replace("_", " "))


def paper_messages(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> list[dict]:
    """Returns the authors' whole prompt but for their chat template, which is the checkpoint's."""
    picture, opening = {"type": "image", "url": doc["image"]}, {"type": "text", "text": PAPER_OPENING}
    content = [opening, picture, {"type": "text", "text": doc_to_text(doc)}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": PAPER_ANSWER}]}
    return [{"role": "user", "content": content}, answer]


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """Returns the metric rows of one generated answer."""
    return yes_no.score(doc, results, "robustvqa", (*METRICS, "unknown_rate"))


def process_likelihoods(doc: dict, results: list) -> dict[str, dict]:
    """Returns the metric rows of the likelihoods of yes and no."""
    return yes_no.score_likelihoods(doc, results, "robustvqa", (*METRICS, "auc"))
