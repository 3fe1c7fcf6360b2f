"""Image-text retrieval by a CLIP: COCO and Flickr30k from the files that they are distributed as."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from deem_plugin.evaluation.clip import Clip
from deem_plugin.evaluation.questions import QuestionDataError
from deem_plugin.evaluation.statistics import cluster_totals, estimate

RANKS = (1, 5, 10)


def score_retrieval(clip: Clip, captions: str | Path, images: str | Path, encode_images) -> dict[str, Any]:
    """
    Ranks all captions for each picture and all pictures for each caption, by the cosine of their features.

    Recall at k (R@k) is the share of pictures of which some caption of theirs is among the first k, and of captions
    whose picture is, as in CLIP (https://arxiv.org/abs/2103.00020). Ties count against the model.

    Args:
        clip (`Clip`): The model.
        captions (`str` or `Path`): See [`read_captions`].
        images (`str` or `Path`): Folder of the pictures, also in folders below it.
        encode_images (`Callable`): `(paths) -> (pictures, dim)`, features of unit length.

    Returns:
        `dict`: "pictures", "captions", and for "image to text" and "text to image", by "R@1", "R@5" and "R@10":
        "value", its 95 % interval "low" to "high" (a bootstrap over pictures), and "right", which tells for each
        picture or caption whether it is found.

    Raises:
        QuestionDataError: If the file cannot be read, or pictures are missing.
    """
    by_picture = read_captions(captions)
    names = list(by_picture)
    features = encode_images(_find(Path(images).expanduser(), names))
    texts = [text for name in names for text in by_picture[name]]
    owner = torch.tensor([index for index, name in enumerate(names) for _ in by_picture[name]])
    similar = features @ clip.text_features(texts).T  # (pictures, captions)
    own = owner == torch.arange(len(names))[:, None]
    # How many captions of others come before the best of its own, and how many pictures before a caption's own.
    best = similar.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    first_caption = ((similar >= best) & ~own).sum(1)
    of_own = similar[owner, torch.arange(len(texts))]
    first_picture = (similar >= of_own).sum(0) - 1
    keys = [f"{names[index]}#{number}" for number, index in enumerate(owner.tolist())]
    return {
        "pictures": len(names),
        "captions": len(texts),
        "image to text": _recalls(first_caption, names, names),
        "text to image": _recalls(first_picture, keys, [names[index] for index in owner.tolist()]),
    }


def _recalls(places, keys, clusters) -> dict[str, Any]:
    recalls = {}
    for rank in RANKS:
        found = (places < rank).tolist()
        mean = estimate(cluster_totals([float(flag) for flag in found], clusters))
        interval = {"value": mean.value, "low": mean.low, "high": mean.high}
        recalls[f"R@{rank}"] = {**interval, "right": dict(zip(keys, found, strict=True))}
    return recalls


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """
    Reads captions by picture file.

    Known are COCO's `captions_*.json`; Karpathy's `dataset_coco.json` and `dataset_flickr30k.json`, of which the split
    "test" is taken; Flickr30k's `results_20130124.token` (tabs) and `results.csv` (bars).

    Raises:
        QuestionDataError: If the file is none of these, or holds no caption.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = _from_json(json.loads(text)) if path.suffix == ".json" else _from_lines(text)
        captions = defaultdict(list)
        for name, caption in pairs:
            captions[name].append(caption.strip())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QuestionDataError(
            f"{path} is no file of captions that is known ({type(error).__name__}: {error}). Expected COCO's "
            f"captions_*.json, Karpathy's dataset_*.json, or Flickr30k's results_20130124.token or results.csv."
        ) from error
    if not captions:
        raise QuestionDataError(f"{path} holds no captions (of Karpathy's files the split `test` is read).")
    return dict(captions)


def _from_json(data):
    if "annotations" in data:
        names = {image["id"]: image["file_name"] for image in data["images"]}
        return [(names[entry["image_id"]], entry["caption"]) for entry in data["annotations"]]
    images = [image for image in data["images"] if image["split"] == "test"]
    return [(image["filename"], sentence["raw"]) for image in images for sentence in image["sentences"]]


def _from_lines(text):
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith("image_name"):
        # One row of the published file has lost its second bar.
        rows = (next(csv.reader([line], delimiter="|", quoting=csv.QUOTE_NONE)) for line in lines[1:])
        return [(row[0], row[-1].strip().removeprefix("4   ")) for row in rows]
    pairs = []
    for line in lines:
        name, caption = line.split("\t")
        pairs.append((name.rpartition("#")[0], caption))
    return pairs


def _find(folder: Path, names: list[str]) -> list[Path]:
    places = {path.name: path for path in folder.rglob("*") if path.is_file()}
    if missing := [name for name in names if Path(name).name not in places]:
        raise QuestionDataError(
            f"{len(missing)} of {len(names)} pictures are not in {folder} (the first: {missing[0]}). Give the folder "
            f"of the pictures that the captions are about."
        )
    return [places[Path(name).name] for name in names]
