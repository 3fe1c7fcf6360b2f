"""
Writes the demo's data: conversations to train on, and held-out questions in the formats that lmms-eval reads.

In training scenes colour and background mostly follow the shape. The tests ask whether a model has learned the shape
all the same (RobustVQA, POPE), and whether its tower has kept what no caption named (details).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from deem_plugin.demo.scenes import (
    COLOR_NAMES,
    RENDITIONS,
    SHAPES,
    Scenes,
    captions,
    detail_questions,
    render_scenes,
    sample_scenes,
)
from deem_plugin.evaluation.details import write_details
from deem_plugin.evaluation.pope import CATEGORIES, import_pope
from deem_plugin.evaluation.robustvqa import PROMPT as ROBUSTVQA_PROMPT
from deem_plugin.evaluation.robustvqa import write_robustvqa

from .models import IMAGE_SIZE

# How often the colour (and, apart from it, the background) follows the shape in training.
TRAIN_CORRELATION = 0.75
# As RobustVQA-V2 is to ImageNet: the same kind of pictures, taken anew.
V2_CORRELATION = 0.8
# What lmms-eval's `pope` appends to each question.
POPE_SUFFIX = "\nAnswer the question using a single word or phrase."
QUESTIONS_A_CONVERSATION = 3
DETAIL_CATEGORIES = ("horizontal", "vertical", "size", "background")
# The held-out scenes are the same for every seed of the training.
TEST_SEED = 5000
PROBE_SEED = 6000


def training_scenes(count: int, seed: int) -> tuple[Scenes, torch.Tensor]:
    """Returns the training scenes of a seed and their pictures `(count, 3, 32, 32)` in [0, 1]."""
    generator = torch.Generator().manual_seed(100 + seed)
    scenes = sample_scenes(count, generator, correlation=TRAIN_CORRELATION)
    return scenes, render_scenes(scenes, IMAGE_SIZE, generator=generator)


def probe_scenes(count: int) -> tuple[Scenes, torch.Tensor]:
    """Returns held-out scenes without correlations, for the probes and for the pictures of the report."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    scenes = sample_scenes(count, generator)
    return scenes, render_scenes(scenes, IMAGE_SIZE, generator=generator)


def pope_question(color: int, shape: int) -> str:
    """Asks for an object as POPE does, without lmms-eval's suffix."""
    name = f"{COLOR_NAMES[color]} {SHAPES[shape]}"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def _others(values: torch.Tensor, generator: torch.Generator, kinds: int = len(SHAPES)) -> torch.Tensor:
    """Returns for each index another one, at random."""
    return (values + torch.randint(1, kinds, values.shape, generator=generator)) % kinds


def training_questions(scenes: Scenes, generator: torch.Generator) -> list[list[tuple[str, str]]]:
    """
    Asks twelve questions about each scene, half of them answered by yes.

    Returns:
        For each scene pairs of prompt and answer: on the main object as RobustVQA asks, on an object of some colour
        as POPE asks, and four pairs on details.
    """
    other_shape, other_color = _others(scenes.shape, generator), _others(scenes.color, generator)
    absent_shape = _others(scenes.shape, generator)
    # Half of the absent objects are those that are frequent in training. If none were, the question alone would tell
    # that an unusual object is absent, and the picture would not be looked at.
    kind = torch.randint(4, (len(scenes),), generator=generator)
    absent = replace(
        scenes,
        color=torch.where(kind < 2, absent_shape, torch.where(kind == 2, other_color, scenes.color)),
        shape=torch.where(kind == 2, scenes.shape, absent_shape),
    )
    questions = []
    for i, details in enumerate(detail_questions(scenes)):
        questions.append(
            [
                (ROBUSTVQA_PROMPT.format(caption=SHAPES[scenes.shape[i]]), "yes"),
                (ROBUSTVQA_PROMPT.format(caption=SHAPES[other_shape[i]]), "no"),
                (pope_question(scenes.color[i], scenes.shape[i]) + POPE_SUFFIX, "yes"),
                (pope_question(absent.color[i], absent.shape[i]) + POPE_SUFFIX, "no"),
                *((prompt, answer) for pair in details for prompt, answer in zip(pair, ("yes", "no"), strict=True)),
            ]
        )
    return questions


