"""The authors' `robustvqa_test.json`: compared with the image folders entry by entry, and converted when it fits."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from deem_plugin.evaluation import imagenet
from deem_plugin.evaluation.manifest import write_manifest
from deem_plugin.evaluation.questions import QuestionDataError, content_hash
from deem_plugin.evaluation.robustvqa import SPLITS, write_robustvqa

KEYS = {"a": "imagenet_a", "r": "imagenet_r", "v2": "imagenet_v2"}
_FIELDS = ("file_name", "gt_caption", "error_caption")


@dataclass(frozen=True)
class Mismatch:
    """What is wrong with an entry: its list in the file, its position there, its picture, and the reason."""

    key: str
    index: int
    file_name: str
    reason: str

    def __str__(self):
        return f"{self.key}[{self.index}] {self.file_name}: {self.reason}"


@dataclass(frozen=True)
class Published:
    """
    A published file, read.

    Args:
        entries (`dict[str, list[dict]]`): Entries by split.
        mismatches (`list[Mismatch]`): What does not fit the image folders; empty for a file that is right.
    """

    entries: dict[str, list[dict[str, str]]]
    mismatches: list[Mismatch]


def check_published(file: str | Path, folders: Mapping[str, str | Path]) -> Published:
    """
    Compares `robustvqa_test.json` with the image folders of the given splits.

    Every entry must name a picture that is there, by its last folder (a wnid or a class index) and file name; be
    captioned by that folder's class; and ask about another class of ImageNet. A name that two classes bear ("crane")
    is right for either of them.

    Args:
        file (`str` or `Path`): JSON: lists `imagenet_a`, `imagenet_r`, `imagenet_v2` of `{file_name, gt_caption,
            error_caption}`.
        folders (`Mapping`): Folder of class folders by split: "a", "r", "v2", or some of them.

    Raises:
        QuestionDataError: If the file is not of this form, lacks a split, or a folder is not as distributed.
    """
    if not folders or set(folders) - set(SPLITS):
        raise ValueError(
            f"Give at least one folder (--imagenet-a, --imagenet-r, --imagenet-v2); got {sorted(folders)}."
        )
    entries = _read(Path(file).expanduser(), folders)
    mismatches = []
    for split, listed in entries.items():
        pictures = frozenset(imagenet.list_pictures(folders[split]).paths)
        seen: set[str] = set()
        for index, entry in enumerate(listed):
            mismatches += [
                Mismatch(KEYS[split], index, entry["file_name"], reason) for reason in _reasons(entry, pictures, seen)
            ]
    return Published(entries, mismatches)


def import_published(file: str | Path, folders: Mapping[str, str | Path], out: str | Path) -> dict[str, Any]:
    """
    Converts a published file that fits its images to `robustvqa_<split>.parquet` and `manifest.json`.

    Captions stay as they are in the file, underscores included.

    Returns:
        `dict`: The manifest.

    Raises:
        QuestionDataError: If the file does not fit; see [`check_published`].
    """
    published = check_published(file, folders)
    if published.mismatches:
        first = "\n".join(map(str, published.mismatches[:3]))
        raise QuestionDataError(
            f"{file} does not fit the images in {len(published.mismatches)} places, the first of them:\n{first}\n"
            f"See all of them with `deem robustvqa check`, and build right questions with `deem robustvqa build`."
        )
    out = Path(out).expanduser()
    files, splits = {}, {}
    for split, entries in published.entries.items():
        path = out / f"robustvqa_{split}.parquet"
        write_robustvqa(_rows(split, Path(folders[split]).expanduser(), entries), path)
        files[path.name] = content_hash(path)
        splits[split] = {"kept": len(entries), "questions": 2 * len(entries)}
    manifest = {
        "benchmark": "RobustVQA",
        "options": {"protocol": "imported", "source": Path(file).name},
        "splits": splits,
        "files": files,
    }
    write_manifest(out, manifest)
    return manifest


def _read(file: Path, folders: Mapping[str, str | Path]) -> dict[str, list[dict[str, str]]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QuestionDataError(f"{file} is no readable JSON file ({error}).") from error
    splits = [split for split in SPLITS if split in folders]
    if not isinstance(data, dict) or any(not isinstance(data.get(KEYS[split]), list) for split in splits):
        raise QuestionDataError(f"{file} needs a list under each of {', '.join(KEYS[split] for split in splits)}.")
    entries = {split: data[KEYS[split]] for split in splits}
    for split, listed in entries.items():
        for index, entry in enumerate(listed):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) for field in _FIELDS):
                raise QuestionDataError(
                    f"{file}, {KEYS[split]}[{index}] needs the texts {', '.join(_FIELDS)}: {entry}."
                )
    return entries


def _place(file_name: str) -> str:
    """Returns class folder and file name: what stays the same wherever the data set is put."""
    return "/".join(PurePosixPath(file_name).parts[-2:])


def _reasons(entry: dict[str, str], pictures: frozenset[str], seen: set[str]) -> Iterator[str]:
    place = _place(entry["file_name"])
    if place in seen:
        yield "the picture comes twice"
    seen.add(place)
    if place not in pictures:
        yield "there is no such picture"
    label = imagenet.folder_class(PurePosixPath(place).parent.name)
    right, wrong = (imagenet.classes_called(entry[field]) for field in ("gt_caption", "error_caption"))
    if label is None:
        yield "its folder is no class of ImageNet-1k"
    elif label not in right:
        yield f"gt_caption is {entry['gt_caption']!r}, but the folder is of {imagenet.clear_names()[label]!r}"
    if not wrong:
        yield f"error_caption {entry['error_caption']!r} is no class of ImageNet-1k"
    elif label in wrong or imagenet.plain(entry["error_caption"]) == imagenet.plain(entry["gt_caption"]):
        yield f"error_caption {entry['error_caption']!r} is true of the picture, too"


def _rows(split: str, folder: Path, entries: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        place = _place(entry["file_name"])
        for answer, caption in (("yes", entry["gt_caption"]), ("no", entry["error_caption"])):
            yield {
                "question_id": f"{split}/{place}#{answer}",
                "image_id": f"{split}/{place}",
                "image": folder / place,
                "caption": caption,
                "answer": answer,
                "source": place,
            }
