"""Questions about regions of pictures, checked when they are listed and decoded when they are taken."""

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deem_plugin.data.documents import Document, Region
from deem_plugin.data.images import load_image
from deem_plugin.vision.regions import region_mask

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom exclusive
ON_ERROR = ("raise", "skip")


class RegionError(ValueError):
    """What is wrong with one sample; `reason` is the few words under which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class LeftOut:
    """A sample that a reader's rule leaves out, right as it is; counted under `reason` and never raised."""

    reason: str


@dataclass(frozen=True)
class RegionSample:
    """
    One question about regions of a picture.

    Args:
        name (`str`): What the sample is called in an error, its annotation's id within.
        file (`str`): Picture, relative to the folder of the pictures.
        width, height (`int`): Of the picture, in pixels.
        prompt (`list`):
            Texts and regions in reading order. A region is a box `(left, top, right, bottom)`, or a segmentation as
            COCO has them: a list of polygons `[x0, y0, x1, y1, ...]`, or a run-length encoding `{"size", "counts"}`,
            compressed or not.
        answer (`str`): What is learned.
    """

    name: str
    file: str
    width: int
    height: int
    prompt: list[str | Box | list[list[float]] | dict[str, Any]]
    answer: str


def check_on_error(on_error: str) -> None:
    """Raises a `ValueError` unless `on_error` is one of `ON_ERROR`."""
    if on_error not in ON_ERROR:
        raise ValueError(f"`on_error` is {on_error!r}; expected one of {', '.join(ON_ERROR)}.")


class RegionDocuments(Sequence):
    """
    Documents of questions about regions.

    All regions are checked at once, so that a bad one shows before the training and not in the middle of it.
    Segmentations are kept as run-length encodings; pictures are opened when a document is taken.

    Args:
        samples (`Iterable[RegionSample | LeftOut | RegionError]`):
            Of the readers in `region_sources`, one or several chained.
        image_dir (`str` or `PathLike`): Folder that the pictures' files are relative to.
        on_error (`str`):
            What is done about a sample that is wrong: `raise`, or `skip` and count it in `dropped`. Pictures that are
            missing or damaged always raise.

    Attributes:
        dropped (`Counter`): How many samples were left out, by reason.
    """

    def __init__(
        self,
        samples: Iterable[RegionSample | LeftOut | RegionError],
        image_dir: str | os.PathLike,
        on_error: str = "raise",
    ):
        check_on_error(on_error)
        self.image_dir = Path(image_dir)
        if not self.image_dir.is_dir():
            raise ValueError(f"The image folder {image_dir} does not exist. Set `image_dir` to that of the pictures.")
        self.dropped: Counter[str] = Counter()
        self._samples: list[RegionSample] = []
        for sample in samples:
            if isinstance(sample, LeftOut):
                self.dropped[sample.reason] += 1
                continue
            try:
                self._samples.append(compact(sample))
            except RegionError as error:
                if on_error == "raise":
                    raise
                self.dropped[error.reason] += 1
        if self.dropped:
            logger.warning(
                "Left out %d of %d samples: %s.",
                self.dropped.total(),
                self.dropped.total() + len(self._samples),
                ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common()),
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Document:
        """
        Opens a sample's picture and decodes its regions.

        Raises:
            ValueError: If the picture is missing, damaged, or has not the size that its annotations speak of.
        """
        return open_document(self._samples[index], self.image_dir)


def open_document(sample: RegionSample, image_dir: str | os.PathLike = "") -> Document:
    """
    Opens the picture of a sample that `compact` has checked, and decodes its regions.

    Raises:
        ValueError: If the picture is missing, damaged, or has not the size that its annotations speak of.
    """
    image = load_image(Path(image_dir) / sample.file)
    if image.size != (sample.width, sample.height):
        raise ValueError(
            f"The picture {sample.file} is {image.width} x {image.height}, but {sample.name} speaks of one of "
            f"{sample.width} x {sample.height}. Its regions would lie elsewhere: use the pictures that the "
            f"annotations were made of, not resized and not turned by EXIF."
        )

    def mask(region) -> np.ndarray:
        if isinstance(region, dict):
            return _coco_masks().decode(region).astype(bool)
        return region_mask(region, sample.width, sample.height)

    prompt = [part if isinstance(part, str) else Region(image, mask(part)) for part in sample.prompt]
    return Document([*prompt, sample.answer], learn_from=len(prompt), name=sample.name)


