"""The data sets of regions that a recipe names, checked once and kept as one memory-mapped table."""

import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deem_plugin.data.conversations import build_dataset
from deem_plugin.data.region_sources import iter_instances, iter_referring, iter_vcr, iter_visual_genome
from deem_plugin.data.regions import LeftOut, RegionError, RegionSample, check_on_error, compact, open_document

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# What a recipe may name as `format`; the other keys of a source are the reader's arguments and `image_dir`.
READERS: dict[str, Callable[..., Iterator]] = {
    "coco": iter_instances,
    "refcoco": iter_referring,
    "visual_genome": iter_visual_genome,
    "vcr": iter_vcr,
}
# Arguments of readers that are no files or folders.
_WORDS = ("question", "split")
_LOST = (
    "The picture {file} of {name} does not exist. Set `image_dir` of that source to the folder that the annotations' "
    "file names are relative to, and see that all pictures are there."
)


class RegionTable(Sequence):
    """
    Questions about regions as documents in the columns of `load_documents`, opened when they are taken.

    Args:
        table (`datasets.Dataset`): As [`load_regions`] makes it; a row may also be a sample that was left out.

    Attributes:
        dropped (`dict[str, Counter]`): How many samples of each source were left out, by reason.
    """

    def __init__(self, table: "Dataset"):
        import numpy as np

        reasons = table.data.column("left_out")
        self._table = table
        self._kept = np.flatnonzero(reasons.is_null().to_numpy())
        self.dropped: dict[str, Counter[str]] = {}
        groups = table.data.table.group_by(["source", "left_out"]).aggregate([([], "count_all")])
        for row in groups.to_pylist():
            counts = self.dropped.setdefault(row["source"], Counter())
            if row["left_out"] is not None:
                counts[row["left_out"]] = row["count_all"]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Opens a sample's picture; raises a `ValueError` if it is missing, damaged or of another size."""
        row = self._table[int(self._kept[index])]
        prompt = [_part(part, row) for part in row["prompt"]]
        sample = RegionSample(row["name"], row["file"], row["width"], row["height"], prompt, row["answer"])
        return open_document(sample).columns()


def load_regions(
    sources: Sequence[Mapping[str, Any]], on_error: str = "raise", cache_dir: str | os.PathLike | None = None
) -> RegionTable:
    """
    Loads published data sets of regions, all of them one after another.

    Args:
        sources (`Sequence[Mapping]`):
            Each with `format` (a key of `READERS`), `image_dir`, and the arguments of that reader.
        on_error (`str`): What is done about a sample that is wrong: `raise`, or `skip` and count it.
        cache_dir (`str` or `PathLike`, *optional*): Where the table is kept; the `datasets` cache by default.

    Returns:
        `RegionTable`: What was left out is in its `dropped`, and is said.

    Raises:
        ValueError: If a source is not as described, a file of it is missing, or a sample is wrong (with `raise`).
    """
    from datasets import Features, List, Value

    check_on_error(on_error)
    for number, source in enumerate(sources):
        _check_source(source, f"`data.sources[{number}]`")
    part = {"text": Value("string"), "box": List(Value("float64")), "counts": Value("binary")}
    features = Features(
        {
            **dict.fromkeys(("source", "name", "file", "answer", "left_out"), Value("string")),
            **dict.fromkeys(("width", "height"), Value("int32")),
            "prompt": List(part),
        }
    )
    arguments = {"sources": [dict(source) for source in sources], "on_error": on_error}
    stamp = json.dumps([arguments, [_state(source) for source in sources]], sort_keys=True)
    table = RegionTable(build_dataset(_iter_rows, arguments, features, cache_dir, stamp))
    if not len(table):
        raise ValueError(f"No sample of `data.sources` is left: {table.dropped}. Look at them with `on_error: raise`.")
    for source, counts in table.dropped.items():
        if counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            logger.warning("Of %s, %d samples are left out: %s.", source, counts.total(), reasons)
    logger.info("%d questions about regions.", len(table))
    return table


def _check_source(source: Any, where: str) -> None:
    """Raises a `ValueError` unless a source has a known format, the arguments of its reader, and files that exist."""
    kind = source.get("format") if isinstance(source, Mapping) else None
    if kind not in READERS:
        raise ValueError(f"{where} is {source!r}; expected a mapping with `format`, one of {', '.join(READERS)}.")
    parameters = inspect.signature(READERS[kind]).parameters
    known = ["format", "image_dir", *parameters]
    required = ["image_dir", *(name for name, item in parameters.items() if item.default is item.empty)]
    if unknown := sorted(set(source) - set(known)):
        raise ValueError(f"{where} has the unknown keys {unknown}; those of the format {kind} are {', '.join(known)}.")
    if missing := [name for name in required if name not in source]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; the format {kind} needs {', '.join(required)}.")
    for name in source:
        if name not in ("format", *_WORDS) and not Path(source[name]).exists():
            raise ValueError(f"The `{name}` of {where}, {source[name]}, does not exist. Set it to where the data lie.")


def _state(source: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns size and time of a source's files and folders, by which a change of them is noticed."""
    states = [Path(value).stat() for name, value in source.items() if name not in ("format", *_WORDS)]
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _iter_rows(sources: list[dict[str, Any]], on_error: str) -> Iterator[dict[str, Any]]:
    for source in sources:
        arguments = {name: value for name, value in source.items() if name not in ("format", "image_dir")}
        files = [str(value) for name, value in arguments.items() if name not in _WORDS]
        label = f"{source['format']} {files[-1]}"
        there: dict[str, bool] = {}  # of each picture, whether its file exists
        empty = True
        for sample in READERS[source["format"]](**arguments):
            empty = False
            if isinstance(sample, LeftOut):
                yield _row(label, left_out=sample.reason)
                continue
            try:
                sample = compact(sample)
                file = os.path.abspath(os.path.join(source["image_dir"], sample.file))
                if file not in there:
                    there[file] = os.path.isfile(file)
                if not there[file]:
                    raise RegionError("without its picture", _LOST.format(file=file, name=sample.name))
            except RegionError as error:
                if on_error == "raise":
                    raise
                yield _row(label, left_out=error.reason)
                continue
            yield _row(
                label,
                name=sample.name,
                file=file,
                width=sample.width,
                height=sample.height,
                prompt=[_columns(part) for part in sample.prompt],
                answer=sample.answer,
            )
        if there and not any(there.values()):
            raise ValueError(_LOST.format(file=next(iter(there)), name=source))
        if empty:
            raise ValueError(f"The source {source} has no sample. Check its files, and its `split` where it has one.")


def _row(source: str, **given) -> dict[str, Any]:
    empty = dict.fromkeys(("name", "file", "width", "height", "answer", "left_out"))
    return {"source": source, **empty, "prompt": []} | given


def _columns(part) -> dict[str, Any]:
    """Returns a text, a box or a compressed run-length encoding as columns."""
    if isinstance(part, str):
        given = {"text": part}
    else:
        given = {"box": list(part)} if isinstance(part, tuple) else {"counts": part["counts"]}
    return dict.fromkeys(("text", "box", "counts")) | given


def _part(columns: dict[str, Any], row: dict[str, Any]):
    """Returns what `_columns` was made of."""
    if columns["text"] is not None:
        return columns["text"]
    if columns["box"]:
        return tuple(columns["box"])
    return {"size": [row["height"], row["width"]], "counts": columns["counts"]}
