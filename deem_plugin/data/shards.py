"""Lists what tar shards hold, so that samples are read from any place of them: documents, captions, pictures."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from random import Random
from typing import Any

from deem_plugin.data.images import IMAGE_SUFFIXES, load_image
from deem_plugin.data.parts import make_part
from deem_plugin.data.tables import BrokenSample, LeftOut, Listing, reading, stamp_of

Member = dict[str, Any]  # `path` of the shard, `offset` and `size` in it
Sample = dict[str, Member | bytes]  # by what follows the first dot; texts are read at once


def list_interleaved(
    shards: str | Sequence[str],
    *,
    min_similarity: float = 0.24,
    max_images: int = 6,
    keep_single: float = 0.5,
    seed: int = 0,
    incomplete: bool = False,
    processes: int = 1,
) -> Listing:
    """
    Lists interleaved documents in MMC4's layout, by the rules of the paper (App. E.2).

    A sample is `NAME.json` with `text_list` and `image_info`, each of whose entries has `image_name`,
    `matched_text_index` and `matched_sim`, and a file `NAME.IMAGE_NAME` for each picture. A picture stands before or
    behind its text, with equal chance, drawn anew each epoch.

    Args:
        shards (`str` or `Sequence[str]`): Tar files: paths, addresses that fsspec opens, or globs of them.
        min_similarity (`float`): CLIP similarity below which a picture is left out.
        max_images (`int`): Most pictures of a document; the first ones stay.
        keep_single (`float`): Share of the documents with one picture that stays, drawn once.
        seed (`int`): Of that draw.
        incomplete (`bool`): Whether a document goes on without pictures that are missing or unreadable.
        processes (`int`): How many list the shards.
    """
    rules = {"min_similarity": min_similarity, "max_images": max_images, "keep_single": keep_single, "seed": seed}
    return _list(shards, _interleaved, rules | {"incomplete": incomplete}, incomplete, processes)


def list_pairs(
    shards: str | Sequence[str], *, min_characters: int = 10, incomplete: bool = False, processes: int = 1
) -> Listing:
    """
    Lists pictures with captions, the picture before or behind its caption with equal chance (App. E.2).

    A sample is a picture and `NAME.txt`, or `NAME.json` with `caption`.

    Args:
        shards (`str` or `Sequence[str]`): As of [`list_interleaved`].
        min_characters (`int`): Shortest caption that stays.
        incomplete (`bool`), processes (`int`): As of [`list_interleaved`].
    """
    return _list(shards, _pair, {"min_characters": min_characters}, incomplete, processes)


def list_pictures(path: str | os.PathLike, *, processes: int = 1) -> Listing:
    """
    Lists pictures alone: those of a folder with all its subfolders, and those in tar files there; or those of shards.

    Args:
        path (`str` or `PathLike`): A folder, or tar files as of [`list_interleaved`].
        processes (`int`): How many list the shards.

    Returns:
        `Listing`: Opened, an example has an `image`, and the `seed` of what is drawn for it.

    Raises:
        ValueError: If there is no such folder, or it holds no picture.
    """
    if str(path).endswith(".tar") or "*" in str(path):
        sources = list_shards(str(path))
    elif not os.path.isdir(path):
        raise ValueError(
            f"The image folder {path} does not exist. Set `data.path` to a folder of pictures or tar files, or to a "
            f"glob of tar files."
        )
    else:
        sources = sorted(_walk(os.path.abspath(path)))
        if not sources:
            raise ValueError(
                f"The folder {path} holds no picture. Expected files ending in {', '.join(IMAGE_SUFFIXES)}, or tar "
                f"files, in it or in its subfolders."
            )
    stamp = "\n".join(_stamp(source) if source.endswith(".tar") else source for source in sources)
    return Listing(str(path), _pictures, {"sources": sources}, {"image": _member()}, stamp, open_picture, processes)


def list_shards(shards: str | Sequence[str]) -> list[str]:
    """Returns the tar files that paths, addresses and globs stand for, sorted within each glob."""
    from fsspec.core import url_to_fs

    found = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        filesystem, path = url_to_fs(pattern)
        if not any(sign in path for sign in "*?["):
            found.append(pattern)
            continue
        matches = [match for match in sorted(filesystem.glob(path)) if not _is_litter(match)]
        if not matches:
            raise ValueError(f"No shard is found at {pattern}. Give paths, addresses or globs of tar files.")
        local = "file" in filesystem.protocol
        found += matches if local else [filesystem.unstrip_protocol(match) for match in matches]
    return found


def open_document(row: dict[str, Any], rng: Random, incomplete: bool = False) -> dict[str, Any]:
    """
    Opens the pictures of a listed document and places them in front of their texts or behind them.

    Raises:
        BrokenSample: If a picture cannot be read (unless `incomplete`), or none can.
    """
    around: dict[tuple[int, bool], list] = {}
    skipped: Counter[str] = Counter()
    for image in row["images"]:
        before = rng.random() < 0.5
        try:
            part = make_part(image=load_image(image))
        except BrokenSample as error:
            if not incomplete:
                raise
            skipped[error.reason] += 1
            continue
        around.setdefault((image["text"], before), []).append(part)
    if not around:
        raise BrokenSample("document without image", f"No picture of {row['name']} can be read.")
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(row["texts"]):
        parts += around.get((index, True), [])
        if text:
            # Sentences that follow each other are one text.
            previous = parts.pop()["text"] + " " if parts and parts[-1]["text"] else ""
            parts.append(make_part(text=previous + text))
        parts += around.get((index, False), [])
    return {"parts": parts, "learn_from": 0, "skipped": skipped}


def open_picture(row: dict[str, Any], rng: Random) -> dict[str, Any]:
    """Opens a listed picture, with a seed for what is drawn for it."""
    return {"image": load_image(row["image"]), "seed": rng.getrandbits(63)}


def _list(shards, make, rules: dict[str, Any], incomplete: bool, processes: int) -> Listing:
    from datasets import List, Value

    found = list_shards(shards)
    image = _member() | {"text": Value("int32")}
    columns = {"name": Value("string"), "texts": List(Value("string")), "images": List(image)}
    stamp = f"{make.__name__} {json.dumps(rules)}\n" + "\n".join(map(_stamp, found))
    arguments = {"shards": found, "make": make, "rules": rules}
    opener = partial(open_document, incomplete=incomplete)
    name = shards if isinstance(shards, str) else f"{len(found)} shards, the first {found[0]}"
    return Listing(name, _documents, arguments, columns, stamp, opener, min(processes, len(found)))


def _member() -> dict[str, Any]:
    from datasets import Value

    return {"path": Value("string"), "offset": Value("int64"), "size": Value("int64")}


def _documents(shards: list[str], make, rules: dict[str, Any]) -> Iterator[dict[str, Any] | LeftOut | BrokenSample]:
    for shard in shards:
        for key, sample in _iter_samples(shard):
            name = f"{shard}::{key}"
            try:
                with reading(name):
                    row = make(name, key, sample, **rules)
            except BrokenSample as error:
                row = error
            yield row


def _interleaved(name, key, sample: Sample, min_similarity, max_images, keep_single, seed, incomplete):
    record = _read_json(name, sample, ("text_list", "image_info"))
    if not isinstance(record["text_list"], list):
        raise ValueError(f"its `text_list` is {record['text_list']!r}; expected a list of texts")
    texts = [text.strip() for text in record["text_list"]]
    notes: list[str] = []
    chosen = []
    for info in sorted(record["image_info"], key=lambda info: info["matched_text_index"]):
        if type(info["matched_text_index"]) is not int or not 0 <= info["matched_text_index"] < len(texts):
            raise ValueError(f"an image belongs to text {info['matched_text_index']} of {len(texts)}")
        image = sample.get(info["image_name"].lower())
        if not info["matched_sim"] >= min_similarity:  # NaN is unlike, too
            notes.append("image unlike its text")
        elif image is not None:
            chosen.append({**image, "text": info["matched_text_index"]})
        elif incomplete:
            notes.append("missing image")
        else:
            raise BrokenSample(
                "missing image",
                f"The image {name}.{info['image_name']} is not in its shard. Fetch the shard again, or set "
                f"`data.on_error: skip`, which counts such images.",
            )
    notes += ["image beyond the most"] * (len(chosen) - max_images)
    if _has_marks(texts):
        return LeftOut("mark within the text", tuple(notes))
    if not chosen:
        return LeftOut("document without image", tuple(notes))
    if len(chosen) == 1 and Random(f"{seed}|{os.path.basename(name)}|{key}").random() >= keep_single:
        return LeftOut("document with one image", tuple(notes))
    return {"name": name, "texts": texts, "images": chosen[:max_images], "notes": notes}


def _pair(name, key, sample: Sample, min_characters):
    pictures = [file for file in sample if f".{file}".endswith(IMAGE_SUFFIXES)]
    if len(pictures) != 1:
        raise ValueError(f"it has the files {sorted(sample)}; expected one picture")
    caption = sample["txt"].decode() if "txt" in sample else _read_json(name, sample, ("caption",))["caption"]
    if not isinstance(caption, str):
        raise ValueError(f"its caption is {caption!r}; expected a text")
    caption = caption.strip()
    if len(caption) < min_characters:
        return LeftOut("short caption")
    if _has_marks([caption]):
        return LeftOut("mark within the text")
    return {"name": name, "texts": [caption], "images": [{**sample[pictures[0]], "text": 0}]}


def _pictures(sources: list[str]) -> Iterator[dict[str, Any]]:
    for source in sources:
        if source.endswith(".tar"):
            for member in _iter_members(source):
                if member["name"].lower().endswith(IMAGE_SUFFIXES):
                    yield {"image": {key: member[key] for key in ("path", "offset", "size")}}
        else:
            yield {"image": {"path": source, "offset": None, "size": None}}


def _iter_samples(shard: str) -> Iterator[tuple[str, Sample]]:
    """Yields the name and the files of each sample: a run of files with one name up to the first dot."""
    key, sample = None, {}
    for member in _iter_members(shard):
        path = PurePosixPath(member.pop("name"))
        stem, _, rest = path.name.partition(".")
        name = str(path.parent / stem)
        if name != key:
            if sample:
                yield key, sample
            key, sample = name, {}
        content = member.pop("content")
        sample[rest.lower()] = member if content is None else content
    if sample:
        yield key, sample


def _iter_members(shard: str) -> Iterator[Member]:
    """Yields the files of a tar file: where each lies, its `name`, and the `content` of .json and .txt files."""
    import fsspec

    try:
        with fsspec.open(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile would keep them all
                if not member.isfile() or _is_litter(member.name):
                    continue
                content = None
                if member.name.lower().endswith((".json", ".txt")):
                    content = archive.extractfile(member).read()
                place = {"path": shard, "offset": member.offset_data, "size": member.size}
                yield {**place, "name": member.name, "content": content}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"The shard {shard} is damaged, cut off or compressed ({error}). Fetch it again, or unpack it: samples "
            f"are read from any place of a plain tar file."
        ) from error


def _is_litter(path: str) -> bool:
    """Tells whether a file is one of those that macOS adds to archives beside each file."""
    return os.path.basename(path).startswith("._") or "__MACOSX" in PurePosixPath(path).parts


def _walk(folder: str) -> Iterator[str]:
    for parent, _, files in os.walk(folder, followlinks=True):
        for file in files:
            if file.lower().endswith((*IMAGE_SUFFIXES, ".tar")) and not _is_litter(file):
                yield os.path.join(parent, file)


def _stamp(shard: str) -> str:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(shard)
    if not filesystem.isfile(path):  # a pipe would be waited for
        raise ValueError(f"There is no shard {shard}. Give paths, addresses or globs of tar files.")
    return stamp_of(path) if "file" in filesystem.protocol else f"{shard} {filesystem.ukey(path)}"


def _read_json(name: str, sample: Sample, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        record = json.loads(sample["json"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"with the files {sorted(sample)} it has no readable .json") from error
    if not isinstance(record, dict) or any(key not in record for key in keys):
        raise ValueError(f"its JSON lacks one of {', '.join(keys)}")
    return record


def _has_marks(texts: list[str]) -> bool:
    """Tells whether web text holds the model's own marks, which would be taken for pictures."""
    from deem_plugin.models.processing import IMAGE_START_TOKEN, IMAGE_TOKEN

    return any(mark in text for mark in (IMAGE_TOKEN, IMAGE_START_TOKEN) for text in texts)
