"""A part of a document: a text, a picture, or a picture of which one region is meant."""

from typing import Any

# How a picture part may say which region of it is meant; without one of them the whole picture is.
REGION_KEYS = ("box", "points", "mask")


def make_part(**given) -> dict[str, Any]:
    """Returns a part with `text`, `image`, `box`, `points` and `mask`; those that are not given are `None`."""
    return dict.fromkeys(("text", "image", *REGION_KEYS)) | given


def part_columns() -> dict[str, Any]:
    """
    Returns the columns of a part in a table: a box `(left, top, right, bottom)` and points in pixels, and as a mask
    either the path of a picture that is not black inside or COCO's run-length encoding.
    """
    from datasets import List, Value

    return {
        "text": Value("string"),
        "image": Value("string"),
        "box": List(Value("float64")),
        "points": List(List(Value("float64"))),
        "mask": {"path": Value("string"), "size": List(Value("int32")), "counts": Value("binary")},
    }


def region_of(part: dict[str, Any]) -> Any:
    """Returns the region of an opened part as `region_mask` takes it; `None` for the whole picture."""
    return next((part[key] for key in REGION_KEYS if part[key] is not None), None)
