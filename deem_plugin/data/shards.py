"""Streams documents from tar shards, local or remote: interleaved ones in MMC4's layout, and captioned pictures."""

import json
import logging
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from deem_plugin.data.images import IMAGE_SUFFIXES, load_image

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

ON_ERROR = ("raise", "skip")
Sample = dict[str, bytes]


class Drops(Counter):
    """
    Counts what a stream read and left out, by reason.

    Each process counts what it reads itself. A resumed stream reads its current shard from the beginning and counts
    that again, but not the shards before.
    """

    def __deepcopy__(self, memo):
        return self  # `datasets` copies a stream's generator to mix or split it; all copies count here


@dataclass
class ShardReader:
    """
    Reads the samples of shards and makes documents of them.

    A sample is, as in WebDataset, a run of files with one name up to the first dot: `0007.json`, `0007.a.jpg`.

    Args:
        make (`Callable`):
            Makes the parts of a sample's document, from its name, its files by what follows the first dot, and its
            own `random.Random`. Raises `Dropped` for what the data's rules leave out, and a `ValueError` for what is
            broken.
        seed (`int`): Of all coins. A sample's depend on it and on the sample's name, not on what was read before.
        on_error (`str`): What is done about a broken sample: `raise`, or `skip` and count it.
        drops (`Drops`): What is counted.
    """

    make: Callable[[str, Sample, random.Random, "ShardReader"], list[dict[str, Any]]]
    seed: int = 0
    on_error: str = "raise"
    drops: Drops = field(default_factory=Drops)

    def __post_init__(self):
        if self.on_error not in ON_ERROR:
            raise ValueError(f"`on_error` is {self.on_error!r}; expected one of {', '.join(ON_ERROR)}.")

    def read(self, shards: list[str]) -> Iterator[dict[str, Any]]:
        """Yields the documents of `shards`, in the columns of `load_documents`."""
        for shard in shards:
            for key, sample in _iter_samples(shard):
                name = f"{shard}::{key}"
                self.drops["samples"] += 1
                try:
                    parts = self.make(
                        name, sample, random.Random(f"{self.seed}|{os.path.basename(shard)}|{key}"), self
                    )
                except Dropped as reason:
                    self.drops[str(reason)] += 1
                    continue
                except ValueError:
                    if self.on_error == "raise":
                        raise
                    self.drops["broken sample"] += 1
                    continue
                yield {"parts": parts, "learn_from": 0}
            logger.info("Read to the end of %s; so far: %s.", shard, dict(self.drops))

    def image(self, name: str, data: bytes | None) -> dict[str, Any] | None:
        """
        Returns a picture as a part of a document, or `None` if it is damaged or missing and such are skipped.

        With `raise` a damaged picture raises where it is opened for training, by this name, so as to decode it once.
        """
        if data is None and self.on_error == "raise":
            raise ValueError(
                f"The image {name} is not in its shard. Fetch the shard again, or set `on_error='skip'`, which counts "
                f"such images."
            )
        if self.on_error == "skip":
            try:
                load_image({"path": name, "bytes": data if data is not None else b""})
            except ValueError:
                self.drops["missing image" if data is None else "unreadable image"] += 1
                return None
        return _part(image={"path": name, "bytes": data})


class Dropped(Exception):
    """A sample that the rules of the data leave out; its text is the reason that is counted."""


