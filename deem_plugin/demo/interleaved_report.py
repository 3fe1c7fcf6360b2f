"""Looks at an interleaved model of the demo: asks it, shows it regions, has it draw; and writes the report."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image, to_tensor
from tqdm.auto import tqdm

from deem_plugin.data.chat import render_chat
from deem_plugin.demo.scenes import captions, detail_questions, render_scenes, sample_scenes
from deem_plugin.evaluation.statistics import cluster_totals, estimate
from deem_plugin.evaluation.yes_no import parse_yes_no
from deem_plugin.feedback.diffusion_model import load_diffusion_model
from deem_plugin.models import generate_images, generate_interleaved
from deem_plugin.models.processing import IMAGE_START_TOKEN

from .diffusion_model import shipped_diffusion_model
from .interleaved import HELD_OUT_SEED, TILES, long_captions, mosaics, tile_box
from .models import IMAGE_SIZE

ASKED, FAST_ASKED = 60, 2  # held-out scenes; eight questions each
DRAWN, FAST_DRAWN = 64, 4
SHOWN = 8
QUESTIONS_A_SCENE = 8
BEGINNING = "a big"  # the model goes on with the caption, draws it, and may go on again
BATCH = 32
STEPS = 25
GUIDANCE = 1.5  # the paper's 3.5 oversaturates what a diffusion model of this size draws
ABILITIES = {
    "answers": "yes/no questions on details of held-out scenes (chance 0.5)",
    "regions": "colour and shape of a boxed tile, both right (chance 1/64)",
    "drawings": "drawing nearest, of the pictures of 64 captions, to that of its own (chance 1/64)",
}


@dataclass
class Look:
    """
    What a checkpoint can do.

    Args:
        scores (`dict[str, list]`): For each ability mean, lower and upper end of its 95 % interval.
        drawings (`list[Image.Image]`): The first pictures that it drew.
        examples (`dict[str, list]`): Some questions and answers, some regions and descriptions.
        interleaved (`list`): Texts and pictures that it gave in turn.
    """

    scores: dict[str, list] = field(default_factory=dict)
    drawings: list[Image.Image] = field(default_factory=list)
    examples: dict[str, list] = field(default_factory=dict)
    interleaved: list = field(default_factory=list)


def held_out(count: int, offset: int):
    """Returns held-out scenes; each ability has its own."""
    return sample_scenes(count, torch.Generator().manual_seed(HELD_OUT_SEED + offset))


def _generate(model, processor, texts, images, regions=None, max_new_tokens=8) -> list[str]:
    """Answers prompts with one picture each, in batches."""
    answers = []
    for start in range(0, len(texts), BATCH):
        here = slice(start, start + BATCH)
        inputs = processor(
            images=images[here],
            text=texts[here],
            regions=None if regions is None else regions[here],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def ask(model, processor, count: int) -> tuple[list[bool], list[tuple[str, str, str]]]:
    """Asks about details; returns which answers are right, and question, answer and truth of each."""
    scenes = held_out(count, 0)
    pictures = [to_pil_image(picture) for picture in render_scenes(scenes, IMAGE_SIZE)]
    questions = [
        (index, question, truth)
        for index, pairs in enumerate(detail_questions(scenes))
        for pair in pairs
        for question, truth in zip(pair, ("yes", "no"), strict=True)
    ]
    texts = [
        render_chat(
            processor,
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for _, question, _ in questions
    ]
    answers = _generate(model, processor, texts, [pictures[index] for index, _, _ in questions])
    rows = [(question, answer, truth) for (_, question, truth), answer in zip(questions, answers, strict=True)]
    return [parse_yes_no(answer) == truth for _, answer, truth in rows], rows


def describe(model, processor, count: int) -> tuple[list[bool], list[tuple[str, str, str]]]:
    """Shows regions; returns which descriptions are right, and box, description and truth of each."""
    scenes = held_out(count * TILES**2, 1)
    pictures = [to_pil_image(picture) for picture in mosaics(scenes)]
    images = [picture for picture in pictures for _ in range(TILES**2)]
    boxes = [tile_box(tile) for tile in range(len(images))]
    answers = _generate(model, processor, ["<image>"] * len(images), images, boxes)
    rows = [(str(box), answer, truth) for box, answer, truth in zip(boxes, answers, captions(scenes), strict=True)]
    return [answer == truth for _, answer, truth in rows], rows


def draw(model, processor, count: int) -> tuple[list[bool], list[Image.Image]]:
    """Has captions drawn; returns which drawings are nearest to their own caption's picture, and the drawings."""
    scenes = held_out(count, 2)
    drawings = []
    for start in tqdm(range(0, count, BATCH), desc="drawing", leave=False):
        texts = [text + IMAGE_START_TOKEN for text in long_captions(scenes)[start : start + BATCH]]
        inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt")
        seeds = list(range(start, start + len(texts)))
        drawings += generate_images(model, inputs, seeds, steps=STEPS, guidance=GUIDANCE)
    drawn = torch.stack([to_tensor(picture) for picture in drawings])
    meant = render_scenes(scenes, drawn.shape[-1])
    distances = (drawn[:, None] - meant[None]).square().mean((2, 3, 4))  # (drawings, captions)
    return (distances.argmin(1) == torch.arange(count)).tolist(), drawings


