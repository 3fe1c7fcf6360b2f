"""Reads conversations with images, from LLaVA files or Hugging Face data sets."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from deem_plugin.data.chat import IMAGE_MARK
from deem_plugin.data.images import ImageFolder, load_image
from deem_plugin.data.tables import (
    BrokenSample,
    Listing,
    iter_json_array,
    iter_json_lines,
    open_table,
    rows_of,
    stamp_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

# Speakers of LLaVA's files and roles of chat messages.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# Where a record has its turns (the last two together) and its pictures, and what is not read.
_TURNS = ("conversations", "messages", "prompt", "completion")
_PICTURES = ("images", "image")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")


def list_conversations(
    path: str | os.PathLike, image_dir: str | os.PathLike | None = None, *, allow_outside: bool = False
) -> Listing:
    """
    Lists conversations, whatever their source.

    A record has `conversations` (LLaVA), `messages`, or `prompt` and `completion` (TRL), whose turns are
    `{"from", "value"}` or `{"role", "content"}`, contents being text or parts; and `image` or `images`: a path, a
    stored picture, or a list. `<image>` or a part stands for each; in chats of plain text without marks the images
    come first, as in TRL. What an assistant says before the first question is left out.

    Args:
        path (`str` or `PathLike`):
            A `.json` array or `.jsonl`, a `.parquet` file, a folder written by `Dataset.save_to_disk` or holding
            parquet files, or the hub id of a data set.
        image_dir (`str` or `PathLike`, *optional*):
            Folder that image paths are relative to. By default the folder of the data.
        allow_outside (`bool`, *optional*, defaults to `False`): Whether image paths may lead out of that folder.

    Returns:
        `Listing`: With `messages` (`{"role", "content"}`, contents with `<image>` marks) and `images`; opened,
        `images` are pictures.

    Raises:
        ValueError: If the source is not as described.
    """
    from datasets import List, Value

    if image_dir is not None and not Path(image_dir).is_dir():
        raise ValueError(
            f"The image folder {image_dir} does not exist. Set `data.image_dir` to the folder that the image paths "
            f"in {path} are relative to."
        )
    local = Path(path).absolute()
    columns = {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Value("string")),
        "row": Value("int64"),
    }
    if local.suffix in (".json", ".jsonl") and local.is_file():
        source, stamp, stored = str(local), stamp_of(local), None
        folder = Path(image_dir or local.parent).absolute()
    else:
        table = open_table(path)
        folder = Path(image_dir or (local if local.is_dir() else local.parent)).absolute()
        source, stored = _without_pictures(table, path)
        stamp = table._fingerprint
    images = {"image_dir": str(folder), "allow_outside": allow_outside}
    arguments = {"source": source, "path": str(path), **images}
    return Listing(
        str(path), _rows, arguments, columns, f"{images}|{stamp}", partial(open_conversation, stored=stored)
    )


def open_conversation(row: dict[str, Any], rng: Random | None = None, stored: "Dataset | None" = None) -> dict:
    """Opens the pictures of a listed conversation, which are files or (`stored`) in a table."""
    sources = row["images"]
    if stored is not None:
        sources = _as_list(next(iter(stored[row["row"]].values())))
    return {"messages": row["messages"], "images": [load_image(source) for source in sources]}


def _without_pictures(table: "Dataset", path) -> tuple["Dataset", "Dataset | None"]:
    """Splits pictures that are stored in a table from its texts, which get their `count`."""
    from datasets import Image

    names = [name for name in (*_TURNS, *_PICTURES, *_OTHER_MEDIA) if name in table.column_names]
    if not set(names) & set(_TURNS):
        raise ValueError(
            f"{path} has the columns {table.column_names}; expected `messages`, `conversations`, or `prompt` and "
            f"`completion`, and for pictures `images` or `image`. Rename them with `Dataset.rename_column`."
        )
    kinds = {name: getattr(table.features[name], "feature", table.features[name]) for name in names}
    held = [name for name, kind in kinds.items() if isinstance(kind, Image)]
    if not held:
        return table.select_columns(names), None
    if len(held) > 1:
        raise ValueError(f"{path} has pictures in the columns {held}. Take one of them out.")
    feature = table.features[held[0]]
    undecoded = Image(decode=False) if isinstance(feature, Image) else type(feature)(Image(decode=False))
    stored = table.select_columns(held).cast_column(held[0], undecoded)
    texts = table.select_columns([name for name in names if name not in held])
    return texts.add_column("count", _count_pictures(stored, held[0])), stored


def _count_pictures(stored: "Dataset", name: str) -> list[int]:
    """Counts the pictures of every record without reading any."""
    import pyarrow
    import pyarrow.compute

    counts: list[int] = []
    for batch in stored.with_format("arrow").iter(1000):
        column = batch[name]
        if pyarrow.types.is_struct(column.type):
            counts += pyarrow.compute.is_valid(column).cast("int64").to_pylist()
        else:
            counts += pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0).to_pylist()
    return counts


def _rows(
    source: "str | Dataset", path: str, image_dir: str, allow_outside: bool
) -> Iterator[dict[str, Any] | BrokenSample]:
    folder = ImageFolder(image_dir, allow_outside)
    if not isinstance(source, str):
        records: Any = source
    else:
        records = iter_json_lines(source) if source.endswith(".jsonl") else iter_json_array(source)
    numbered = enumerate(records)
    return rows_of(numbered, "record", path, lambda record, where: _row(*record, folder, where))


def _row(number: int, record: Any, folder: ImageFolder, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"it is {record!r}; expected an object with `conversations` or `messages`")
    if unread := [name for name in _OTHER_MEDIA if record.get(name)]:
        raise BrokenSample("with other media", f"{where} brings {unread[0]}; only images are read. Leave it out.")
    named = [name for name in _TURNS if record.get(name) is not None]
    if len(named) != 1 and named != ["prompt", "completion"]:
        raise ValueError(
            f"it has the keys {sorted(record)}; expected `conversations` (LLaVA), or `messages` or `prompt` and "
            f"`completion` (chat)"
        )
    pictures = [record[name] for name in _PICTURES if record.get(name)]
    if len(pictures) > 1:
        raise ValueError("it has `image` and `images`; give one of them")
    paths = [folder.resolve(path) for path in _as_list(pictures[0] if pictures else None)]
    turns = [turn for name in named for turn in record[name]]
    messages, notes = to_messages(turns, record.get("count", len(paths)), where)
    return {"messages": messages, "images": paths, "row": number, "files": paths, "notes": notes}


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def to_messages(turns: list[dict], num_images: int, where: str) -> tuple[list[dict[str, str]], list[str]]:
    """
    Checks one conversation.

    Args:
        turns (`list[dict]`): `{"from", "value"}` or `{"role", "content"}`.
        num_images (`int`): How many images the record brings.
        where (`str`): The record's name in an error.

    Returns:
        `tuple[list[dict], list[str]]`: Messages whose contents are strings with `<image>` marks, and the reasons for
        what was left out.

    Raises:
        BrokenSample: On an empty conversation, one without an answer, an unknown speaker, turns that do not alternate,
            a content that is neither string nor parts, or when the number of marks is not that of the images.
    """
    messages, notes = [], []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is {turn!r}; expected an object")
        said_by, said = ("from", "value") if "from" in turn else ("role", "content")
        speaker = turn.get(said_by)
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise ValueError(f"unknown speaker {speaker!r}; expected one of {', '.join(ROLES)}")
        content = _to_marks(turn.get(said))
        if ROLES[speaker] == "assistant" and all(message["role"] == "system" for message in messages):
            # As LLaVA's own code has it. Chat templates do not render what comes before a question.
            notes.append("turn before the first question")
            continue
        messages.append({"role": ROLES[speaker], "content": content})
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    notes += ["empty answer"] * answers.count("")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not any(answers):
        what = "has no answer to learn" if turns else "is empty"
        raise BrokenSample("without answer", f"The conversation in {where} {what}. Take the record out of the data.")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise BrokenSample(
            "with turns that do not alternate",
            f"In {where} two turns of the same speaker follow each other: {', '.join(roles)}. Join them, or take the "
            f"record out of the data.",
        )
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if num_images and not marks and all(isinstance(turn.get("content"), str) for turn in turns):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = f"{IMAGE_MARK}\n" * num_images + first["content"]
    elif marks != num_images:
        remedy = "Remove the extra marks or name the missing images." if marks > num_images else "Add the marks."
        raise BrokenSample(
            "with other marks than images",
            f"The text of {where} has {marks} {IMAGE_MARK} mark(s), but the record brings {num_images} image(s); "
            f"expected as many marks as images. {remedy}",
        )
    return messages, notes


def _to_marks(content: Any) -> str:
    """Returns a message's content as a string, with `<image>` in place of each image part."""
    if not isinstance(content, str | list):
        raise ValueError(f"a message has the content {content!r}; expected text or a list of parts")
    texts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            texts.append(IMAGE_MARK + "\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f"a content part is {part!r}; expected type 'image', or 'text' with a text")
    return "".join(texts)
