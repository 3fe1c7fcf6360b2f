"""The model card: provenance, licence, losses and the recipe, as the hub reads it."""

import pytest
import yaml
from huggingface_hub import ModelCard

from deem_plugin.training.card import write_card
from deem_plugin.training.recipes import build_recipe

LOG = [{"loss": 5.0, "feedback_loss": 1.0, "step": 1}, {"loss": 2.5, "feedback_loss": 0.5, "step": 9}, {"runtime": 3}]


def recipe(denoiser, source="org/vlm"):
    sections = {
        "model": {"model": source, "freeze": ["language_model"]},
        "data": {"path": "questions.json"},
        "feedback": {"diffusion_model": {"path": denoiser}, "weight": 3.0},
        "training": {"max_steps": 9, "use_cpu": True, "output_dir": "/secret/place"},
    }
    return build_recipe("mine", sections)


def test_a_card_tells_provenance_losses_and_the_recipe(tmp_path):
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "README.md").write_text("---\nlicense: openrail++\n---\n\nA diffusion model.\n")

    card = ModelCard.load(write_card(tmp_path, recipe(str(tmp_path / "sd")), LOG))

    assert card.data.base_model == "org/vlm" and "diffusion-feedback" in card.data.tags
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "Its licence: openrail++." in card.text and "| feedback_loss | 1 | 0.5 |" in card.text
    sections = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert sections["model"] == {"model": "org/vlm", "freeze": ["language_model"]}
    assert sections["feedback"] == {"diffusion_model": {"path": str(tmp_path / "sd")}, "weight": 3.0}
    assert sections["training"]["max_steps"] == 9 and "/secret/place" not in card.text


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"path": "a.jsonl", "kind": "documents"}, "Data: `a.jsonl`."),
        ({"kind": "shards", "interleaved": "mmc4/*.tar", "pairs": "blip/*.tar"}, "Data: `mmc4/*.tar`, `blip/*.tar`."),
        (
            {"kind": "regions", "sources": [{"format": "coco", "annotations": "a.json", "image_dir": "coco"}]},
            "Data: `coco: coco`.",
        ),
    ],
)
def test_the_card_of_an_interleaved_model_says_how_it_is_loaded_and_names_its_data(tmp_path, data, named):
    sections = {"model": {"model": "org/deem"}, "data": data, "deem": {"denoiser": "org/sd"}}

    text = ModelCard.load(write_card(tmp_path, build_recipe("mine", sections), LOG)).text

    assert named in text and "gave the feedback and is not part of it" in text and "CreativeML OpenRAIL-M" in text
    assert "import deem_plugin.models" in text and "without any diffusion model" in text
    assert yaml.safe_load(text.rsplit("```yaml", 1)[1].split("```")[0])["data"].keys() == data.keys()


def test_the_card_of_a_later_stage_names_the_diffusion_models_of_the_earlier_ones(tmp_path):
    for stage, denoiser in (("one", "org/sd"), ("two", None)):
        (tmp_path / stage).mkdir()
        sections = {"model": {"model": "org/deem" if denoiser else str(tmp_path / "one")}, "data": {"path": "x"}}
        weights = {} if denoiser else {"image_weight": 0, "feedback_weight": 0}
        write_card(tmp_path / stage, build_recipe(stage, sections | {"deem": {"denoiser": denoiser, **weights}}), [])

    text = ModelCard.load(tmp_path / "two" / "README.md").text

    assert "The frozen diffusion model `org/sd` gave the feedback" in text and "CreativeML OpenRAIL-M" in text


def test_a_local_folder_is_no_base_model_of_the_hub(tmp_path):
    card = ModelCard.load(write_card(tmp_path, recipe("org/sd", source=str(tmp_path)), []))

    assert card.data.base_model is None
    assert "CreativeML OpenRAIL-M" in card.text and "first logged" not in card.text