def compact(sample: RegionSample | RegionError) -> RegionSample:
    """Returns a sample with its segmentations as compressed run-length encodings, or raises what is wrong with it."""
    if isinstance(sample, RegionError):
        raise sample
    if not sample.answer.strip():
        raise RegionError("without answer", f"{sample.name} has no answer to learn. Leave it out.")
    prompt = []
    for part in sample.prompt:
        if isinstance(part, tuple):
            _check_box(part, sample)
        elif not isinstance(part, str):
            part = encode_segmentation(part, sample.width, sample.height, sample.name)
        prompt.append(part)
    return RegionSample(sample.name, sample.file, sample.width, sample.height, prompt, sample.answer)


def _check_box(box: Box, sample: RegionSample):
    """Raises a `RegionError` unless a pixel of the picture lies within the box."""
    if len(box) != 4 or not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
        raise RegionError(
            "with a broken region",
            f"The box of {sample.name} is {box}; expected (left, top, right, bottom) in pixels.",
        )
    left, top, right, bottom = box
    columns = min(math.ceil(right), sample.width) - max(math.ceil(left), 0)
    rows = min(math.ceil(bottom), sample.height) - max(math.ceil(top), 0)
    if columns <= 0 or rows <= 0:
        raise _empty(f"box {box}", sample.name, sample.width, sample.height)


def encode_segmentation(segmentation: Any, width: int, height: int, name: str) -> dict[str, Any]:
    """
    Returns a segmentation of COCO's kinds as a compressed run-length encoding.

    Args:
        segmentation (`list` or `dict`): Polygons, or a run-length encoding, compressed or not.
        width, height (`int`): Of the picture, in pixels.
        name (`str`): What the annotation is called in an error.

    Raises:
        RegionError: If it is none of these, is of another picture's size, or covers no pixel.
    """
    masks = _coco_masks()
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", [])) != [height, width]:
            raise RegionError(
                "with a region of another size",
                f"The segmentation of {name} has the size {segmentation.get('size')}, but its picture has "
                f"{[height, width]} (height, width).",
            )
        counts = segmentation.get("counts")
        if isinstance(counts, list):
            if any(not isinstance(run, int) or run < 0 for run in counts) or sum(counts) != width * height:
                raise _broken(name, f"its runs do not add up to the {width * height} pixels of the picture")
            encoded = masks.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        elif isinstance(counts, str | bytes):
            data = counts.encode() if isinstance(counts, str) else counts
            encoded = {"size": [height, width], "counts": data}
            try:
                masks.decode(encoded)
            except ValueError as error:
                raise _broken(name, "its counts cannot be decoded") from error
        else:
            raise _broken(name, f"its counts are a {type(counts).__name__}")
    else:
        if not isinstance(segmentation, list) or not segmentation:
            raise _broken(name, f"it is {segmentation!r}")
        for polygon in segmentation:
            # pycocotools takes a list of four numbers for a box.
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise _broken(name, f"a polygon is {polygon!r}, not three points or more")
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in polygon):
                raise _broken(name, "a polygon's coordinate is no finite number")
        encoded = masks.merge(masks.frPyObjects(segmentation, height, width))
    if not masks.area(encoded):
        raise _empty("segmentation", name, width, height)
    return encoded


def to_mask(region: Any, width: int, height: int, name: str) -> np.ndarray:
    """Returns a box or segmentation, as [`RegionSample`] has them, as a boolean mask `(height, width)`."""
    if isinstance(region, tuple):
        return region_mask(region, width, height)
    return _coco_masks().decode(encode_segmentation(region, width, height, name)).astype(bool)


def _broken(name: str, why: str) -> RegionError:
    return RegionError(
        "with a broken region",
        f"The segmentation of {name} cannot be read: {why}. Expected polygons [[x0, y0, x1, y1, x2, y2, ...], ...] or "
        f"a run-length encoding {{'size': [height, width], 'counts': ...}}.",
    )


def _empty(what: str, name: str, width: int, height: int) -> RegionError:
    return RegionError(
        "with an empty region",
        f"The {what} of {name} covers no pixel of its picture of {width} x {height}. Leave it out, or set "
        f"`on_error='skip'`, which counts such samples.",
    )


def _coco_masks():
    """Imports pycocotools' masks, or says how to get them."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "COCO's segmentations are read by pycocotools, which is not installed. Install it with "
            "`pip install 'deem-plugin[regions]'`."
        ) from error
    return mask
