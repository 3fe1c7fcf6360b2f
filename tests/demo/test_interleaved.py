"""The three stages in small: what the data says of the pictures, and a short run of everything."""

import json

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from deem_plugin.demo import interleaved_report as report
from deem_plugin.demo.interleaved import STAGES, long_captions, main, mosaics, tile_box, write_data
from deem_plugin.demo.interleaved_report import ABILITIES
from deem_plugin.demo.models import IMAGE_SIZE, build_tokenizer
from deem_plugin.demo.scenes import captions, render_scenes, sample_scenes

from ..models.tiny_deem import tiny_deem


@pytest.fixture
def scenes():
    return sample_scenes(8, torch.Generator().manual_seed(0))


def test_a_long_caption_says_what_its_scene_shows_in_words_that_the_tokenizer_knows(scenes):
    tokenizer = build_tokenizer(image_token=False)
    for index, caption in enumerate(long_captions(scenes)):
        assert ("left" in caption.split()) == bool(scenes.x[index] < 0)
        assert ("top" in caption.split()) == bool(scenes.y[index] < 0)
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) == len(caption.split())
    assert "<image>" not in tokenizer.get_vocab()


def test_each_box_of_a_mosaic_holds_its_own_scene(scenes):
    pictures, tiles = mosaics(scenes), render_scenes(scenes, IMAGE_SIZE // 2)

    assert pictures.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    for index, tile in enumerate(tiles):
        left, top, right, bottom = tile_box(index)
        assert torch.equal(pictures[index // 4, :, top:bottom, left:right], tile)


def test_the_data_of_the_three_stages_is_written(tmp_path):
    write_data(tmp_path, 8)

    documents = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert [isinstance(document["parts"][0], str) for document in documents] == [False, True] * 4
    assert [len(document["parts"]) for document in documents] == [2, 2, 2, 4] * 2
    regions = [json.loads(line) for line in (tmp_path / "regions.jsonl").read_text().splitlines()]
    assert len(regions) == 8 + 8  # two mosaics of four tiles, and a question about each scene
    assert sum("box" in document["parts"][0] for document in regions) == 8
    assert {document["parts"][2] for document in regions if len(document["parts"]) == 3} <= {"yes", "no"}


class _Marks:
    """In the place of a processor: the last image start of each text, which is where a picture begins."""

    def __call__(self, text, **kwargs):
        assert all(each.endswith("<image_start>") for each in text)
        return {"text": text}


def test_an_answer_is_right_where_it_says_what_is_true_of_the_scene(monkeypatch):
    """Always yes: right for the first of each pair of questions. The other way round, and with no verdict at all."""
    for answers, expected in (
        (("yes",) * 2, [True, False]),
        (("no", "yes"), [False] * 2),
        (("red",) * 2, [False] * 2),
    ):
        monkeypatch.setattr(report, "_generate", lambda *args, said=answers: list(said) * (len(args[2]) // 2))

        right, rows = report.ask(None, tiny_deem()[1], 2)

        assert right == expected * report.QUESTIONS_A_SCENE
        assert [truth for _, _, truth in rows] == ["yes", "no"] * report.QUESTIONS_A_SCENE


def test_a_description_is_right_where_it_is_the_caption_of_its_own_tile(monkeypatch):
    texts = captions(report.held_out(8, 1))
    said = [texts[0].replace(texts[0].split()[0], "no"), *texts[1:7], texts[6]]
    monkeypatch.setattr(report, "_generate", lambda *args: said)

    right, _ = report.describe(None, None, 2)

    assert right == [False] + [True] * 6 + [texts[6] == texts[7]]


def test_a_drawing_is_right_where_no_other_caption_is_nearer(monkeypatch):
    """The pictures of the captions themselves, the first two exchanged."""
    pictures = [to_pil_image(picture) for picture in render_scenes(report.held_out(6, 2), 32)]
    drawn = [pictures[1], pictures[0], *pictures[2:]]
    monkeypatch.setattr(report, "generate_images", lambda model, inputs, seeds, **kwargs: drawn)

    right, _ = report.draw(None, _Marks(), 6)

    assert right == [False, False, True, True, True, True]


@pytest.mark.slow
def test_a_short_form_runs_all_stages_and_writes_the_report(tmp_path):
    assert main(tmp_path, fast=True) == 0

    report = (tmp_path / "report.md").read_text()
    assert "The scores mean nothing" in report
    for stage in STAGES:
        assert f"| {stage} |" in report
        scores = json.loads((tmp_path / stage / "look.json").read_text())
        assert scores.keys() == ABILITIES.keys()
        assert (tmp_path / stage / "final" / "model.safetensors").is_file()
    assert (tmp_path / "drawings.png").stat().st_size > 5000
