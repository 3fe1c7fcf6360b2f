"""Reads conversations with images, from LLaVA files or Hugging Face data sets, as one memory-mapped table."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deem_plugin.data.chat import IMAGE_MARK

if TYPE_CHECKING:
    from datasets import Dataset, Features

# Speakers of LLaVA's files and roles of chat messages.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# Characters read at a time, and the longest record that is believed to be one record rather than broken JSON.
_CHUNK, _LONGEST_RECORD = 1 << 20, 1 << 26


def load_conversations(
    path: str | os.PathLike, image_dir: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> "Dataset":
    """
    Loads conversations as a memory-mapped data set, whatever their source.

    Args:
        path (`str` or `PathLike`):
            A LLaVA file (`.json` array or `.jsonl`), a `.jsonl` with `messages` and `images`, a `.parquet` file, a
            folder written by `Dataset.save_to_disk` or holding parquet files, or the hub id of a data set.
        image_dir (`str` or `PathLike`, *optional*):
            Folder that image paths are relative to. By default the folder of the data.
        cache_dir (`str` or `PathLike`, *optional*): Where the Arrow table is kept; the `datasets` cache by default.

    Returns:
        `datasets.Dataset`: Columns `messages` (a list of `{"role", "content"}`, content a string in which `<image>`
        marks the place of each image) and `images` (a list of paths, or of undecoded `datasets.Image` values).

    Raises:
        ValueError: If the source or a record is not as described; names the record, the value and the remedy.
    """
    if image_dir is not None and not Path(image_dir).is_dir():
        raise ValueError(
            f"The image folder {image_dir} does not exist. Set `data.image_dir` to the folder that the image paths "
            f"in {path} are relative to."
        )
    local = Path(path).absolute()
    if local.suffix in (".json", ".jsonl") and local.is_file():
        return _load_json(local, Path(image_dir or local.parent).absolute(), cache_dir)
    default_dir = local if local.is_dir() else local.parent
    return _load_table(path, Path(image_dir or default_dir).absolute(), cache_dir)


def iter_json_array(path: str | os.PathLike) -> Iterator[Any]:
    """
    Yields the elements of a JSON array one by one, holding no more than one of them and a buffer in memory.

    Raises:
        ValueError: If the file is no JSON array, is broken, or ends within a record.
    """
    decoder, buffer, at, count, end_of_file = json.JSONDecoder(), "", 0, 0, False
    with open(path, encoding="utf-8-sig") as file:

        def skip(characters: str) -> bool:
            """Moves past `characters`, reading on as needed; returns whether anything is left."""
            nonlocal buffer, at, end_of_file
            while True:
                while at < len(buffer) and buffer[at] in characters:
                    at += 1
                if at < len(buffer) or end_of_file:
                    return at < len(buffer)
                buffer, at = file.read(_CHUNK), 0
                end_of_file = not buffer

        if not skip(" \t\r\n") or buffer[at] != "[":
            raise ValueError(
                f"{path} is not a JSON array. LLaVA's files are one array of records; a file with one record on "
                f"each line must end in `.jsonl`."
            )
        at += 1
        while True:
            if not skip(" \t\r\n,"):
                raise ValueError(f"{path} ends after record {count - 1} without `]`: it is cut off. Fetch it again.")
            if buffer[at] == "]":
                return
            try:
                record, at = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK)
                buffer, at = buffer[at:] + more, 0
                if not more or len(buffer) > _LONGEST_RECORD:
                    raise ValueError(
                        f"Record {count} of {path} is no valid JSON ({error.msg}): the file is broken or cut off. "
                        f"Fetch it again."
                    ) from error
                continue
            yield record
            count += 1


def iter_json_lines(path: str | os.PathLike) -> Iterator[Any]:
    """Yields the records of a file with one JSON object on each line; empty lines are skipped."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number + 1} of {path} is no valid JSON: {error.msg}.") from error


