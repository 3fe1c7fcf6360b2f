"""What a CLIP sees by itself: details (MMVP-VLM), and what training may have cost it: classes, retrieval, a probe."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from deem_plugin.data.images import IMAGE_SUFFIXES, load_image
from deem_plugin.evaluation import imagenet
from deem_plugin.evaluation.clip import Clip, load_clip
from deem_plugin.evaluation.questions import QuestionDataError
from deem_plugin.evaluation.retrieval import score_retrieval
from deem_plugin.evaluation.statistics import cluster_totals, estimate

# MMVP-VLM's nine patterns; a pair's place in the question file says which is its.
PATTERNS = (
    "orientation and direction",
    "presence of specific features",
    "state and condition",
    "quantity and count",
    "positional and relational context",
    "color and appearance",
    "structural characteristics",
    "texts",
    "viewpoint and perspective",
)
PAIRS_A_PATTERN = 15
# The folder's name in the published data, and in the copy of some users of it.
_IMAGE_FOLDERS = ("MLLM_VLM Images", "MLLM_VLM_Images")


@dataclass(frozen=True)
class EncoderData:
    """
    What a CLIP is evaluated on; what is left out is not.

    Args:
        mmvp_vlm (`Path`, *optional*): Folder of MMVP-VLM, see [`score_mmvp_vlm`].
        zero_shot (`Path`, *optional*): Pictures sorted by class, see [`score_zero_shot`].
        retrieval (`tuple[Path, Path]`, *optional*): Captions and pictures, see
            [`~deem_plugin.evaluation.retrieval.score_retrieval`].
        linear_probe (`tuple[Path, Path]`, *optional*): Folders to fit and to score on, see [`score_linear_probe`].
    """

    mmvp_vlm: Path | None = None
    zero_shot: Path | None = None
    retrieval: tuple[Path, Path] | None = None
    linear_probe: tuple[Path, Path] | None = None


def evaluate_encoder(
    name: str, data: EncoderData, *, pretrained: str | None = None, device: str | None = None, batch_size: int = 32
) -> dict[str, Any]:
    """
    Evaluates a CLIP or SigLIP, vision and text tower, in float32.

    Args:
        name (`str`): Model name of open_clip, or a folder or hub id, see `clip.load_clip`.
        data (`EncoderData`): What to evaluate it on.
        pretrained (`str`, *optional*): For a model name of open_clip: its weights.
        device (`str`, *optional*): By default a GPU where there is one, else the CPU.
        batch_size (`int`): Pictures encoded at once.

    Returns:
        `dict`: "mmvp_vlm", "zero_shot", "retrieval" and "linear_probe" as asked for, beside "model" and "weights"
        (their hash).

    Raises:
        ValueError: If nothing is asked for, or the model or the data cannot be used.
    """
    if data == EncoderData():
        raise ValueError(
            "Nothing to evaluate on: give data for --mmvp-vlm, --zero-shot, --retrieval or --linear-probe."
        )
    clip = load_clip(name, pretrained, device)
    result: dict[str, Any] = {"model": name, "pretrained": pretrained, "weights": clip.weights_hash()}
    if data.mmvp_vlm is not None:
        result["mmvp_vlm"] = score_mmvp_vlm(clip, data.mmvp_vlm, batch_size)
    if data.zero_shot is not None:
        result["zero_shot"] = score_zero_shot(clip, data.zero_shot, batch_size)
    if data.retrieval is not None:
        result["retrieval"] = score_retrieval(
            clip, *data.retrieval, lambda paths: _encode_images(clip, paths, batch_size)
        )
    if data.linear_probe is not None:
        result["linear_probe"] = score_linear_probe(clip, *data.linear_probe, batch_size)
    return result


def score_mmvp_vlm(clip: Clip, folder: str | Path, batch_size: int = 32) -> dict[str, Any]:
    """
    Scores MMVP-VLM (https://arxiv.org/abs/2401.06209) as its authors and their successors do.

    A pair has two pictures and a text for each. Each text chooses a picture by the softmax of the two logits, the
    second where they tie, and a pair is right when both texts choose theirs. Guessing gets 25 %.

    Args:
        clip (`Clip`): The model.
        folder (`str` or `Path`): Folder as published: `Questions.csv`, and `MLLM_VLM Images` with a folder a pattern.
        batch_size (`int`): Pictures encoded at once.

    Returns:
        `dict`:
            "patterns" (share of right pairs of each), "mean" over patterns, its 95 % interval "low" to "high" (a
            bootstrap over pairs), and "right", which tells for each pair whether it is.

    Raises:
        QuestionDataError: If files are missing, malformed or unreadable.
    """
    folder = Path(folder).expanduser()
    rows = _read_statements(folder / "Questions.csv")
    images = next((folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir()), folder / _IMAGE_FOLDERS[0])
    paths = [images / pattern / f"{number}.jpg" for number, pattern, _ in rows]
    if missing := [path for path in paths if not path.is_file()]:
        raise QuestionDataError(
            f"{len(missing)} of {len(paths)} pictures are missing (the first: {missing[0]}). Complete the download."
        )
    seen = _encode_images(clip, paths, batch_size)
    texts = clip.text_features([f"a photo of {statement}" for _, _, statement in rows])
    numbers = [number for number, _, _ in rows]
    right = pairs_right(seen.unflatten(0, (-1, 2)), texts.unflatten(0, (-1, 2)), clip.logit_scale, numbers)
    return _summary_of_pairs(right)


def pairs_right(images: torch.Tensor, texts: torch.Tensor, logit_scale: float, numbers: Sequence[int]) -> list[bool]:
    """
    Tells which pairs are right.

    Args:
        images (`torch.Tensor`): Features of unit length, (pairs, 2, dim).
        texts (`torch.Tensor`): Features of unit length, (pairs, 2, dim).
        logit_scale (`float`): Factor on the cosine similarities.
        numbers (`Sequence[int]`): Number of each text's question, pair by pair; odd ones describe the first picture.
    """
    logits = logit_scale * texts.float() @ images.float().transpose(1, 2)  # (pairs, texts, images)
    takes_first = logits.softmax(-1)[..., 0] > 0.5
    is_first = torch.tensor([number % 2 == 1 for number in numbers]).view(-1, 2)
    return (takes_first == is_first).all(-1).tolist()


def _summary_of_pairs(right: list[bool]) -> dict[str, Any]:
    patterns = [right[start : start + PAIRS_A_PATTERN] for start in range(0, len(right), PAIRS_A_PATTERN)]
    mean = estimate(cluster_totals([float(flag) for flag in right], range(len(right))))
    return {
        "patterns": {name: sum(flags) / len(flags) for name, flags in zip(PATTERNS, patterns, strict=True)},
        "mean": mean.value,
        "low": mean.low,
        "high": mean.high,
        "right": right,
    }


def _read_statements(path: Path) -> list[tuple[int, str, str]]:
    """Returns number, pattern folder and statement of each question, two successive ones being a pair."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file) if line][1:]
        rows = [(int(number), pattern, statement) for number, pattern, statement in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise QuestionDataError(
            f"{path} is no question file of MMVP-VLM ({error}); expected a header and lines of number, pattern and "
            f"statement. Give the folder as published."
        ) from error
    if len(rows) != (expected := 2 * PAIRS_A_PATTERN * len(PATTERNS)):
        raise QuestionDataError(f"{path} has {len(rows)} questions; MMVP-VLM has {expected}.")
    return rows


def score_zero_shot(clip: Clip, folder: str | Path, batch_size: int = 32) -> dict[str, Any]:
    """
    Classifies pictures among the classes of their folder, by the mean text feature of open_clip's seven templates.

    Args:
        clip (`Clip`): The model.
        folder (`str` or `Path`):
            One subfolder for each class, called by wnid or class index of ImageNet, or else by the class's name.
        batch_size (`int`): Pictures encoded at once.

    Returns:
        `dict`:
            "accuracy", its 95 % interval "low" to "high" (a bootstrap over pictures), "mean_per_class", "classes",
            "pictures", and "right", which tells for each picture, by its path, whether it is.

    Raises:
        QuestionDataError: If the folder is missing or holds no picture of at least two classes, or one is unreadable.
    """
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    root = Path(folder).expanduser()
    paths, labels, names = _list_classes(root)
    features = [
        clip.text_features([template(name) for template in SIMPLE_IMAGENET_TEMPLATES]).mean(0)
        for name in tqdm(names, desc="Reading class names")
    ]
    classes = torch.nn.functional.normalize(torch.stack(features), dim=-1)
    predicted = (_encode_images(clip, [root / path for path in paths], batch_size) @ classes.T).argmax(-1).tolist()
    right = [guess == label for guess, label in zip(predicted, labels, strict=True)]
    mean = estimate(cluster_totals([float(flag) for flag in right], paths))
    by_class = [[flag for flag, at in zip(right, labels, strict=True) if at == label] for label in range(len(names))]
    return {
        "accuracy": mean.value,
        "low": mean.low,
        "high": mean.high,
        "mean_per_class": sum(sum(flags) / len(flags) for flags in by_class) / len(by_class),
        "classes": len(names),
        "pictures": len(paths),
        "right": dict(zip(paths, right, strict=True)),
    }


def score_linear_probe(clip: Clip, fitted: str | Path, scored: str | Path, batch_size: int = 32) -> dict[str, Any]:
    """
    Classifies pictures by a logistic regression on their features of unit length, with the strength of CLIP's example
    (https://github.com/openai/CLIP, C = 0.316).

    Args:
        clip (`Clip`): The model.
        fitted (`str` or `Path`): Pictures that the regression is fitted to, one subfolder for each class.
        scored (`str` or `Path`): Pictures that it is scored on, in subfolders of the same names.
        batch_size (`int`): Pictures encoded at once.

    Returns:
        `dict`: "accuracy", "low", "high", "classes", "pictures" and "right", as of [`score_zero_shot`].

    Raises:
        QuestionDataError: If a folder is missing or empty, or the two have other classes.
    """
    from sklearn.linear_model import LogisticRegression

    sets = []
    for folder in (fitted, scored):
        root = Path(folder).expanduser()
        paths, labels, names = _list_classes(root)
        sets.append((_encode_images(clip, [root / path for path in paths], batch_size).numpy(), labels, paths, names))
    if sets[0][3] != sets[1][3]:
        only = sorted(set(sets[0][3]) ^ set(sets[1][3]))
        raise QuestionDataError(f"{fitted} and {scored} have other classes ({only[0]} is in one of them alone).")
    probe = LogisticRegression(C=0.316, max_iter=1000).fit(*sets[0][:2])
    features, labels, paths, names = sets[1]
    right = [bool(guess == label) for guess, label in zip(probe.predict(features), labels, strict=True)]
    mean = estimate(cluster_totals([float(flag) for flag in right], paths))
    counts = {"classes": len(names), "pictures": len(paths), "right": dict(zip(paths, right, strict=True))}
    return {"accuracy": mean.value, "low": mean.low, "high": mean.high, **counts}


def _list_classes(root: Path) -> tuple[list[str], list[int], list[str]]:
    """Returns the pictures, relative to `root`, the place of each one's class, and the names of the classes."""
    folders = imagenet.class_folders(root)
    indices = [index for _, index in folders]
    # A wnid by which the 1,000 classes are not called would be read to the model as if it were a name.
    if unknown := [path.name for path, _ in folders if re.fullmatch(r"n\d{8}", path.name) and None in indices]:
        raise QuestionDataError(
            f"{root} has folders called by wnid ({unknown[0]}) beside others, or by wnids that are no class of "
            f"ImageNet-1k. Call all folders by wnids of ImageNet-1k, or by the classes' names."
        )
    of_imagenet = None not in indices
    paths, labels, names = [], [], []
    for folder, index in folders:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            continue
        paths += [path.relative_to(root).as_posix() for path in found]
        labels += [len(names)] * len(found)
        names.append(imagenet.clear_names()[index] if of_imagenet else imagenet.plain(folder.name))
    if len(names) < 2:
        raise QuestionDataError(
            f"{root} has {len(names)} subfolders with pictures; expected one for each of at least two classes, called "
            f"by wnid, class index or name."
        )
    return paths, labels, names


def _encode_images(clip: Clip, paths: Sequence[Path], batch_size: int) -> torch.Tensor:
    """Returns features of unit length, (pictures, dim), in float32."""
    features = []
    with tqdm(total=len(paths), desc="encoding pictures") as progress:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            features.append(clip.image_features(list(_open(batch))))
            progress.update(len(batch))
    return torch.cat(features)


def _open(paths: Iterable[Path]) -> Iterable[Image.Image]:
    for path in paths:
        try:
            yield load_image(path)
        except ValueError as error:
            raise QuestionDataError(f"Cannot read the picture {path}: {error}") from error
