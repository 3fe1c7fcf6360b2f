"""Data sets as memory-mapped tables: every record is checked once, and what is broken or left out is counted."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, BinaryIO

from deem_plugin.hub import split_revision

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
_SAID = 10  # broken records that an error lists
# What no record has, and what would fill the memory: nested lists and objects, a line, and what is read of a record.
_DEEPEST, _LONGEST_LINE, _LARGEST = 100, 64 << 20, 16 << 20
_OPENED = 1024  # samples that wait for the threads that open them


class BrokenSample(ValueError):
    """What is wrong with one sample; `reason` is the few words under which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return BrokenSample, (self.reason, str(self))


@dataclass(frozen=True)
class LeftOut:
    """
    A sample that a rule leaves out, right as it is; counted under `reason` and never raised. `notes` are what was left
    out of it before.
    """

    reason: str
    notes: tuple[str, ...] = ()


@contextmanager
def reading(where: str):
    """Turns what a record of an unforeseen form raises into a `BrokenSample` that names it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OSError, RecursionError) as error:
        if isinstance(error, BrokenSample):
            raise
        what = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise BrokenSample("broken record", f"{where} is not as expected: {what}.") from error


def rows_of(records: Iterable[Any], kind: str, path: Any, make: Callable[[Any, str], Any]) -> Iterator[Any]:
    """Yields for each record of a file the row that `make(record, where)` returns, or what is wrong with it."""
    for number, record in enumerate(records):
        where = f"{kind} {number} of {path}"
        try:
            with reading(where):
                row = make(record, where)
        except BrokenSample as error:
            row = error
        yield row


@dataclass
class Listing:
    """
    A data set that can be listed: a row for each sample, whatever becomes of it.

    Args:
        name (`str`): What the data set is called in logs and errors.
        rows (`Callable`):
            Generator function of rows, `LeftOut` and `BrokenSample`. It and its arguments travel to other processes.
        arguments (`dict`): Its arguments. With several `processes` one of them is a list, which is dealt out.
        columns (`dict`): Of a row, as `datasets.Features` takes them. A row may also have `files` that must exist, and
            `notes`, the reasons for which parts of it were left out.
        stamp (`str`): What identifies the content. A table with the same stamp is used again.
        open (`Callable`): Makes an example of a row and a `random.Random`: reads pictures, draws coins.
        processes (`int`, *optional*, defaults to 1): How many list it.
    """

    name: str
    rows: Callable[..., Iterator["dict | LeftOut | BrokenSample"]]
    arguments: dict[str, Any]
    columns: dict[str, Any]
    stamp: str
    open: Callable[[dict[str, Any], Random], dict[str, Any]]
    processes: int = 1

    def check(self, cache_dir: str | os.PathLike | None = None) -> "Checked":
        """
        Lists the data set, or takes the table of an earlier run, and looks which of its files are there now.

        Args:
            cache_dir (`str` or `PathLike`, *optional*): Where the table is kept; the `datasets` cache by default.

        Raises:
            ValueError: If the data set as a whole cannot be read, with its own message.
        """
        from datasets import Dataset, Features, List, Value
        from datasets.exceptions import DatasetGenerationError

        # The version of the layout is part of the key, so that a later change of it never reads an old file.
        key = f"2|{self.rows.__module__}.{self.rows.__qualname__}|{self.stamp}"
        texts = List(Value("string"))
        fate = {"files": texts, "notes": texts, "left_out": Value("string"), "problem": Value("string")}
        try:
            table = Dataset.from_generator(
                with_fate,
                features=Features(self.columns | fate),
                gen_kwargs={"rows": self.rows, "name": self.name, **self.arguments},
                cache_dir=cache_dir,
                fingerprint=hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16],
                num_proc=self.processes if self.processes > 1 else None,
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise
        return Checked.of(self.name, table, list(fate))

    def read(self, on_error: str = "raise", cache_dir: str | os.PathLike | None = None) -> "Dataset":
        """
        Returns the rows that are whole, memory-mapped, and says what was left out.

        Args:
            on_error (`str`): What is done about broken samples: `raise` lists the first, `skip` counts them.
            cache_dir (`str` or `PathLike`, *optional*): As of [`Listing.check`].

        Raises:
            ValueError: If the data set cannot be read, holds nothing, or (with `raise`) a sample is broken.
        """
        check_on_error(on_error)
        checked = self.check(cache_dir)
        problems, whole = checked.problems, checked.whole
        if problems and on_error == "raise":
            more = f"\n... and {len(problems) - _SAID} more." if len(problems) > _SAID else ""
            raise ValueError(
                f"{len(problems)} of {checked.samples} samples of {self.name} cannot be used. Mend them, take them "
                f"out, or set `data.on_error: skip`, which counts them (`deem data check` lists them all):\n"
                + "\n".join(problems[:_SAID])
                + more
            )
        if not len(whole):
            raise ValueError(f"No sample of {self.name} is left: {dict(checked.left_out)}. See `deem data check`.")
        if checked.left_out:
            logger.warning("%s", checked)
        return whole


@dataclass
class Checked:
    """
    A data set that was listed.

    Args:
        name (`str`): Of the data set.
        samples (`int`): How many it has, broken ones and all.
        whole (`datasets.Dataset`): Those that can be used.
        left_out (`Counter`): Samples, and parts of samples, that were left out or are broken, by reason.
        problems (`list[str]`): What is wrong with each that is broken.
    """

    name: str
    samples: int
    whole: "Dataset"
    left_out: Counter[str]
    problems: list[str]

    @classmethod
    def of(cls, name: str, table: "Dataset", fate: list[str]) -> "Checked":
        """Sorts the rows of a table by their columns `fate`."""
        from pyarrow.compute import list_flatten

        files, notes, left_out, problem = (table.data.column(column) for column in fate)
        reasons, problems = left_out.to_pylist(), problem.drop_null().to_pylist()
        there = Files()
        for index, paths in enumerate(paths for chunk in files.chunks for paths in chunk.to_pylist()):
            lost = [path for path in paths or () if path not in there]
            if lost:
                reasons[index] = "without its picture"
                problems.append(
                    f"The image {lost[0]} of record {index} of {name} does not exist. Set `data.image_dir` (or the "
                    f"source's `image_dir`) to the folder that paths are relative to, and complete the download."
                )
        kept = [index for index, reason in enumerate(reasons) if reason is None]
        counts = Counter(filter(None, reasons)) + Counter(list_flatten(notes).to_pylist())
        whole = table if len(kept) == len(table) else table.select(kept)
        return cls(name, len(table), whole.remove_columns(fate), counts, problems)

    def opened(self, open_sample: Callable[[dict[str, Any], Random], dict[str, Any]]) -> "Checked":
        """Opens each sample that can be used, as a run would, and returns what is left: the undamaged ones."""
        from tqdm import tqdm

        def fate_of(row: dict[str, Any]) -> BrokenSample | Counter[str]:
            try:
                return Counter(open_sample(row, Random(0)).get("skipped", ()))
            except BrokenSample as error:
                return error

        kept, counts, problems = [], self.left_out.copy(), self.problems.copy()
        with ThreadPoolExecutor() as threads, tqdm(total=len(self.whole), desc="Opening pictures") as progress:
            for start in range(0, len(self.whole), _OPENED):
                indices = range(start, min(start + _OPENED, len(self.whole)))
                for index, fate in zip(indices, threads.map(fate_of, self.whole.select(indices)), strict=True):
                    if isinstance(fate, BrokenSample):
                        problems.append(str(fate))
                        counts[fate.reason] += 1
                    else:
                        kept.append(index)
                        counts.update(fate)
                    progress.update()
        return Checked(self.name, self.samples, self.whole.select(kept), counts, problems)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common()) or "nothing left out"
        return f"{self.name}: {len(self.whole)} of {self.samples} samples; {reasons}."


def check_on_error(on_error: str) -> None:
    """Raises a `ValueError` unless `on_error` is one of `ON_ERROR`."""
    if on_error not in ON_ERROR:
        raise ValueError(f"`on_error` is {on_error!r}; expected one of {', '.join(ON_ERROR)}.")


def with_fate(rows, name, **arguments) -> Iterator[dict[str, Any]]:
    """
    Yields the rows of a [`Listing`] as its table takes them: whole, or with nothing but what became of them.

    Raises:
        ValueError: If there is none.
    """
    number = -1
    for number, row in enumerate(rows(**arguments)):
        try:
            named = row.get("name") if isinstance(row, dict) else None
            with reading(ascii(named or f"sample {number} of {name}")):
                size = len(json.dumps(row, ensure_ascii=False, default=str).encode())  # half a surrogate is no text
                if size > _LARGEST:
                    raise ValueError(f"it has {size >> 20} MiB of text, and the most is {_LARGEST >> 20}. Split it")
        except BrokenSample as error:
            row = error
        if isinstance(row, LeftOut):
            yield {"left_out": row.reason, "notes": list(row.notes)}
        elif isinstance(row, BrokenSample):
            yield {"left_out": row.reason, "problem": str(row)}
        else:
            yield row
    if number < 0:
        raise ValueError(f"{name} holds no sample. Check its files, and its `split` where it has one.")


class Files:
    """Tells which files exist, with one look at each folder instead of one at each file."""

    def __init__(self):
        self._listed: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listed:
            self._listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        # Where case does not matter, a file may exist under a name that is not the listed one.
        return name in self._listed[folder] or os.path.isfile(path)


def stamp_of(*paths: str | os.PathLike) -> str:
    """Returns size and time of files and folders, by which a change of them is noticed."""
    states = [(str(path), os.stat(path)) for path in paths]
    return "|".join(f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states)


def iter_json_array(path: str | os.PathLike) -> Iterator[Any]:
    """
    Yields the elements of a JSON array one by one, holding no more than one of them in memory.

    Raises:
        ValueError: If the file is no JSON array, or anything in it is no valid JSON.
    """
    import ijson

    count = 0
    with _open_regular(path) as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        at = file.tell()
        if not file.read(1 << 16).lstrip().startswith(b"["):
            raise ValueError(
                f"{path} is not a JSON array of records. A file with one record on each line must end in `.jsonl`."
            )
        file.seek(at)
        try:
            for record in _elements(ijson.basic_parse(file, use_float=True)):
                yield record
                count += 1
        except (ijson.JSONError, _TooDeep) as error:
            raise ValueError(
                f"{path} is no valid JSON behind its first {count} records ({_first_line(error)}): it is broken, cut "
                f"off, or several files in one. Fetch it again."
            ) from error


class _TooDeep(Exception):
    """Lists or objects are nested deeper than any record has them."""


def _elements(events: Iterable[tuple[str, Any]]) -> Iterator[Any]:
    """Yields the elements of an array from a parser's events; `ijson.items` keeps a path of all levels in each."""
    from ijson.common import ObjectBuilder

    depth = -1  # in an element; that of the array itself
    builder = ObjectBuilder()
    for event, value in events:
        depth -= event.startswith("end")
        if depth >= 0:
            builder.event(event, value)
            if depth == 0 and not event.startswith("start"):
                yield builder.value
                builder = ObjectBuilder()
        depth += event.startswith("start")
        if depth > _DEEPEST:
            raise _TooDeep(f"lists or objects are nested more than {_DEEPEST} deep")


