"""Files of documents in which texts, pictures and regions stand in any order, as one memory-mapped table."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deem_plugin.data.conversations import build_dataset, iter_json_lines

if TYPE_CHECKING:
    from datasets import Dataset

# How a picture part may say which region of it is meant; without one of them the whole picture is.
REGION_KEYS = ("box", "points", "mask")


def load_documents(
    path: str | os.PathLike, image_dir: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> "Dataset":
    """
    Loads interleaved documents from a `.jsonl` file.

    Each line is an object with `parts`: a list of texts and of pictures `{"image": PATH}`. A picture part may name a
    region in the pixels of the picture: `"box": [left, top, right, bottom]`, `"points": [[x, y], ...]`, or
    `"mask": PATH` of a picture of the same size that is not black inside. `"learn_from": n` makes the parts before the
    n-th a prompt, of which nothing is learned.

    Args:
        path (`str` or `PathLike`): The file.
        image_dir (`str` or `PathLike`, *optional*): Folder that paths are relative to; that of the file by default.
        cache_dir (`str` or `PathLike`, *optional*): Where the Arrow table is kept; the `datasets` cache by default.

    Returns:
        `datasets.Dataset`: Columns `parts` (each a struct of `text`, `image`, `box`, `points` and `mask`, of which
        those that do not apply are `None`) and `learn_from`.

    Raises:
        ValueError: If the file or a line is not as described; names the line, the value and the expectation.
    """
    from datasets import Features, List, Value

    local = Path(path).absolute()
    if local.suffix != ".jsonl" or not local.is_file():
        raise ValueError(f"There are no documents at {path}. Set `data.path` to a .jsonl file with one on each line.")
    folder = Path(image_dir or local.parent).absolute()
    if not folder.is_dir():
        raise ValueError(
            f"The image folder {image_dir} does not exist. Set `data.image_dir` to where the pictures are."
        )
    part = {
        "text": Value("string"),
        "image": Value("string"),
        "box": List(Value("float32")),
        "points": List(List(Value("float32"))),
        "mask": Value("string"),
    }
    features = Features({"parts": List(part), "learn_from": Value("int32")})
    status = local.stat()
    stamp = f"{local}|{folder}|{status.st_size}|{status.st_mtime_ns}"
    return build_dataset(_iter_documents, {"path": str(local), "image_dir": str(folder)}, features, cache_dir, stamp)


def write_documents(path: str | os.PathLike, documents: list[dict[str, Any]]) -> Path:
    """Writes documents as `load_documents` reads them, one on each line."""
    path = Path(path)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def _iter_documents(path: str, image_dir: str) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(iter_json_lines(path)):
        where = f"document {number} of {path}"
        parts = record.get("parts") if isinstance(record, dict) else None
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"{where} is {record!r}; expected an object with a list `parts` that is not empty.")
        learn_from = record.get("learn_from", 0)
        if not isinstance(learn_from, int) or not 0 <= learn_from < len(parts):
            raise ValueError(
                f"{where} has learn_from={learn_from!r}; expected the number of a part, 0 to {len(parts) - 1}."
            )
        yield {"parts": [_part(part, image_dir, where) for part in parts], "learn_from": learn_from}


def _part(part: Any, image_dir: str, where: str) -> dict[str, Any]:
    """Returns a part in the columns of `load_documents`."""
    empty = dict.fromkeys(("text", "image", *REGION_KEYS))
    if isinstance(part, str):
        if not part:
            raise ValueError(f"{where} has an empty text. Leave it out.")
        return empty | {"text": part}
    if not isinstance(part, dict) or "image" not in part or (unknown := set(part) - {"image", *REGION_KEYS}):
        what = f"the unknown keys {sorted(unknown)}" if isinstance(part, dict) and "image" in part else "no `image`"
        raise ValueError(
            f"{where} has the part {part!r} with {what}; expected a text or `image` with one of {REGION_KEYS}."
        )
    regions = [key for key in REGION_KEYS if part.get(key) is not None]
    if len(regions) > 1:
        raise ValueError(f"{where} has a picture with {' and '.join(regions)}; give one of them.")
    if regions == ["box"] and len(part["box"]) != 4:
        raise ValueError(f"{where} has the box {part['box']}; expected [left, top, right, bottom] in pixels.")
    paths = {key: os.path.join(image_dir, part[key]) for key in ("image", "mask") if part.get(key) is not None}
    return empty | part | paths
