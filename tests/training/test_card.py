"""The model card: provenance, licence, losses and the recipe, as the hub reads it."""

import yaml
from huggingface_hub import ModelCard

from deem_plugin.training.card import write_card
from deem_plugin.training.recipes import build_recipe

LOG = [{"loss": 5.0, "feedback_loss": 1.0, "step": 1}, {"loss": 2.5, "feedback_loss": 0.5, "step": 9}, {"runtime": 3}]


def recipe(denoiser, source="org/vlm"):
    sections = {
        "model": {"model": source, "freeze": ["language_model"]},
        "data": {"path": "questions.json"},
        "feedback": {"denoiser": denoiser, "weight": 3.0},
        "training": {"max_steps": 9, "use_cpu": True, "output_dir": "/secret/place"},
    }
    return build_recipe("mine", sections)


def test_a_card_tells_provenance_losses_and_the_recipe(tmp_path):
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "README.md").write_text("---\nlicense: openrail++\n---\n\nA generator.\n")

    card = ModelCard.load(write_card(tmp_path, recipe(str(tmp_path / "sd")), LOG))

    assert card.data.base_model == "org/vlm" and "diffusion-feedback" in card.data.tags
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "Its licence: openrail++." in card.text and "| feedback_loss | 1 | 0.5 |" in card.text
    sections = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert sections["model"] == {"model": "org/vlm", "freeze": ["language_model"]}
    assert sections["feedback"] == {"denoiser": str(tmp_path / "sd"), "weight": 3.0}
    assert sections["training"]["max_steps"] == 9 and "/secret/place" not in card.text


def test_a_local_folder_is_no_base_model_of_the_hub(tmp_path):
    card = ModelCard.load(write_card(tmp_path, recipe("org/sd", source=str(tmp_path)), []))

    assert card.data.base_model is None
    assert "CreativeML OpenRAIL-M" in card.text and "first logged" not in card.text
