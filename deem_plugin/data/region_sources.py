"""Readers of the data sets of regions: COCO's format, RefCOCO/+/g, Visual Genome and VCR, each to region samples."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deem_plugin.data.regions import RegionSample
from deem_plugin.data.tables import BrokenSample, LeftOut, iter_json_array, iter_json_lines, reading

Samples = Iterator[RegionSample | LeftOut | BrokenSample]

NAME_QUESTION = "\nWhat is this region?\n"
PART_QUESTION = "\nWhich part of what is this region?\n"
# In the words in which lmms-eval's RefCOCO tasks ask.
DESCRIBE_QUESTION = "\nProvide a short description for this region.\n"


def iter_instances(annotations: str | os.PathLike, question: str = NAME_QUESTION) -> Samples:
    """
    Asks for the category of each object, or part with `PART_QUESTION`.

    For COCO, and for Pascal-Part and PartImageNet in COCO's format (their categories are parts). Crowds are left out:
    their category is that of the single object.

    Args:
        annotations (`str` or `PathLike`): JSON file with `images`, `annotations` and `categories`.
        question (`str`): What is asked behind the region.
    """
    data = _read_coco(annotations, ("images", "annotations", "categories"))
    images = _by_id(data["images"])
    with reading(f"the list of categories in {annotations}"):
        names = {key: category["name"].replace("_", " ") for key, category in _by_id(data["categories"]).items()}

    def ask(annotation: dict[str, Any], name: str) -> Samples:
        if annotation.get("iscrowd"):
            yield LeftOut("of a crowd")
        else:
            answer = names.get(annotation["category_id"], "")
            yield _ask(name, _image_of(annotation, images, name), [coco_region(annotation), question], answer)

    for number, annotation in enumerate(data["annotations"]):
        yield from _named(f"annotation {_id_of(annotation, number)} of {annotations}", annotation, ask)


def iter_referring(
    instances: str | os.PathLike, refs: str | os.PathLike, split: str | None = None, question: str = DESCRIBE_QUESTION
) -> Samples:
    """
    Asks for each expression that refers to an object, of RefCOCO, RefCOCO+ or RefCOCOg.

    Args:
        instances (`str` or `PathLike`): The published `instances.json`, in COCO's format.
        refs (`str` or `PathLike`):
            JSON list of what the published `refs(unc).p` and the like hold: `{"ann_id": ..., "split": ...,
            "sentences": [...]}`, a sentence being a string or `{"sent": ...}`. The published file itself is a pickle,
            which can run any code when it is opened, and is refused.
        split (`str`, *optional*): Take the references of this split only, such as `train`.
        question (`str`): What is asked behind the region.
    """
    if Path(refs).suffix != ".json":
        raise ValueError(
            f"{refs} is no JSON file. The published references are pickles, which may run any code when they are "
            f"opened: write the list that they hold as JSON where you can trust them, and give that file."
        )
    data = _read_coco(instances, ("images", "annotations"))
    images, annotations = _by_id(data["images"]), _by_id(data["annotations"])

    def ask(ref: dict[str, Any], name: str) -> Samples:
        if split is not None and ref.get("split") != split:
            return
        annotation = annotations.get(ref["ann_id"])
        if annotation is None:
            message = f"There is no annotation {ref['ann_id']} in {instances} for {name}."
            raise BrokenSample("without annotation", message)
        for sentence in ref["sentences"]:
            answer = sentence if isinstance(sentence, str) else sentence["sent"]
            yield _ask(name, _image_of(annotation, images, name), [coco_region(annotation), question], answer)

    for number, ref in enumerate(iter_json_array(refs)):
        yield from _named(f"reference {_id_of(ref, number, 'ref_id')} of {refs}", ref, ask)


def iter_visual_genome(
    descriptions: str | os.PathLike, image_data: str | os.PathLike, question: str = DESCRIBE_QUESTION
) -> Samples:
    """
    Asks for the description of each box of Visual Genome.

    Args:
        descriptions (`str` or `PathLike`): The published `region_descriptions.json`.
        image_data (`str` or `PathLike`):
            The published `image_data.json`, which has the pictures' sizes and, in the last two parts of their address,
            their folder (`VG_100K` or `VG_100K_2`) and file.
        question (`str`): What is asked behind the region.
    """
    images = _by_id(iter_json_array(image_data), "image_id")

    def ask(region: dict[str, Any], name: str) -> Samples:
        box = _corners([region["x"], region["y"], region["width"], region["height"]])
        yield _ask(name, _image_of(region, images, name), [box, question], region["phrase"])

    for number, record in enumerate(iter_json_array(descriptions)):
        regions = record.get("regions", []) if isinstance(record, dict) else None
        for place, region in enumerate(regions if isinstance(regions, list) else [record]):
            name = f"region {_id_of(region, f'{number}/{place}', 'region_id')} of {descriptions}"
            yield from _named(name, region, ask)


def iter_vcr(path: str | os.PathLike, metadata_dir: str | os.PathLike) -> Samples:
    """
    Asks VCR's questions: first the objects that question or answer speak of, each with its region, then the question.

    Objects are called by their kind and a number, `person 1`, in question and answer alike. One that speaks of no
    object is left out.

    Args:
        path (`str` or `PathLike`): A published `.jsonl`, such as `train.jsonl`, with `answer_label`.
        metadata_dir (`str` or `PathLike`): Folder that the `metadata_fn` of its records are relative to.
    """

    def ask(record: dict[str, Any], name: str) -> Samples:
        if "answer_label" not in record:
            message = f"{name} has no `answer_label`: test sets cannot be learned from."
            raise BrokenSample("without answer", message)
        answer = record["answer_choices"][record["answer_label"]]
        metadata = json.loads((Path(metadata_dir) / record["metadata_fn"]).read_text(encoding="utf-8"))
        labels = _number(record["objects"])
        mentioned = dict.fromkeys(i for token in record["question"] + answer if isinstance(token, list) for i in token)
        prompt: list[Any] = []
        for index in mentioned:
            polygons = [[float(value) for point in polygon for value in point] for polygon in metadata["segms"][index]]
            prompt += [f"{labels[index]}: ", polygons or tuple(map(float, metadata["boxes"][index][:4])), "\n"]
        if not prompt:
            yield LeftOut("without region")
            return
        image = {"file_name": record["img_fn"], "width": metadata["width"], "height": metadata["height"]}
        yield _ask(name, image, [*prompt, _say(record["question"], labels) + "\n"], _say(answer, labels))

    for number, record in enumerate(iter_json_lines(path)):
        yield from _named(f"question {_id_of(record, number, 'annot_id')} of {path}", record, ask)


def coco_region(annotation: dict[str, Any]) -> Any:
    """Returns the segmentation of an annotation in COCO's format, or its box `[x, y, width, height]` as corners."""
    return annotation.get("segmentation") or _corners(annotation["bbox"])


