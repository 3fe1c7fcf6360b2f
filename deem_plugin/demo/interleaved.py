"""
Runs the paper's three stages in small: one model that reads and draws scenes, answers, and describes regions.

Each stage starts from the one before. After each the model is asked, told to draw, and shown regions of held-out
pictures, whether it has learned that already or not.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from deem_plugin.data.document_files import write_documents
from deem_plugin.demo.scenes import (
    COLOR_NAMES,
    MAX_SCALE,
    MIN_SCALE,
    TEXTURES,
    Scenes,
    captions,
    detail_questions,
    render_scenes,
    sample_scenes,
)

from .models import IMAGE_SIZE, PRETRAINING_STEPS, build_language_model, build_tokenizer, build_tower, pretrain_tower
from .sets import write_training_set

STAGES = ("deem-tiny-pretrain", "deem-tiny-tune", "deem-tiny-regions")
TRAIN_SCENES, FAST_TRAIN_SCENES = 4000, 96
FAST_STEPS = 3
DATA_SEED, HELD_OUT_SEED = 700, 7000
TILES = 2  # a picture with regions shows TILES x TILES scenes


def long_captions(scenes: Scenes) -> list[str]:
    """Says of each scene all that its words can: `a big red square at the top left on a striped blue background`."""
    middle = (MIN_SCALE + MAX_SCALE) / 2
    result = []
    for index, caption in enumerate(captions(scenes)):
        size = "big" if scenes.scale[index] > middle else "small"
        vertical = "top" if scenes.y[index] < 0 else "bottom"
        horizontal = "left" if scenes.x[index] < 0 else "right"
        ground = f"{TEXTURES[scenes.texture[index]]} {COLOR_NAMES[scenes.background[index]]}"
        article, object_ = caption.split(" ", 1)
        result.append(f"{article} {size} {object_} at the {vertical} {horizontal} on a {ground} background")
    return result


def mosaics(scenes: Scenes, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws each `TILES**2` scenes as one picture `(pictures, 3, 32, 32)` in [0, 1], row by row."""
    tiles = render_scenes(scenes, IMAGE_SIZE // TILES, generator=generator).unflatten(0, (-1, TILES, TILES))
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def tile_box(index: int) -> list[int]:
    """Returns the box of a mosaic's `index`-th tile, `[left, top, right, bottom]` in pixels."""
    side = IMAGE_SIZE // TILES
    row, column = divmod(index % TILES**2, TILES)
    return [column * side, row * side, (column + 1) * side, (row + 1) * side]


def write_data(folder: Path, count: int) -> None:
    """Writes the training data of the three stages: documents, conversations and documents with regions."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    scenes = sample_scenes(count, generator)
    write_training_set(folder, scenes, render_scenes(scenes, IMAGE_SIZE, generator=generator), seed=0)
    texts = long_captions(scenes)
    documents = []
    for index in range(count):
        image, other = {"image": f"images/{index}.png"}, {"image": f"images/{(index + 1) % count}.png"}
        # The picture before its text or behind it, as in the paper; every fourth document has two of them.
        parts = [texts[index], image] if index % 2 else [image, texts[index]]
        documents.append({"parts": parts + ([texts[(index + 1) % count], other] if index % 4 == 3 else [])})
    write_documents(folder / "documents.jsonl", documents)

    tiles = sample_scenes(count, generator)
    names, regions = captions(tiles), []
    (folder / "mosaics").mkdir(exist_ok=True)
    for index, picture in enumerate(mosaics(tiles, generator)):
        to_pil_image(picture).save(folder / "mosaics" / f"{index}.png")
        for tile in range(TILES**2):
            image = {"image": f"mosaics/{index}.png", "box": tile_box(tile)}
            regions.append({"parts": [image, names[index * TILES**2 + tile]], "learn_from": 1})
    # Among them questions of the second stage: a model of this size forgets what it does not meet.
    for index, pairs in enumerate(detail_questions(scenes)):
        question, answer = random_question(pairs, generator)
        parts = [{"image": f"images/{index}.png"}, question, answer]
        regions.append({"parts": parts, "learn_from": 2})
    order = torch.randperm(len(regions), generator=generator).tolist()
    write_documents(folder / "regions.jsonl", [regions[index] for index in order])


def random_question(pairs: list[tuple[str, str]], generator: torch.Generator) -> tuple[str, str]:
    """Draws one of a scene's questions (pairs of one answered by yes and one by no), with its answer."""
    pair, answer = (int(torch.randint(high, (), generator=generator)) for high in (len(pairs), 2))
    return pairs[pair][answer], ("yes", "no")[answer]


def save_parts(folder: Path, count: int, steps: int) -> None:
    """Saves what stage 1 is assembled of: a new language model, and a tower that has been taught shape names."""
    tokenizer = build_tokenizer(image_token=False)
    with torch.random.fork_rng():
        torch.manual_seed(DATA_SEED)
        language_model = build_language_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
        tower = build_tower()
    generator = torch.Generator().manual_seed(DATA_SEED)
    scenes = sample_scenes(count, generator)
    pictures = render_scenes(scenes, IMAGE_SIZE, generator=generator)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (tower.config.image_mean, tower.config.image_std))
    pretrain_tower(tower, (pictures - mean) / std, scenes, DATA_SEED, steps)
    language_model.save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    tower.save_pretrained(folder / "tower")


def main(out_dir: str | Path, fast: bool = False) -> int:
    """
    Trains the three stages one after another and writes `report.md` with pictures to `out_dir`.

    Args:
        out_dir (`str` or `Path`): Folder to write; what an earlier run left in it is replaced.
        fast (`bool`): Whether a few steps on little data must do, to see that everything runs.

    Returns:
        `int`: Exit status.
    """
    from deem_plugin.training.recipes import load_recipe
    from deem_plugin.training.run import train

    from .diffusion_model import shipped_diffusion_model
    from .interleaved_report import look_at, write_report

    out = Path(out_dir).absolute()
    for stale in ("data", "cache", "language_model", "tower", *STAGES):
        shutil.rmtree(out / stale, ignore_errors=True)
    (out / "data").mkdir(parents=True, exist_ok=True)
    count = FAST_TRAIN_SCENES if fast else TRAIN_SCENES
    write_data(out / "data", count)
    save_parts(out, count, 2 if fast else PRETRAINING_STEPS)
    checkpoint, looks = None, {}
    for stage in STAGES:
        overrides = [f"data.cache_dir={out / 'cache'}", f"training.output_dir={out / stage}"]
        if checkpoint is None:
            overrides += [f"model.language_model={out / 'language_model'}", f"model.vision_tower=deem:{out / 'tower'}"]
        else:
            overrides.append(f"model.model={checkpoint}")
        recipe = load_recipe(stage, overrides)
        recipe.data.path = str(out / "data" / Path(recipe.data.path).name)
        if recipe.deem.denoiser is not None:
            recipe.deem.denoiser = str(shipped_diffusion_model())
        if fast:
            recipe.training.max_steps = FAST_STEPS
            recipe.training.logging_steps = 1
        checkpoint = train(recipe)
        looks[stage] = look_at(checkpoint, fast)
        (out / stage / "look.json").write_text(json.dumps(looks[stage].scores), encoding="utf-8")
    report = write_report(out, looks, fast)
    sys.stdout.write(f"Report: {report}\n")
    return 0
