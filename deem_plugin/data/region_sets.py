"""The data sets of regions that a recipe names."""

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from deem_plugin.data.images import load_image
from deem_plugin.data.parts import make_part, part_columns
from deem_plugin.data.region_sources import iter_instances, iter_referring, iter_vcr, iter_visual_genome
from deem_plugin.data.regions import RegionSample, compact_region
from deem_plugin.data.tables import BrokenSample, LeftOut, Listing, reading, stamp_of

# What a recipe may name as `format`; the other keys of a source are the reader's arguments and `image_dir`.
READERS: dict[str, Callable[..., Iterator]] = {
    "coco": iter_instances,
    "refcoco": iter_referring,
    "visual_genome": iter_visual_genome,
    "vcr": iter_vcr,
}
# Pixels. JPEG goes no further, and pycocotools takes memory for what is named.
_LONGEST_SIDE = 65_535
# Arguments of readers that are no files or folders.
_WORDS = ("question", "split")


def list_regions(source: Mapping[str, Any], where: str = "the source") -> Listing:
    """
    Lists the questions of a published data set of regions.

    Args:
        source (`Mapping`): With `format` (a key of `READERS`), `image_dir`, and the arguments of that reader.
        where (`str`): What it is called in an error.

    Returns:
        `Listing`: Of documents, with the size of their picture; opened, each is as `DocumentCollator` takes it.

    Raises:
        ValueError: If the source is not as described, or a file of it is missing.
    """
    from datasets import List, Value

    kind = source.get("format") if isinstance(source, Mapping) else None
    if kind not in READERS:
        raise ValueError(f"{where} is {source!r}; expected a mapping with `format`, one of {', '.join(READERS)}.")
    parameters = inspect.signature(READERS[kind]).parameters
    known = ["format", "image_dir", *parameters]
    required = ["image_dir", *(name for name, item in parameters.items() if item.default is item.empty)]
    if unknown := sorted(set(source) - set(known)):
        raise ValueError(f"{where} has the unknown keys {unknown}; those of the format {kind} are {', '.join(known)}.")
    if missing := [name for name in required if name not in source]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; the format {kind} needs {', '.join(required)}.")
    files = {name: source[name] for name in source if name not in ("format", *_WORDS)}
    for name, file in files.items():
        if not Path(file).exists():
            raise ValueError(f"The `{name}` of {where}, {file}, does not exist. Set it to where the data lie.")
    columns = {
        **{"name": Value("string"), "width": Value("int32"), "height": Value("int32")},
        **{"parts": List(part_columns()), "learn_from": Value("int32")},
    }
    label = f"{kind} {[file for name, file in files.items() if name != 'image_dir'][-1]}"
    stamp = json.dumps([dict(source), stamp_of(*files.values())], sort_keys=True)
    return Listing(label, _rows, {"source": dict(source)}, columns, stamp, open_question)


def open_question(row: dict[str, Any], rng: Random | None = None) -> dict[str, Any]:
    """
    Opens the picture of a listed question.

    Raises:
        BrokenSample: If it is missing, damaged, turned by EXIF data, or not of the size that its annotations name.
    """
    file = next(part["image"] for part in row["parts"] if part["image"] is not None)
    image = load_image(file, turned=False)
    if image.size != (row["width"], row["height"]):
        raise BrokenSample(
            "with a picture of another size",
            f"The picture {file} is {image.width} x {image.height}, but {row['name']} speaks of one of "
            f"{row['width']} x {row['height']}. Its regions would lie elsewhere: use the pictures "
            f"that the annotations were made of.",
        )
    parts = [part if part["image"] is None else part | {"image": image} for part in row["parts"]]
    return {"parts": parts, "learn_from": row["learn_from"]}


def _rows(source: dict[str, Any]) -> Iterator[dict[str, Any] | LeftOut | BrokenSample]:
    arguments = {name: value for name, value in source.items() if name not in ("format", "image_dir")}
    for sample in READERS[source["format"]](**arguments):
        if isinstance(sample, RegionSample):
            try:
                with reading(sample.name):
                    sample = _row(sample, os.path.abspath(source["image_dir"]))
            except BrokenSample as error:
                sample = error
        yield sample


def _row(sample: RegionSample, image_dir: str) -> dict[str, Any]:
    if not sample.answer.strip():
        raise BrokenSample("without answer", f"{sample.name} has no answer to learn. Leave it out.")
    if not all(isinstance(side, int) and 0 < side <= _LONGEST_SIDE for side in (sample.width, sample.height)):
        raise ValueError(f"its picture is {sample.width} x {sample.height}; expected pixels, 1 to {_LONGEST_SIDE}")
    file = os.path.join(image_dir, sample.file)
    parts = []
    for part in sample.prompt:
        if isinstance(part, str):
            parts.append(make_part(text=part))
        else:
            region = compact_region(part, sample.width, sample.height, sample.name)
            parts.append(make_part(image=file, **region))
    parts.append(make_part(text=sample.answer))
    row = {"name": sample.name, "width": sample.width, "height": sample.height, "files": [file]}
    return row | {"parts": parts, "learn_from": len(parts) - 1}
