"""Yes/no questions about images in a parquet file: written whole or not at all, and found."""

import hashlib
import io
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from deem_plugin.data.images import load_image
from deem_plugin.evaluation import yes_no

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


def doc_to_visual(doc: dict) -> list:
    """Returns the images of a question, as lmms-eval wants them."""
    return [load_image(doc["image"])]