def interleaved_reader(
    *,
    min_similarity: float = 0.24,
    max_images: int = 6,
    keep_single: float = 0.5,
    seed: int = 0,
    on_error: str = "raise",
) -> ShardReader:
    """
    Makes a reader of interleaved documents in MMC4's layout, by the rules of the paper (App. E.2).

    A sample is `NAME.json` with `text_list` and `image_info`, each of whose entries has `image_name`,
    `matched_text_index` and `matched_sim`, and a file `NAME.IMAGE_NAME` for each picture. A picture stands before or
    behind its text, with equal chance.

    Args:
        min_similarity (`float`): CLIP similarity below which a picture is left out.
        max_images (`int`): Most pictures of a document; the first ones stay.
        keep_single (`float`): Probability that a document with one picture stays.
        seed (`int`): Of all coins.
        on_error (`str`): `raise`, or `skip` and count, for broken documents and damaged or missing pictures.
    """

    def make(name: str, sample: Sample, rng: random.Random, reader: ShardReader) -> list[dict[str, Any]]:
        record = _read_json(name, sample, ("text_list", "image_info"))
        texts = [text.strip() for text in record["text_list"]]
        _check_marks(texts)
        for info in record["image_info"]:
            if missing := {"image_name", "matched_text_index", "matched_sim"} - set(info):
                raise ValueError(f"An entry of `image_info` of {name} lacks {', '.join(sorted(missing))}.")
        chosen = []
        for info in sorted(record["image_info"], key=lambda info: info["matched_text_index"]):
            if not 0 <= info["matched_text_index"] < len(texts):
                raise ValueError(f"An image of {name} belongs to text {info['matched_text_index']} of {len(texts)}.")
            if info["matched_sim"] < min_similarity:
                reader.drops["image unlike its text"] += 1
                continue
            part = reader.image(f"{name}.{info['image_name']}", sample.get(info["image_name"]))
            if part is not None:
                chosen.append((info["matched_text_index"], part))
        if len(chosen) > max_images:
            reader.drops["image beyond the most"] += len(chosen) - max_images
        chosen = chosen[:max_images]
        if not chosen:
            raise Dropped("document without image")
        if len(chosen) == 1 and rng.random() >= keep_single:
            raise Dropped("document with one image")
        places = [(index, rng.random() < 0.5, part) for index, part in chosen]
        parts: list[dict[str, Any]] = []
        for index, text in enumerate(texts):
            parts += [part for place, before, part in places if place == index and before]
            if text:
                # Sentences that follow each other are one text.
                previous = parts.pop()["text"] + " " if parts and parts[-1]["text"] else ""
                parts.append(_part(text=previous + text))
            parts += [part for place, before, part in places if place == index and not before]
        return parts

    return ShardReader(make, seed, on_error)


def pairs_reader(*, min_characters: int = 10, seed: int = 0, on_error: str = "raise") -> ShardReader:
    """
    Makes a reader of pictures with captions, the picture before or behind its caption with equal chance (App. E.2).

    A sample is a picture and `NAME.txt`, or `NAME.json` with `caption`.

    Args:
        min_characters (`int`): Shortest caption that stays.
        seed (`int`): Of all coins.
        on_error (`str`): `raise`, or `skip` and count, for broken samples and damaged pictures.
    """

    def make(name: str, sample: Sample, rng: random.Random, reader: ShardReader) -> list[dict[str, Any]]:
        pictures = [file for file in sample if f".{file}".lower().endswith(IMAGE_SUFFIXES)]
        if len(pictures) != 1:
            raise ValueError(f"The sample {name} has the files {sorted(sample)}; expected one picture.")
        if "txt" in sample:
            caption = sample["txt"].decode("utf-8").strip()
        else:
            caption = _read_json(name, sample, ("caption",))["caption"].strip()
        if len(caption) < min_characters:
            raise Dropped("short caption")
        _check_marks([caption])
        part = reader.image(f"{name}.{pictures[0]}", sample[pictures[0]])
        if part is None:
            raise Dropped("document without image")
        parts = [part, _part(text=caption)]
        return parts if rng.random() < 0.5 else parts[::-1]

    return ShardReader(make, seed, on_error)


