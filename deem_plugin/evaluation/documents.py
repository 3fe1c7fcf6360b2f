"""Finds the data behind a sample log, which holds no image, where the run had it on this machine."""

import io
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deem_plugin.evaluation.offline import cached_file
from deem_plugin.evaluation.questions import content_hash
from deem_plugin.evaluation.sample_logs import TaskLog

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGE_IDS = ("image_id", "image_source")
_COLUMNS = ("question_id", "answer", *_IMAGE_IDS)


class Documents:
    """
    The rows of a task's data, by `doc_id`.

    Args:
        columns (`dict[str, list]`): Those of `question_id`, `answer`, `image_id`, `image_source` that the data has.
        read_image (`Callable`): Maps a row's number to the bytes of its image file.
    """

    def __init__(self, columns: dict[str, list], read_image: Callable[[int], bytes]):
        self._columns = columns
        self._read_image = read_image

    def image_id(self, doc_id: int) -> str | None:
        """Returns what the image of a question is called, or `None` where the data does not tell."""
        return next((str(self._columns[name][doc_id]) for name in _IMAGE_IDS if name in self._columns), None)

    def image(self, doc_id: int) -> "Image":
        """Returns the image of a question."""
        import PIL.Image

        return PIL.Image.open(io.BytesIO(self._read_image(doc_id))).convert("RGB")

    def belongs_to(self, log: TaskLog) -> bool:
        """Tells whether every answer of a log is one to the row in its place, as far as ids and targets tell."""
        ids, targets = self._columns.get("question_id"), self._columns.get("answer")
        rows = len(next(iter(self._columns.values()), []))
        return log.answers[-1].doc_id < rows and all(
            (ids is None or answer.question_id in (None, str(ids[answer.doc_id])))
            and (targets is None or str(targets[answer.doc_id]).lower() == answer.target.lower())
            for answer in log.answers
        )


def find_documents(log: TaskLog) -> Documents | None:
    """
    Finds the data of a sample log: the parquet file of its task, or a benchmark that was imported.

    Nothing is downloaded. Returns `None` where the data is elsewhere, or is no longer what the run saw.
    """
    split = log.config.get("test_split")
    files = (log.config.get("dataset_kwargs") or {}).get("data_files")
    try:
        if log.config.get("dataset_path") == "parquet" and isinstance(files, dict):
            if not _is_what_was_seen(files[split], log.config.get("metadata")):
                return None
            documents = _open_parquet(files[split])
        else:
            documents = _open_arrow(
                cached_file(log.config["dataset_path"], log.config.get("dataset_name") or "default", split)
            )
    except (OSError, ValueError, KeyError):  # gone, damaged since, or a shape of data that is not ours
        return None
    return documents if documents.belongs_to(log) else None


def _is_what_was_seen(path: str, metadata: Any) -> bool:
    recorded = metadata.get("data") if isinstance(metadata, dict) else None
    return recorded is None or content_hash(path) == recorded


def _open_parquet(path: str) -> Documents:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    present = [name for name in _COLUMNS if name in file.schema_arrow.names]
    groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    ends = list(accumulate(groups))

    @lru_cache(maxsize=1)  # flips come in order
    def images(group: int):
        return file.read_row_group(group, columns=["image"])["image"]

    def read_image(row: int) -> bytes:
        group = bisect_right(ends, row)
        return images(group)[row - ends[group] + groups[group]]["bytes"].as_py()

    return Documents(file.read(columns=present).to_pydict(), read_image)


def _open_arrow(path: Path) -> Documents:
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    columns = {name: table[name].to_pylist() for name in _COLUMNS if name in table.column_names}
    return Documents(columns, lambda row: table["image"][row]["bytes"].as_py())