def look_at(checkpoint: Path, fast: bool) -> Look:
    """Loads a checkpoint as a user would and tries its three abilities."""
    from deem_plugin.evaluation.loading import load_vlm

    model, processor = load_vlm(str(checkpoint), "auto", "cpu")
    model.attach_diffusion_model(load_diffusion_model(str(shipped_diffusion_model())))
    look = Look()
    right, rows = ask(model, processor, FAST_ASKED if fast else ASKED)
    look.scores["answers"], look.examples["answers"] = _score(right, QUESTIONS_A_SCENE), rows[:SHOWN]
    right, rows = describe(model, processor, FAST_ASKED if fast else ASKED)
    look.scores["regions"], look.examples["regions"] = _score(right, TILES**2), rows[:SHOWN]
    right, drawings = draw(model, processor, FAST_DRAWN if fast else DRAWN)
    look.scores["drawings"], look.drawings = _score(right, 1), drawings[:SHOWN]
    beginning = processor(text=BEGINNING, return_tensors="pt")
    look.interleaved = generate_interleaved(
        model, processor, beginning, max_images=2, steps=STEPS, guidance=GUIDANCE, max_new_tokens=16, do_sample=False
    )
    return look


def _score(right: list[bool], items_a_picture: int) -> list:
    """Returns mean and 95 % interval; what was asked about one picture counts as one draw."""
    pictures = [index // items_a_picture for index in range(len(right))]
    result = estimate(cluster_totals([float(value) for value in right], pictures))
    return [result.value, result.low, result.high]


def write_report(out: Path, looks: dict[str, Look], fast: bool) -> Path:
    """Writes `report.md` with the scores after each stage, examples, and `drawings.png`."""
    draw_grid(out / "drawings.png", looks, fast)
    lines = ["# DEEM in small: one model that reads, draws, answers and describes regions", ""]
    if fast:
        lines += ["**A short form: a few steps of everything. The scores mean nothing.**", ""]
    lines += ["| after stage | " + " | ".join(ABILITIES) + " |", "|---" * (1 + len(ABILITIES)) + "|"]
    for stage, look in looks.items():
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in look.scores.values()]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {text}" for name, text in ABILITIES.items())]
    lines += ["", "In brackets the 95 % interval over held-out items. Each stage starts from the one before.", ""]
    lines += ["![drawings](drawings.png)", "", "Held-out captions, their pictures, and what each stage draws of them."]
    last = list(looks.values())[-1]
    for name in ("answers", "regions"):
        lines += ["", f"## {name.capitalize()} after the last stage", "", "| asked | said | true |", "|---|---|---|"]
        lines += [f"| {asked} | {said} | {truth} |" for asked, said, truth in last.examples[name]]
    first = list(looks.values())[0].interleaved
    shown = [part if isinstance(part, str) else "(a picture)" for part in first]
    lines += ["", f"## Texts and pictures in turn, after the first stage, from {BEGINNING!r}", "", json.dumps(shown)]
    for number, picture in enumerate(part for part in first if not isinstance(part, str)):
        picture.resize((8 * picture.width,) * 2, Image.Resampling.NEAREST).save(out / f"interleaved-{number}.png")
        lines += ["", f"![picture {number}](interleaved-{number}.png)"]
    path = out / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def draw_grid(path: Path, looks: dict[str, Look], fast: bool):
    """Draws what held-out captions mean, and what each stage makes of them."""
    from matplotlib import pyplot as plt

    scenes = held_out(FAST_DRAWN if fast else DRAWN, 2)[:SHOWN]
    first = list(looks.values())[0].drawings
    count = len(first)
    rows = {"caption's picture": [to_pil_image(p) for p in render_scenes(scenes, first[0].width)][:count]}
    rows |= {stage: look.drawings for stage, look in looks.items()}
    figure, axes = plt.subplots(len(rows), count, figsize=(1.5 * count, 1.7 * len(rows)), squeeze=False)
    for axis_row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axis_row[0].set_ylabel(name, fontsize=8)
    for axis, caption in zip(axes[0], long_captions(scenes), strict=False):
        words = (
            caption.replace(" at the ", "\nat the ")
            .replace(" on a ", "\non a ")
            .replace(" background", "\nbackground")
        )
        axis.set_title(words, fontsize=6)
    figure.tight_layout(w_pad=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