def stream_interleaved(shards: str | Sequence[str], **rules) -> tuple["IterableDataset", Drops]:
    """
    Streams interleaved documents once, from a script of one's own; a recipe reads them by [`ShardStream`].

    Args:
        shards (`str` or `Sequence[str]`): Tar files: paths, addresses that fsspec opens, or globs of them.
        rules: As for [`interleaved_reader`].

    Returns:
        `tuple[datasets.IterableDataset, Drops]`: The documents in the columns of `load_documents`, and what is
        counted. One shard goes to one process: `split_dataset_by_node` gives ranks and a `DataLoader` gives workers
        shards of their own, and `state_dict` tells the position.
    """
    return _stream(shards, interleaved_reader(**rules))


def stream_pairs(shards: str | Sequence[str], **rules) -> tuple["IterableDataset", Drops]:
    """Streams captioned pictures; arguments and result as [`stream_interleaved`], rules as [`pairs_reader`]."""
    return _stream(shards, pairs_reader(**rules))


def mix_streams(streams: Sequence["IterableDataset"], weights: Sequence[float], seed: int = 0) -> "IterableDataset":
    """Mixes streams at random in proportion to `weights`, (2, 1) in the paper, until one of them ends."""
    from datasets import interleave_datasets

    if len(weights) != len(streams) or any(weight <= 0 for weight in weights):
        raise ValueError(f"Got the weights {list(weights)} for {len(streams)} streams; expected one above 0 for each.")
    probabilities = [weight / sum(weights) for weight in weights]
    return interleave_datasets(list(streams), probabilities=probabilities, seed=seed)


def list_shards(shards: str | Sequence[str]) -> list[str]:
    """Returns the tar files that paths, addresses and globs stand for, sorted within each glob."""
    from fsspec.core import url_to_fs

    found = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        filesystem, path = url_to_fs(pattern)
        if not any(sign in path for sign in "*?["):
            found.append(pattern)
            continue
        matches = sorted(filesystem.glob(path))
        if not matches:
            raise ValueError(f"No shard is found at {pattern}. Give paths, addresses or globs of tar files.")
        local = "file" in filesystem.protocol
        found += matches if local else [filesystem.unstrip_protocol(match) for match in matches]
    return found


def _stream(shards: str | Sequence[str], reader: ShardReader) -> tuple["IterableDataset", Drops]:
    from datasets import Features, IterableDataset, List, Value

    part = {
        "text": Value("string"),
        "image": {"path": Value("string"), "bytes": Value("binary")},
        "box": List(Value("float32")),
        "points": List(List(Value("float32"))),
        "mask": Value("string"),
    }
    features = Features({"parts": List(part), "learn_from": Value("int32")})
    stream = IterableDataset.from_generator(reader.read, features=features, gen_kwargs={"shards": list_shards(shards)})
    return stream, reader.drops


def _iter_samples(shard: str) -> Iterator[tuple[str, Sample]]:
    """Yields the name and the files of each sample of a tar file, reading it once from beginning to end."""
    import fsspec

    key, sample = None, {}
    try:
        with fsspec.open(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                stem, _, rest = path.name.partition(".")
                name = str(path.parent / stem)
                if name != key:
                    if sample:
                        yield key, sample
                    key, sample = name, {}
                sample[rest] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"The shard {shard} is damaged or cut off ({error}). Fetch it again.") from error
    if sample:
        yield key, sample


def _read_json(name: str, sample: Sample, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        record = json.loads(sample["json"])
    except (KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"The sample {name} with the files {sorted(sample)} has no readable .json.") from error
    if not isinstance(record, dict) or any(key not in record for key in keys):
        raise ValueError(f"The JSON of the sample {name} lacks one of {', '.join(keys)}.")
    return record


def _check_marks(texts: list[str]):
    """Drops web text that holds the model's own marks, which would be taken for pictures."""
    from deem_plugin.models.processing import IMAGE_START_TOKEN, IMAGE_TOKEN

    if any(mark in text for mark in (IMAGE_TOKEN, IMAGE_START_TOKEN) for text in texts):
        raise Dropped("mark within the text")


def _part(**given) -> dict[str, Any]:
    return dict.fromkeys(("text", "image", "box", "points", "mask")) | given