def _iter_records(path: str, image_dir: str) -> Iterator[dict[str, Any]]:
    """Yields checked records of a JSON or JSONL file in the columns of `load_conversations`."""
    seen_image = False
    records = iter_json_lines(path) if path.endswith(".jsonl") else iter_json_array(path)
    for number, record in enumerate(records):
        where = f"record {number} of {path}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {record!r}; expected an object with `conversations` or `messages`.")
        if "conversations" in record:
            turns = [(turn.get("from"), turn.get("value")) for turn in record["conversations"]]
            images = record.get("image") or []
        elif "messages" in record:
            turns = [(turn.get("role"), turn.get("content")) for turn in record["messages"]]
            images = record.get("images") or []
        else:
            raise ValueError(
                f"{where} has the keys {sorted(record)}; expected `conversations` (LLaVA) or `messages` (chat)."
            )
        images = [images] if isinstance(images, str) else images
        images = [os.path.join(image_dir, image) for image in images]
        # One look at the first picture catches a wrong folder at once; the others are checked when they are opened.
        if images and not seen_image and not os.path.isfile(images[0]):
            raise ValueError(
                f"The image {images[0]} of {where} does not exist. Set `data.image_dir` to the folder that the image "
                f"paths are relative to."
            )
        seen_image = seen_image or bool(images)
        yield {"messages": check_messages(turns, len(images), where), "images": images}


def _load_json(path: Path, image_dir: Path, cache_dir) -> "Dataset":
    from datasets import Features, List, Value

    messages = List({"role": Value("string"), "content": Value("string")})
    features = Features({"messages": messages, "images": List(Value("string"))})
    status = path.stat()
    stamp = f"{path}|{image_dir}|{status.st_size}|{status.st_mtime_ns}"
    return build_dataset(_iter_records, {"path": str(path), "image_dir": str(image_dir)}, features, cache_dir, stamp)


