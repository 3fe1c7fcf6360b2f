"""
Puts MMVP into the datasets cache, for lmms-eval's own task `mmvp`.

MMVP: 150 pairs of pictures that CLIP takes for alike, with one question a pair, https://arxiv.org/abs/2401.06209.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from deem_plugin.evaluation.offline import read_images, write_to_cache
from deem_plugin.evaluation.questions import QuestionDataError

DATASET = "lmms-lab-eval/MMVP"
NUM_QUESTIONS = 300
# Published labels that are swapped (lmms-eval issue 1018, tsb0601/MMVP issue 30): the answers that the pictures show,
# and words of the questions, by which another numbering would be noticed.
CORRECTIONS = {99: ("(b)", "tusks"), 100: ("(a)", "tusks"), 279: ("(b)", "elderly"), 280: ("(a)", "elderly")}

_COLUMNS = {
    "Index": "int64",
    "Question": "string",
    "Options": "string",
    "Correct Answer": "string",
    "Published Answer": "string",
    "image": "image",
}


def import_mmvp(source: str | Path, cache_dir: str | Path | None = None) -> int:
    """
    Imports MMVP for offline use by lmms-eval; an earlier import is replaced.

    Answers are corrected as in the copy that the task downloads (`CORRECTIONS`). The published ones stay beside them
    in the column `Published Answer`.

    Args:
        source (`str` or `Path`): Folder as published: `Questions.csv`, and `MMVP Images` with 1.jpg to 300.jpg.
        cache_dir (`str` or `Path`, *optional*):
            Cache to write to; by default the one that lmms-eval reads, `$LMMS_EVAL_DATASETS_CACHE` or else that of
            `datasets`.

    Returns:
        `int`: How many answers differ from the published ones.

    Raises:
        QuestionDataError: If files are missing or malformed, images are missing or unreadable, or the cache cannot be
            written. The cache is then as it was.
    """
    folder = Path(source).expanduser()
    questions = [_corrected(question) for question in _read_questions(folder / "Questions.csv")]
    names = [f"{question['Index']}.jpg" for question in questions]
    images = read_images(folder / "MMVP Images", names, "Complete the download of MMVP and import again.")
    rows = (
        {**question, "image": {"bytes": images[name], "path": None}}
        for question, name in zip(questions, names, strict=True)
    )
    rows = tqdm(rows, total=len(questions), desc="Importing MMVP")
    write_to_cache(DATASET, _COLUMNS, rows, lambda row: [("default", "train")], cache_dir)
    return sum(question["Correct Answer"] != question["Published Answer"] for question in questions)


def _read_questions(path: Path) -> Iterator[dict]:
    """Yields the questions of the published file, in its order."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise QuestionDataError(
            f"Cannot read {path} ({error}). Give the folder of MMVP as published, with Questions.csv and MMVP Images."
        ) from error
    # The first column is called Index in some copies and lndex in others.
    if not lines or [name.strip() for name in lines[0][1:]] != ["Question", "Options", "Correct Answer"]:
        raise QuestionDataError(
            f"{path} has the columns {lines[0] if lines else []}; expected Index, Question, Options, Correct Answer."
        )
    lines = [line for line in lines[1:] if line]
    for number, line in enumerate(lines, start=1):
        if len(line) != 4 or line[0].strip() != str(number) or line[3].strip().lower() not in ("(a)", "(b)"):
            raise QuestionDataError(
                f"{path}, question {number}: got {line}; expected {number}, a question, its options and the answer "
                f"(a) or (b)."
            )
        answer = line[3].strip().lower()
        yield {"Index": number, "Question": line[1].strip(), "Options": line[2].strip(), "Published Answer": answer}
    if len(lines) != NUM_QUESTIONS:
        raise QuestionDataError(f"{path} has {len(lines)} questions; MMVP has {NUM_QUESTIONS}.")


def _corrected(question: dict) -> dict:
    """Returns the question with its right answer."""
    answer, word = CORRECTIONS.get(question["Index"], (question["Published Answer"], ""))
    if word not in question["Question"].lower():
        raise QuestionDataError(
            f"Question {question['Index']} is {question['Question']!r}; the one whose published answer is known to be "
            f"wrong asks about {word!r}. These are not MMVP's questions in their published order."
        )
    return {**question, "Correct Answer": answer}
