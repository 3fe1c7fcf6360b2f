"""Finds the class that CLIP takes a picture for: batch by batch, and on from where it was when it is interrupted."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from deem_plugin.data.images import load_image
from deem_plugin.evaluation.clip import Clip
from deem_plugin.evaluation.imagenet import ClassFolders

_READERS = 8


@dataclass(frozen=True)
class Mined:
    """
    What CLIP makes of one picture by one rule.

    Args:
        wrong (`int`): The wrong class that scores highest among those the rule admits.
        fooled (`bool`): Whether it scores higher than the right class.
    """

    wrong: int
    fooled: bool


@dataclass(frozen=True)
class Rule:
    """
    A way to mine: what the classes are called, how similarity is measured, and which wrong classes are admitted.

    Args:
        text_features (`torch.Tensor`): One row a class, shape `(classes, dim)`.
        admitted (`torch.Tensor`): Bool `(classes, classes)`: whether the column may be the wrong class of the row.
    """

    text_features: torch.Tensor
    admitted: torch.Tensor


def admitted_classes(
    number: int, candidates: Collection[int], refused: Iterable[tuple[int, int]] = ()
) -> torch.Tensor:
    """Returns bool `(number, number)`: every candidate but the class itself and the classes it may not go with."""
    admitted = torch.zeros(number, number, dtype=torch.bool)
    admitted[:, sorted(candidates)] = True
    admitted.fill_diagonal_(False)
    for one, other in refused:
        admitted[one, other] = False
    return admitted


def mine(logits: torch.Tensor, labels: torch.Tensor, admitted: torch.Tensor) -> list[Mined]:
    """
    Finds the hardest wrong class of each picture.

    Args:
        logits (`torch.Tensor`): Similarity to each class, shape `(batch, classes)`.
        labels (`torch.Tensor`): Right classes, shape `(batch,)`.
        admitted (`torch.Tensor`): Bool `(classes, classes)`, see [`Rule`].
    """
    scores, wrong = logits.masked_fill(~admitted[labels], -torch.inf).max(dim=1)
    own = logits.gather(1, labels[:, None])[:, 0]
    return [Mined(index, fooled) for index, fooled in zip(wrong.tolist(), (scores > own).tolist(), strict=True)]


def mine_pictures(
    pictures: ClassFolders,
    clip: Clip,
    rules: dict[str, Rule],
    progress: Path,
    key: str,
    batch_size: int = 64,
) -> list[dict[str, Mined] | None]:
    """
    Mines every picture by every rule; `None` stands for a picture that cannot be read.

    Finished batches are kept in the file `progress`. A later call with the same key, batch size and pictures goes on
    after the last whole one. Batches are the same in every run, so an interruption does not change one number.

    Args:
        pictures (`ClassFolders`): The pictures.
        clip (`Clip`): The model to fool.
        rules (`dict[str, Rule]`): Rules by name; pictures are embedded once for all of them.
        progress (`Path`): File of one JSON line a batch.
        key (`str`): Says what the results depend on beside the pictures: weights and rules.
        batch_size (`int`, *optional*, defaults to 64): Pictures a batch.
    """
    header = _fingerprint(pictures, key, batch_size)
    finished = _read_progress(progress, header)
    results = [result for batch in finished for result in batch]
    progress.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress.open("w", encoding="utf-8") as file,
        ThreadPoolExecutor(_READERS) as readers,
        tqdm(total=len(pictures.paths), initial=len(results), desc=f"Mining {pictures.root.name}") as bar,
    ):
        # Written anew, so that half a line of a killed run does not stay in the middle.
        _append(file, header, *finished)
        for start in range(len(results), len(pictures.paths), batch_size):
            paths = pictures.paths[start : start + batch_size]
            labels = torch.tensor(pictures.labels[start : start + batch_size])
            images = list(readers.map(_read, [pictures.root / path for path in paths]))
            batch = _mine_batch(images, labels, clip, rules)
            results += batch
            _append(file, batch)
            bar.update(len(batch))
    return [None if result is None else {name: Mined(*result[name]) for name in rules} for result in results]


def _mine_batch(images: list[Image.Image | None], labels: torch.Tensor, clip: Clip, rules: dict[str, Rule]) -> list:
    """Returns for each picture `{rule: [wrong, fooled]}`, or `None` where there is no picture."""
    readable = [index for index, image in enumerate(images) if image is not None]
    results: list[dict | None] = [None] * len(images)
    if not readable:
        return results
    features = clip.image_features([images[index] for index in readable])
    for name, rule in rules.items():
        logits = clip.logit_scale * features @ rule.text_features.T
        for index, mined in zip(readable, mine(logits, labels[readable], rule.admitted), strict=True):
            results[index] = {**(results[index] or {}), name: [mined.wrong, mined.fooled]}
    return results


def _read(path: Path) -> Image.Image | None:
    try:
        return load_image(path)
    except ValueError:
        return None


def _fingerprint(pictures: ClassFolders, key: str, batch_size: int) -> str:
    digest = hashlib.sha256(f"{key} {batch_size}".encode())
    for path in pictures.paths:
        stat = (pictures.root / path).stat()
        digest.update(f"\n{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_progress(progress: Path, header: str) -> list[list]:
    """Returns the batches that an earlier run with this header finished."""
    lines = progress.read_text(encoding="utf-8").split("\n")[:-1] if progress.is_file() else []  # the last may be torn
    return [json.loads(line) for line in lines[1:]] if lines and json.loads(lines[0]) == header else []


def _append(file, *values) -> None:
    file.writelines(json.dumps(value) + "\n" for value in values)
    file.flush()
    os.fsync(file.fileno())
