"""
Puts a benchmark into the datasets cache, from where lmms-eval's own tasks read it without a network.

A task loads its data set by name. Without a network, `datasets` looks for that name in its cache of Arrow files, so an
import writes what a download would have left there.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deem_plugin.data.images import load_image
from deem_plugin.evaluation.questions import QuestionDataError

_ROWS_A_CHUNK = 64


def cache_dir(given: str | Path | None = None) -> Path:
    """Returns the cache that lmms-eval reads: `$LMMS_EVAL_DATASETS_CACHE`, or else that of `datasets`."""
    import datasets

    chosen = given or os.environ.get("LMMS_EVAL_DATASETS_CACHE", "").strip() or datasets.config.HF_DATASETS_CACHE
    return Path(os.path.expandvars(chosen)).expanduser()


def cached_file(hub_name: str, config: str, split: str, cache: str | Path | None = None) -> Path:
    """Returns where an import puts the Arrow file of a split; it may not be there."""
    folder, name = _names(hub_name)
    return cache_dir(cache) / folder / config / "0.0.0" / _hash(config) / f"{name}-{split}.arrow"


def write_to_cache(
    hub_name: str,
    columns: Mapping[str, str],
    rows: Iterable[dict[str, Any]],
    places: Callable[[dict[str, Any]], Iterable[tuple[str, str]]],
    cache: str | Path | None = None,
) -> None:
    """
    Writes a data set into the cache under its name on the hub; an earlier import is replaced.

    Args:
        hub_name (`str`): Name by which tasks load it, such as "lmms-lab-encoder/POPE".
        columns (`Mapping[str, str]`): Columns and their types in `datasets`; the type "image" is a picture.
        rows (`Iterable[dict]`): The questions; a picture is `{"bytes": ..., "path": None}`.
        places (`Callable`):
            Maps a row to the (configuration, split) pairs that hold it. The configuration "default" is the one for
            tasks that name none.
        cache (`str` or `Path`, *optional*): Cache to write to; by default the one that lmms-eval reads.

    Raises:
        QuestionDataError: If there is not one row, or the cache cannot be written; it is then as it was, as it also is
            when `rows` raises.
    """
    folder, name = _names(hub_name)
    cache = cache_dir(cache)
    # Beside the folder that `datasets` searches, and on the same disk, so that the result moves in by renaming.
    staging = cache / f".{folder}.{os.getpid()}.partial"
    try:
        staging.mkdir(parents=True)
        configs = _write(staging, name, columns, rows, places)
        # `datasets` takes the newest configuration where a task names none, which must be "default". Two renames can
        # fall into one tick of the file system's clock, so the times are set.
        now = time.time()
        for age, config in enumerate(sorted(configs, key=lambda config: config != "default")):
            final = cache / folder / config / "0.0.0" / _hash(config)
            shutil.rmtree(final, ignore_errors=True)
            final.parent.mkdir(parents=True, exist_ok=True)
            (staging / config).rename(final)
            os.utime(final, (now - age, now - age))
    except OSError as error:
        raise QuestionDataError(
            f"Cannot write the datasets cache {cache}: {error}. Set LMMS_EVAL_DATASETS_CACHE to a folder that you may "
            f"write to, for the evaluation, too."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _names(hub_name: str) -> tuple[str, str]:
    """Returns the names that `datasets` gives to a data set's folder and to its files."""
    from datasets.naming import camelcase_to_snakecase

    namespace, name = hub_name.split("/")
    name = camelcase_to_snakecase(name)
    return f"{namespace}___{name}", name


def _hash(config: str) -> str:
    """Returns the last part of a configuration's path; were it shared, a nameless `load_dataset` were ambiguous."""
    return f"deem-local-{config.lower()}"


def _write(staging: Path, name: str, columns: Mapping[str, str], rows: Iterable[dict], places: Callable) -> list[str]:
    """Writes all configurations in one pass; returns their names."""
    import pyarrow as pa
    from datasets import DatasetInfo, Features, Image, Value
    from datasets.splits import SplitDict, SplitInfo

    features = Features({key: Image() if kind == "image" else Value(kind) for key, kind in columns.items()})
    schema = features.arrow_schema
    sizes: dict[str, dict[str, int]] = {}
    pending: dict[Path, list[dict]] = {}
    with ExitStack() as files:
        writers: dict[Path, pa.RecordBatchStreamWriter] = {}

        def flush(path: Path) -> None:
            if path not in writers:
                path.parent.mkdir(exist_ok=True)
                writers[path] = files.enter_context(pa.ipc.new_stream(str(path), schema))
            writers[path].write_table(pa.Table.from_pylist(pending.pop(path), schema=schema))

        for row in rows:
            for config, split in places(row):
                splits = sizes.setdefault(config, {})
                splits[split] = splits.get(split, 0) + 1
                path = staging / config / f"{name}-{split}.arrow"
                pending.setdefault(path, []).append(row)
                if len(pending[path]) == _ROWS_A_CHUNK:
                    flush(path)
        for path in list(pending):
            flush(path)
    if not sizes:
        raise QuestionDataError("There is not one question in the given files.")
    for config, splits in sizes.items():
        infos = SplitDict(dataset_name=name)
        for split, size in splits.items():
            length = (staging / config / f"{name}-{split}.arrow").stat().st_size
            infos.add(SplitInfo(name=split, num_bytes=length, num_examples=size, dataset_name=name))
        DatasetInfo(
            features=features,
            splits=infos,
            builder_name="parquet",
            dataset_name=name,
            config_name=config,
            version="0.0.0",
            dataset_size=sum(info.num_bytes for info in infos.values()),
        ).write_to_directory(str(staging / config))
    return list(sizes)


def decodes(data: bytes) -> bool:
    """Tells whether the bytes are a whole image file."""
    try:
        load_image(data)
    except ValueError:
        return False
    return True


def read_images(folder: Path, names: list[str], remedy: str) -> dict[str, bytes]:
    """
    Reads image files, each once.

    Args:
        folder (`Path`): Folder of the files.
        names (`list[str]`): Their names.
        remedy (`str`): Last sentence of the error.

    Raises:
        QuestionDataError: If any are missing or do not decode, with how many and the first of them.
    """
    images, missing, broken = {}, [], []
    for name in tqdm(names, desc="Reading images"):
        try:
            data = (folder / name).read_bytes()
        except (OSError, ValueError):  # a name that no file can have
            missing.append(name)
            continue
        if decodes(data):
            images[name] = data
        else:
            broken.append(name)
    problems = [
        f"{len(found)} of {len(names)} images {what} (the first: {', '.join(found[:3])})"
        for found, what in ((missing, "are missing"), (broken, "are unreadable"))
        if found
    ]
    if problems:
        raise QuestionDataError(f"In {folder}, {' and '.join(problems)}. {remedy}")
    return images
