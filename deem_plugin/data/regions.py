"""Questions about regions of pictures, checked before the training, and regions in one compact form."""

import math
from dataclasses import dataclass
from typing import Any

from deem_plugin.data.tables import BrokenSample

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; right and bottom exclusive


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


def compact_region(region: Any, width: int, height: int, name: str) -> dict[str, Any]:
    """
    Returns a region as [`RegionSample`] has them in the columns of a part: a `box`, or a `mask` that is a compressed
    run-length encoding.

    Args:
        region: The region.
        width, height (`int`): Of the picture, in pixels.
        name (`str`): What the annotation is called in an error.

    Raises:
        BrokenSample: If it is none of these, is of another picture's size, leads far out of its picture, or covers
            no pixel of it.
    """
    if isinstance(region, tuple):
        _check_box(region, width, height, name)
        return {"box": list(region)}
    return {"mask": _encode(region, width, height, name)}


def _check_box(box: Box, width: int, height: int, name: str) -> None:
    if len(box) != 4 or not all(is_number(value) for value in box):
        raise _broken(name, f"the box is {box}")
    left, top, right, bottom = box
    columns = min(math.ceil(right), width) - max(math.ceil(left), 0)
    rows = min(math.ceil(bottom), height) - max(math.ceil(top), 0)
    if columns <= 0 or rows <= 0:
        raise _empty(f"box {box}", name, width, height)


def _encode(segmentation: Any, width: int, height: int, name: str) -> dict[str, Any]:
    """Returns a segmentation of COCO's kinds as a compressed run-length encoding."""
    masks = _coco_masks()
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if not isinstance(size, list | tuple) or list(size) != [height, width]:
            raise BrokenSample(
                "with a region of another size",
                f"The segmentation of {name} has the size {size}, its picture {[height, width]} (height, width).",
            )
        runs = segmentation.get("counts")
        if isinstance(runs, str | bytes):
            runs = _runs(runs.encode() if isinstance(runs, str) else runs)
        # pycocotools writes wherever the runs lead to, also behind the end of the picture.
        if not isinstance(runs, list) or any(not isinstance(run, int) or run < 0 for run in runs):
            raise _broken(name, "its counts are no runs of pixels")
        if sum(runs) != width * height:
            raise _broken(name, f"its runs do not add up to the {width * height} pixels of the picture")
        encoded = masks.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    else:
        if not isinstance(segmentation, list) or not segmentation:
            raise _broken(name, f"it is {segmentation!r}")
        for polygon in segmentation:
            # pycocotools takes four numbers for a box, and draws each pixel of an edge, however far it leads.
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise _broken(name, f"a polygon is {polygon!r}, not three points or more")
            if not all(is_number(value) for value in polygon):
                raise _broken(name, "a polygon's coordinate is no finite number")
            if any(not -size <= value <= 2 * size for i, size in ((0, width), (1, height)) for value in polygon[i::2]):
                raise _broken(name, f"a polygon leads far out of its picture of {width} x {height}")
        encoded = masks.merge(masks.frPyObjects(segmentation, height, width))
    if not masks.area(encoded):
        raise _empty("segmentation", name, width, height)
    return {"path": None, "size": [height, width], "counts": encoded["counts"]}


def _runs(counts: bytes) -> list[int] | None:
    """Decodes COCO's compressed runs, each after the third stored as the difference to the last but one."""
    runs: list[int] = []
    value, shift = 0, 0
    for byte in counts:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 50:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    return None if shift else runs


def is_number(value: Any) -> bool:
    """Tells whether a value of JSON is a number that a coordinate may have: finite, and exact as a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**53  # NaN is not


def _broken(name: str, why: str) -> BrokenSample:
    return BrokenSample(
        "with a broken region",
        f"The region of {name} cannot be read: {why}. Expected a box of four numbers, polygons "
        f"[[x0, y0, x1, y1, x2, y2, ...], ...] or a run-length encoding {{'size': [height, width], 'counts': ...}}.",
    )


def _empty(what: str, name: str, width: int, height: int) -> BrokenSample:
    return BrokenSample(
        "with an empty region",
        f"The {what} of {name} covers no pixel of its picture of {width} x {height}. Leave it out, or set "
        f"`data.on_error: skip`, which counts such samples.",
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