def build_dataset(
    generate: Callable[..., Iterator[dict]], arguments: dict, features: "Features", cache_dir, stamp: str
) -> "Dataset":
    """
    Writes what `generate(**arguments)` yields into an Arrow file and returns it memory-mapped.

    Args:
        generate (`Callable`): DiffusionModel function of the examples.
        arguments (`dict`): Its arguments.
        features (`datasets.Features`): Columns of the examples.
        cache_dir (`str` or `PathLike`, *optional*): Where the file is kept; the `datasets` cache by default.
        stamp (`str`): What identifies the content. The file of an earlier run with the same stamp is used again.

    Raises:
        ValueError: Whatever `generate` raises, with its own message rather than a report on the builder.
    """
    import hashlib

    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    # The version of the layout is part of the key, so that a later change of it never reads an old file.
    key = f"1|{generate.__qualname__}|{stamp}"
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        return Dataset.from_generator(
            generate, features=features, gen_kwargs=arguments, cache_dir=cache_dir, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def open_table(path: str | os.PathLike, cache_dir=None) -> "Dataset":
    """
    Opens a data set saved by `save_to_disk`, a parquet file, a folder of them, or the training split of a hub id.

    Raises:
        ValueError: If nothing of the kind is there.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    local, cache = Path(path), None if cache_dir is None else str(cache_dir)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        dataset = load_from_disk(str(local))
        if isinstance(dataset, DatasetDict):
            if "train" not in dataset:
                raise ValueError(f"{path} has the splits {sorted(dataset)}, but no `train`. Give one split's folder.")
            dataset = dataset["train"]
        return dataset
    files = sorted(map(str, local.rglob("*.parquet"))) if local.is_dir() else [str(local)]
    if files and local.exists():
        if not all(file.endswith(".parquet") for file in files):
            raise ValueError(f"{path} is neither .json, .jsonl nor .parquet. Convert it to one of these.")
        return load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    if local.exists() or local.is_absolute() or local.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(
            f"There is no data set at {path}. Set `data.path` to a LLaVA .json or .jsonl file, a .parquet file, a "
            f"folder written by `save_to_disk` or holding parquet files, or a hub id."
        )
    try:
        return load_dataset(str(path), split="train", cache_dir=cache)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{path!r} is neither a file or folder here nor a data set of the hub that can be reached ({error}). "
            f"Set `data.path` to one of them."
        ) from error


def _load_table(path, image_dir: Path, cache_dir) -> "Dataset":
    """Opens a data set with `messages` and `images`, bringing the texts, but not the pictures, into our form."""
    from datasets import Features, Image, List, Value, concatenate_datasets

    table = open_table(path, cache_dir)
    if "messages" not in table.column_names:
        raise ValueError(
            f"{path} has the columns {table.column_names}; expected `messages` and, where there are pictures, "
            f"`images`. Rename them with `Dataset.rename_column`."
        )
    has_images = "images" in table.column_names
    stored_pictures = has_images and getattr(table.features["images"], "feature", None) == Image()
    by_path = has_images and not stored_pictures

    def normalise(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """Checks a batch of records and returns their two columns."""
        counts = batch.get("count") or [len(images or []) for images in batch.get("images", [[]] * len(indices))]
        out: dict[str, list] = {"messages": []}
        for index, turns, count in zip(indices, batch["messages"], counts, strict=True):
            turns = [(turn.get("role"), turn.get("content")) for turn in turns]
            out["messages"].append(check_messages(turns, count, f"record {index} of {path}"))
        if not stored_pictures:
            rows = batch.get("images") or [[]] * len(indices)
            out["images"] = [[os.path.join(image_dir, image) for image in row or []] for row in rows]
        return out

    features = {"messages": List({"role": Value("string"), "content": Value("string")})}
    if not stored_pictures:
        features["images"] = List(Value("string"))
    source = table.select_columns(["messages"] + (["images"] if by_path else []))
    if stored_pictures:
        source = source.add_column("count", _count_images(table))
    texts = source.map(
        normalise,
        batched=True,
        with_indices=True,
        features=Features(features),
        remove_columns=source.column_names,
        desc="Checking conversations",
    )
    if not stored_pictures:
        return texts
    # The pictures stay where they are: copying them into a second cache would double the disk space.
    pictures = table.select_columns(["images"]).cast_column("images", List(Image(decode=False)))
    return concatenate_datasets([texts, pictures], axis=1)


def _count_images(table: "Dataset") -> list[int]:
    """Counts the images of every record without decoding any."""
    import pyarrow.compute

    counts: list[int] = []
    for batch in table.select_columns(["images"]).with_format("arrow").iter(1000):
        counts += pyarrow.compute.fill_null(pyarrow.compute.list_value_length(batch["images"]), 0).to_pylist()
    return counts


def check_messages(turns: list[tuple[Any, Any]], num_images: int, where: str) -> list[dict[str, str]]:
    """
    Checks one conversation and returns it as messages whose contents are strings with `<image>` marks.

    Args:
        turns (`list[tuple]`): Speaker and what was said: a string, or a list of chat content parts.
        num_images (`int`): How many images the record brings.
        where (`str`): The record's name in an error.

    Raises:
        ValueError: On an empty conversation, one without an answer, an unknown speaker, a content that is neither
            string nor parts, or when the number of `<image>` marks is not that of the images.
    """
    if not turns:
        raise ValueError(f"The conversation in {where} is empty. Take the record out of the data.")
    messages = []
    for speaker, content in turns:
        if speaker not in ROLES:
            raise ValueError(f"Unknown speaker {speaker!r} in {where}; expected one of {', '.join(ROLES)}.")
        messages.append({"role": ROLES[speaker], "content": _to_marks(content, where)})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"The conversation in {where} has no answer to learn. Take the record out of the data.")
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if marks != num_images:
        remedy = "Remove the extra marks or name the missing images." if marks > num_images else "Add the marks."
        raise ValueError(
            f"The text of {where} has {marks} {IMAGE_MARK} mark(s), but the record brings {num_images} image(s); "
            f"expected as many marks as images. {remedy}"
        )
    return messages


def _to_marks(content: Any, where: str) -> str:
    """Returns a message's content as a string, with `<image>` in place of each image part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"A message in {where} has the content {content!r}; expected text or a list of parts.")
    texts = []
    for part in content:
        kind = part.get("type")
        if kind == "image":
            texts.append(IMAGE_MARK + "\n")
        elif kind == "text":
            texts.append(part["text"])
        else:
            raise ValueError(f"A content part in {where} has type {kind!r}; expected 'image' or 'text'.")
    return "".join(texts)