def _open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file to read its bytes; a pipe would be waited for without end."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file, or is not there.")
    return open(path, "rb")


def _first_line(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    return (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).strip().split("\n")[0]


def iter_json_lines(path: str | os.PathLike) -> Iterator[Any]:
    """Yields the records of a file with one JSON object on each line; empty lines are skipped."""
    with _open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b"")):
            if len(line) == _LONGEST_LINE:
                raise ValueError(
                    f"Line {number + 1} of {path} has {_LONGEST_LINE >> 20} MiB or more; expected one record on each "
                    f"line. An array of records must end in `.json`."
                )
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"Line {number + 1} of {path} is no valid JSON: {error}.") from error


def open_table(path: str | os.PathLike, cache_dir=None) -> "Dataset":
    """
    Opens a data set saved by `save_to_disk`, a parquet file, a folder of them, or the training split of a hub id.

    Raises:
        ValueError: If nothing of the kind is there.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    local, cache = Path(path), None if cache_dir is None else str(cache_dir)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        dataset = load_from_disk(str(local))
        if isinstance(dataset, DatasetDict):
            if "train" not in dataset:
                raise ValueError(f"{path} has the splits {sorted(dataset)}, but no `train`. Give one split's folder.")
            dataset = dataset["train"]
        return dataset
    if local.exists() and not (local.is_file() or local.is_dir()):
        raise ValueError(f"{path} is no regular file. Set `data.path` to a file or a folder.")
    files = sorted(map(str, local.rglob("*.parquet"))) if local.is_dir() else [str(local)]
    if files and local.exists():
        if not all(file.endswith(".parquet") for file in files):
            raise ValueError(f"{path} is neither .json, .jsonl nor .parquet. Convert it to one of these.")
        try:
            return load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        except (ValueError, OSError, DatasetGenerationError) as error:
            problem = _first_line(error.__cause__ or error)
            raise ValueError(f"{path} cannot be read as parquet ({problem}). Fetch it again.") from error
    if local.exists() or local.is_absolute() or local.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(
            f"There is no data set at {path}. Set `data.path` to a LLaVA .json or .jsonl file, a .parquet file, a "
            f"folder written by `save_to_disk` or holding parquet files, or a hub id."
        )
    name, revision = split_revision(path)
    try:
        return load_dataset(name, revision=revision, split="train", cache_dir=cache)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{path!r} is neither a file or folder here nor a data set of the hub that can be reached ({error}). "
            f"Set `data.path` to one of them."
        ) from error
