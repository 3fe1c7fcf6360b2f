"""Yes/no questions about images in a parquet file: written whole or not at all, found, and scored inside lmms-eval."""

import hashlib
import io
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from deem_plugin.data.images import load_image
from deem_plugin.evaluation import yes_no

# What is scored where likelihoods answer; lmms-eval writes a space before each.
CHOICES = ["Yes", "No"]
# Rows held in memory while a file is written; both questions of an image carry its bytes.
_ROWS_A_CHUNK = 256


class QuestionDataError(ValueError):
    """Question data is missing, unreadable, or not as it has to be."""


def data_home() -> Path:
    """Returns the folder for data sets made here: `$DEEM_HOME`, else `deem` in the user's cache folder."""
    if home := os.environ.get("DEEM_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "deem"


def find_questions(variable: str, folder: str, filename: str, columns: Iterable[str], remedy: str) -> str:
    """
    Returns the path of a question file, checked to be readable and to have its columns.

    Args:
        variable (`str`): Environment variable that names the folder of the file; it wins where it is set.
        folder (`str`): Name of the folder below `data_home()` otherwise.
        filename (`str`): Name of the file in that folder.
        columns (`Iterable[str]`): Columns that the file must have.
        remedy (`str`): Sentence of the error that says how to make the file.

    Raises:
        QuestionDataError: If the file is missing, no parquet file, or lacks columns.
    """
    import pyarrow.parquet as pq

    given = os.environ.get(variable)
    path = (Path(given).expanduser() if given else data_home() / folder) / filename
    if not path.is_file():
        raise QuestionDataError(f"Question file not found: {path}. {remedy} Or point {variable} at its folder.")
    try:
        present = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise QuestionDataError(f"{path} is no readable parquet file ({error}). {remedy}") from error
    if missing := [column for column in columns if column not in present]:
        raise QuestionDataError(f"{path} lacks the columns {missing}; it has {present}. {remedy}")
    return str(path.resolve())


def content_hash(path: str | Path) -> str:
    """
    Returns a hash of all rows of a question file, images included, whichever way parquet stores them.

    The tasks carry it in their metadata. From there it enters the key of lmms-eval's response cache, which looks at
    no image, and the results file, by which `deem compare` knows that two runs saw the same data.

    Raises:
        QuestionDataError: If the file cannot be read to its end.
    """
    path = Path(path).expanduser().resolve()
    try:
        status = path.stat()
        return _hash_rows(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:
        raise QuestionDataError(f"{path} is damaged ({str(error).strip()}). Write it anew.") from error


@lru_cache(maxsize=16)
def _hash_rows(path: Path, changed: int, size: int) -> str:
    """Hashes the rows of a file; `changed` and `size` are there for the memory of this function only."""
    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    for batch in pq.ParquetFile(path).iter_batches(_ROWS_A_CHUNK):
        for row in batch.to_pylist():
            for name in sorted(row):
                value = row[name]["bytes"] if isinstance(row[name], dict) else row[name]
                data = value if isinstance(value, bytes) else str(value).encode()
                # With its length, so that no two rows of different cells read alike.
                digest.update(f"{name}:{len(data)}:".encode())
                digest.update(data)
    return digest.hexdigest()[:16]


def write_questions(rows: Iterable[dict[str, Any]], path: str | Path, columns: Iterable[str]) -> Path:
    """
    Writes questions to a parquet file with the images inside, under a temporary name until it is complete.

    Args:
        rows (`Iterable[dict]`):
            One question each, with a value for every column. `image` is a PIL image, a path, or the bytes of an image
            file; `answer` is "yes" or "no"; all else is text. The questions of an image stand next to each other.
        path (`str` or `Path`): File to write.
        columns (`Iterable[str]`): Columns of the file.

    Raises:
        QuestionDataError: If a row is not as described, there is none, or the file cannot be written. Nothing is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    path, columns = Path(path).expanduser(), list(columns)
    schema = Features({name: Image() if name == "image" else Value("string") for name in columns}).arrow_schema
    # One name for all runs, so that the next one overwrites what a killed one left.
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            chunk: list[dict] = []
            for row in _checked(rows, columns):
                chunk.append(row)
                if len(chunk) == _ROWS_A_CHUNK:
                    writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
                    chunk = []
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
        os.replace(partial, path)
    except OSError as error:
        raise QuestionDataError(
            f"Cannot write {path}: {error}. Choose a folder that you may write to, on a disk with space left."
        ) from error
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)
    return path


def _checked(rows: Iterable[dict[str, Any]], columns: list[str]) -> Iterable[dict[str, Any]]:
    """Yields the rows ready for the file; raises on the first that is not as `write_questions` describes."""
    ids, finished, current = set(), set(), None
    for index, row in enumerate(rows):
        if missing := [column for column in columns if column not in row]:
            raise QuestionDataError(f"Row {index} lacks {missing}; every row needs {columns}.")
        if unknown := [column for column in row if column not in columns]:
            raise QuestionDataError(f"Row {index} has the unknown columns {unknown}; the columns are {columns}.")
        if row["answer"] not in (yes_no.YES, yes_no.NO):
            raise QuestionDataError(f"Row {index} has the answer {row['answer']!r}; expected 'yes' or 'no'.")
        if row["question_id"] in ids:
            raise QuestionDataError(f"Row {index} has the question_id {row['question_id']!r} of an earlier row.")
        if row["image_id"] in finished:
            raise QuestionDataError(
                f"Row {index} asks about the image {row['image_id']!r} again after other images; write the questions "
                f"of an image next to each other, so that a limit on the number of samples keeps pairs whole."
            )
        ids.add(row["question_id"])
        if current is not None and row["image_id"] != current:
            finished.add(current)
        current = row["image_id"]
        image = {"bytes": _image_bytes(row["image"], index), "path": None}
        yield {**{name: str(value) for name, value in row.items() if name != "image"}, "image": image}
    if current is None:
        raise QuestionDataError("There is not one question to write.")


def _image_bytes(image: Any, index: int) -> bytes:
    """Returns the bytes of an image file for a PIL image, a path, or such bytes; raises if they do not decode."""
    import PIL.Image

    if isinstance(image, PIL.Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()
    source = "the given bytes" if isinstance(image, bytes) else image
    try:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        with PIL.Image.open(io.BytesIO(data)) as opened:
            opened.load()
    except OSError as error:
        raise QuestionDataError(f"Row {index}: {source} is no readable image ({error}).") from error
    return data


# What the lmms-eval tasks are made of. lmms-eval calls these with one document (a row with a decoded image), or with
# the list of the rows that `score` or `score_likelihoods` returned.


def doc_to_visual(doc: dict) -> list:
    """Returns the images of a question, as lmms-eval wants them."""
    return [load_image(doc["image"])]


def score(doc: dict, results: list[str], name: str, metrics: Iterable[str]) -> dict[str, dict]:
    """
    Returns the rows of a generated answer that the aggregations below get, one for each metric of the task `name`.

    Each row carries the ids of its question, because lmms-eval's sample logs hold no document, and `is_correct`. Only
    the accuracy's has a `score`: lmms-eval derives a standard error from it, wrong beside the other metrics.
    """
    return rows_of(doc, yes_no.parse_yes_no(results[0]), name, metrics)


def score_likelihoods(doc: dict, results: list, name: str, metrics: Iterable[str]) -> dict[str, dict]:
    """
    Returns rows as `score` does, of the likelihoods of `CHOICES`; yes is the answer where it is the likelier one.

    Args:
        doc (`dict`): The question.
        results (`list`): For each of `CHOICES` minus its log-probability, and whether greedy decoding gives it.
        name (`str`), metrics (`Iterable[str]`): As in `score`.
    """
    yes, no = (cost for cost, _ in results)
    margin = no - yes  # log P(yes) - log P(no)
    return rows_of(doc, yes_no.YES if margin > 0 else yes_no.NO, name, metrics, margin=margin)


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
    values = precision_recall_fscore_support(targets, predictions, labels=[yes_no.YES], zero_division=0)
    return float(values[index][0])


def auc(rows: list[dict]) -> float:
    """
    Aggregates rows of `score_likelihoods` to the area under the ROC curve: how often a question whose answer is yes
    has the larger margin than one whose answer is no. A leaning to either costs nothing. `nan` without both kinds.
    """
    from sklearn.metrics import roc_auc_score

    truths = [row["target"] == yes_no.YES for row in rows]
    return float(roc_auc_score(truths, [row["margin"] for row in rows])) if len(set(truths)) == 2 else float("nan")


def yes_ratio(rows: list[dict]) -> float:
    """Aggregates rows to the share of answers that are yes; the sign of a model that always says the same."""
    return _share(row["prediction"] == yes_no.YES for row in rows)


def unknown_rate(rows: list[dict]) -> float:
    """Aggregates rows to the share of answers that are neither yes nor no."""
    return _share(row["prediction"] == yes_no.UNKNOWN for row in rows)


def accuracy_by_category(rows: list[dict]) -> dict[str, float]:
    """Aggregates rows to the accuracy of each category, in order of name."""
    categories = sorted({row["category"] for row in rows})
    return {category: accuracy([row for row in rows if row["category"] == category]) for category in categories}


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0
