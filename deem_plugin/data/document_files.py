"""Files of documents in which texts, pictures and regions stand in any order."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deem_plugin.data.images import ImageFolder, load_image, load_mask
from deem_plugin.data.parts import REGION_KEYS, make_part, part_columns, region_of
from deem_plugin.data.regions import is_number
from deem_plugin.data.tables import BrokenSample, Listing, iter_json_lines, rows_of, stamp_of


def list_documents(
    path: str | os.PathLike, image_dir: str | os.PathLike | None = None, *, allow_outside: bool = False
) -> Listing:
    """
    Lists the interleaved documents of a `.jsonl` file.

    Each line is an object with `parts`: a list of texts and of pictures `{"image": PATH}`. A picture part may name a
    region in the pixels of the picture: `"box": [left, top, right, bottom]`, `"points": [[x, y], ...]`, or
    `"mask": PATH` of a picture of the same size that is not black inside. `"learn_from": n` makes the parts before the
    n-th a prompt, of which nothing is learned.

    Args:
        path (`str` or `PathLike`): The file.
        image_dir (`str` or `PathLike`, *optional*): Folder that paths are relative to; that of the file by default.
        allow_outside (`bool`, *optional*, defaults to `False`): Whether image paths may lead out of that folder.

    Returns:
        `Listing`: With `parts`, as [`~deem_plugin.data.parts.part_columns`] has them, and `learn_from`.

    Raises:
        ValueError: If there is no such file or folder.
    """
    from datasets import List, Value

    local = Path(path).absolute()
    if local.suffix != ".jsonl" or not local.is_file():
        raise ValueError(f"There are no documents at {path}. Set `data.path` to a .jsonl file with one on each line.")
    folder = Path(image_dir or local.parent).absolute()
    if not folder.is_dir():
        raise ValueError(
            f"The image folder {image_dir} does not exist. Set `data.image_dir` to where the pictures are."
        )
    columns = {"parts": List(part_columns()), "learn_from": Value("int32")}
    images = {"image_dir": str(folder), "allow_outside": allow_outside}
    arguments = {"path": str(local), **images}
    return Listing(str(path), _rows, arguments, columns, f"{images}|{stamp_of(local)}", open_document)


def open_document(row: dict[str, Any], rng=None) -> dict[str, Any]:
    """Opens the pictures of a listed document; masks that are pictures become boolean arrays `(height, width)`."""
    parts = []
    for part in row["parts"]:
        opened = {}
        if part["image"] is not None:
            opened["image"] = load_image(part["image"], turned=region_of(part) is None)
        if part["mask"] is not None:
            opened["mask"] = load_mask(part["mask"]["path"])
        parts.append(part | opened)
    return row | {"parts": parts}


def write_documents(path: str | os.PathLike, documents: list[dict[str, Any]]) -> Path:
    """Writes documents as `list_documents` reads them, one on each line."""
    path = Path(path)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def _rows(path: str, image_dir: str, allow_outside: bool) -> Iterator[dict[str, Any] | BrokenSample]:
    folder = ImageFolder(image_dir, allow_outside)
    return rows_of(iter_json_lines(path), "document", path, lambda record, _: _row(record, folder))


def _row(record: Any, folder: ImageFolder) -> dict[str, Any]:
    given = record.get("parts") if isinstance(record, dict) else None
    if not isinstance(given, list) or not given:
        raise ValueError(f"it is {record!r}; expected an object with a list `parts` that is not empty")
    learn_from = record.get("learn_from", 0)
    if not isinstance(learn_from, int) or not 0 <= learn_from < len(given):
        raise ValueError(f"it has learn_from={learn_from!r}; expected the number of a part, 0 to {len(given) - 1}")
    parts = [_part(part, folder) for part in given]
    files = [part["image"] for part in parts if part["image"]] + [
        part["mask"]["path"] for part in parts if part["mask"]
    ]
    return {"parts": parts, "learn_from": learn_from, "files": files}


def _part(part: Any, folder: ImageFolder) -> dict[str, Any]:
    """Returns a part in the columns of a table."""
    if isinstance(part, str):
        if not part:
            raise ValueError("it has an empty text. Leave it out")
        return make_part(text=part)
    if not isinstance(part, dict) or "image" not in part or (unknown := set(part) - {"image", *REGION_KEYS}):
        what = f"the unknown keys {sorted(unknown)}" if isinstance(part, dict) and "image" in part else "no `image`"
        raise ValueError(f"it has the part {part!r} with {what}; expected a text or `image` with one of {REGION_KEYS}")
    regions = [key for key in REGION_KEYS if part.get(key) is not None]
    if len(regions) > 1:
        raise ValueError(f"it has a picture with {' and '.join(regions)}; give one of them")
    if regions == ["box"] and not _are_numbers(part["box"], 4):
        raise ValueError(f"it has the box {part['box']}; expected [left, top, right, bottom] in pixels")
    if regions == ["points"] and not (
        isinstance(part["points"], list) and all(_are_numbers(point, 2) for point in part["points"])
    ):
        raise ValueError(f"it has the points {part['points']}; expected [[x, y], ...] in pixels")
    paths = {key: folder.resolve(part[key]) for key in ("image", "mask") if part.get(key) is not None}
    mask = {"path": paths["mask"], "size": None, "counts": None} if "mask" in paths else None
    return make_part(image=paths["image"], box=part.get("box"), points=part.get("points"), mask=mask)


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))