def _corners(box: list[float]) -> tuple[float, ...]:
    left, top, width, height = map(float, box)
    return left, top, left + width, top + height


def _number(kinds: list[str]) -> list[str]:
    """Returns names of objects by their kinds, counted from 1 within each kind: person 1, person 2, dog 1."""
    return [f"{kind} {kinds[: index + 1].count(kind)}" for index, kind in enumerate(kinds)]


def _say(tokens: list[str | list[int]], labels: list[str]) -> str:
    """Joins VCR's tokens, in which a list of indices speaks of objects, to a sentence."""
    words = [token if isinstance(token, str) else " and ".join(labels[i] for i in token) for token in tokens]
    text = ""
    for word in words:
        glued = not text or word[:1] in ".,?!;:'" or word == "n't"
        text += word if glued else " " + word
    return text


def _named(name: str, record: Any, ask: Callable[[Any, str], Samples]) -> Samples:
    """Yields the samples of a record, or what is wrong with it, by its name."""
    try:
        with reading(name):
            yield from ask(record, name)
    except BrokenSample as error:
        yield error


def _ask(name: str, image: dict[str, Any], prompt: list, answer: str) -> RegionSample:
    file = image.get("file_name")
    if not file:
        # LVIS and Visual Genome name the address alone, whose last two parts are folder and file.
        address = image.get("coco_url") or image.get("url")
        if not address:
            raise BrokenSample("without file name", f"The image of {name} has no `file_name`: {image!r}.")
        file = "/".join(address.split("/")[-2:])
    return RegionSample(name, file, image["width"], image["height"], prompt, answer.strip())


def _image_of(annotation: dict[str, Any], images: dict[Any, dict], name: str) -> dict[str, Any]:
    image = images.get(annotation["image_id"])
    if image is None:
        raise BrokenSample(
            "without image", f"{name} belongs to image {annotation['image_id']}, which its file does not list."
        )
    return image


def _by_id(records: Any, key: str = "id") -> dict[Any, dict]:
    """Returns records by their id; those without one cannot be meant."""
    return {
        record[key]: record
        for record in records
        if isinstance(record, dict) and isinstance(record.get(key), str | int)
    }


def _id_of(record: Any, number: Any, key: str = "id") -> Any:
    """Returns the id of a record, or its number in the file."""
    return record.get(key, f"number {number}") if isinstance(record, dict) else f"number {number}"


def _read_coco(path: str | os.PathLike, keys: tuple[str, ...]) -> dict[str, Any]:
    """Reads a JSON file in COCO's format."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON ({error}): it is broken or cut off. Fetch it again.") from error
    missing = [key for key in keys if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise ValueError(f"{path} is not in COCO's annotation format: it has no {', '.join(missing)}.")
    return data