def write_training_set(folder: str | Path, scenes: Scenes, pictures: torch.Tensor, seed: int) -> tuple[Path, Path]:
    """
    Writes pictures and two LLaVA files: captions for stage 1, conversations of three questions for stage 2.

    Returns:
        `tuple[Path, Path]`: The two files.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{i}.png" for i in range(len(scenes))]
    for name, picture in zip(names, pictures, strict=True):
        to_pil_image(picture).save(folder / name)

    generator = torch.Generator().manual_seed(200 + seed)
    stage1 = [_record(name, [("", caption)]) for name, caption in zip(names, captions(scenes), strict=True)]
    stage2 = []
    for name, questions in zip(names, training_questions(scenes, generator), strict=True):
        order = torch.randperm(len(questions), generator=generator).tolist()
        for start in range(0, len(order), QUESTIONS_A_CONVERSATION):
            chosen = order[start : start + QUESTIONS_A_CONVERSATION]
            stage2.append(_record(name, [questions[i] for i in chosen]))
    files = folder / "captions.json", folder / "questions.json"
    for file, records in zip(files, (stage1, stage2), strict=True):
        file.write_text(json.dumps(records), encoding="utf-8")
    return files


def _record(image: str, turns: Sequence[tuple[str, str]]) -> dict:
    """Returns one record of a LLaVA file; the image comes before the first question."""
    conversation = []
    for index, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": question if index else f"<image>\n{question}"})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": image, "image": image, "conversations": conversation}


def _test_scenes(offset: int, count: int, rendition: str = "photo", **kwargs) -> tuple[Scenes, list]:
    """Returns held-out scenes and their pictures as PIL images."""
    generator = torch.Generator().manual_seed(TEST_SEED + offset)
    scenes = sample_scenes(count, generator, **kwargs)
    pictures = render_scenes(scenes, IMAGE_SIZE, rendition, generator)
    return scenes, [to_pil_image(picture) for picture in pictures]


def write_test_sets(home: str | Path, cache: str | Path, count: int) -> None:
    """
    Writes the held-out sets where lmms-eval finds them.

    Args:
        home (`str` or `Path`): Folder for RobustVQA and the detail questions, to be named by `DEEM_HOME`.
        cache (`str` or `Path`): Folder for POPE, to be named by `LMMS_EVAL_DATASETS_CACHE`.
        count (`int`): Scenes a set; a multiple of three, since RobustVQA-R has three renditions.
    """
    home = Path(home)
    # Colour and background are those of another shape, and that shape is what is asked for.
    scenes, images = _test_scenes(0, count, correlation=1.0, misleading=True)
    write_robustvqa(_robustvqa_rows(scenes, images, scenes.decoy, "a"), home / "robustvqa" / "robustvqa_a.parquet")

    generator = torch.Generator().manual_seed(TEST_SEED)
    rows = []
    for offset, rendition in enumerate(RENDITIONS[1:], start=1):
        scenes, images = _test_scenes(offset, count // (len(RENDITIONS) - 1), rendition)
        rows += _robustvqa_rows(scenes, images, _others(scenes.shape, generator), f"r-{rendition}")
    write_robustvqa(rows, home / "robustvqa" / "robustvqa_r.parquet")

    scenes, images = _test_scenes(4, count, correlation=V2_CORRELATION)
    rows = _robustvqa_rows(scenes, images, _others(scenes.shape, generator), "v2")
    write_robustvqa(rows, home / "robustvqa" / "robustvqa_v2.parquet")

    scenes, images = _test_scenes(5, count)
    write_details(_detail_rows(scenes, images), home / "details" / "details.parquet")

    scenes, images = _test_scenes(6, count)
    folder = home / "pope"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / "images" / f"{i}.png")
    for category in CATEGORIES:
        lines = [json.dumps(row) for row in _pope_rows(scenes, category, generator)]
        (folder / f"coco_pope_{category}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    import_pope(folder, folder / "images", cache)


def _robustvqa_rows(scenes: Scenes, images: list, wrong: torch.Tensor, source: str) -> Iterator[dict]:
    """Yields two questions an image: its shape, and the wrong one given for it."""
    for i, image in enumerate(images):
        for shape, answer in ((scenes.shape[i], "yes"), (wrong[i], "no")):
            yield {
                "question_id": f"{source}-{i}-{answer}",
                "image_id": f"{source}-{i}",
                "image": image,
                "caption": SHAPES[shape],
                "answer": answer,
                "source": source,
            }


def _detail_rows(scenes: Scenes, images: list) -> Iterator[dict]:
    """Yields eight questions an image."""
    for i, (image, pairs) in enumerate(zip(images, detail_questions(scenes), strict=True)):
        for category, pair in zip(DETAIL_CATEGORIES, pairs, strict=True):
            for question, answer in zip(pair, ("yes", "no"), strict=True):
                yield {
                    "question_id": f"{i}-{category}-{answer}",
                    "image_id": str(i),
                    "image": image,
                    "question": question,
                    "category": category,
                    "answer": answer,
                }


def _pope_rows(scenes: Scenes, category: str, generator: torch.Generator) -> Iterator[dict]:
    """
    Yields two questions an image, as POPE's official files write them.

    What is asked for and is not there is, as in POPE, any object (`random`), one that is frequent in training
    (`popular`), or the one that goes with what is seen: the shape that in training has this colour (`adversarial`).
    """
    color, shape = _others(scenes.color, generator), _others(scenes.shape, generator)
    if category == "popular":
        color = shape
    elif category == "adversarial":
        color, shape = scenes.color, torch.where(scenes.color == scenes.shape, shape, scenes.color)
    for i in range(len(scenes)):
        for c, s, answer in ((scenes.color[i], scenes.shape[i], "yes"), (color[i], shape[i], "no")):
            yield {
                "question_id": f"{category}-{i}-{answer}",
                "image": f"{i}.png",
                "text": pope_question(c, s),
                "label": answer,
            }
