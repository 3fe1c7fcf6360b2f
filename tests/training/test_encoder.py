"""An encoder alone, in the space that it shares with its text tower."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, SiglipConfig, SiglipModel

from deem_plugin.feedback import DiffusionFeedbackCallback
from deem_plugin.training.encoder import AlignedEncoder, load_encoder, vision_part
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from ..feedback.helpers import GradientProbe
from ..tiny import IMAGE_SIZE
from .helpers import tiny_overrides

PIXELS = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clip(parts):
    return AutoModel.from_pretrained(parts / "clip").eval()


def test_the_pooled_vector_is_the_one_that_text_is_compared_with(clip):
    output = vision_part(clip, reads_pooled=True)(PIXELS)

    torch.testing.assert_close(output.pooler_output, clip.get_image_features(PIXELS).pooler_output)
    states = clip.vision_model(PIXELS).last_hidden_state[:, 1:]
    expected = clip.visual_projection(clip.vision_model.post_layernorm(states))
    torch.testing.assert_close(output.last_hidden_state, expected)


def test_it_is_asked_for_the_pooled_vector_alone_and_of_what_projects(clip):
    assert vision_part(clip) is clip.vision_model
    assert isinstance(vision_part(clip, reads_pooled=True), AlignedEncoder)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(text_config=shape, vision_config={**shape, "image_size": 16, "patch_size": 8})
    siglip = SiglipModel(config)
    # SigLIP's head already gives what text is compared with.
    assert vision_part(siglip, reads_pooled=True) is siglip.vision_model


def recipe_for(name, parts, out, **settings):
    settings = {"model__encoder": parts / "clip", "data__path": parts / "images", **settings}
    return load_recipe(name, tiny_overrides(parts, out, **settings))


def test_diva_trains_the_whole_vision_side_and_no_text(parts, tmp_path):
    before = load_file(parts / "clip" / "model.safetensors")

    final = train(
        recipe_for("diva", parts, tmp_path, feedback__condition__num_patches=7, training__learning_rate=10.0)
    )

    after = load_file(final / "model.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert set(after) == set(before)
    assert {"visual_projection.weight", "vision_model.post_layernorm.weight"} <= moved
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in moved)


@pytest.mark.parametrize("name", [pytest.param("dcr", marks=pytest.mark.slow), "genhancer"])
def test_in_stage_two_the_adapters_learn_and_nothing_else_moves(name, parts, tmp_path, monkeypatch):
    """GenHancer's code puts LoRA on the text tower too, where no gradient comes by."""
    probe, before = GradientProbe(), load_file(parts / "clip" / "model.safetensors")
    callbacks = []
    attach = DiffusionFeedbackCallback.attach

    def watched(callback, *arguments, **options):
        callbacks.append(callback)
        attach(callback, *arguments, **options)

    monkeypatch.setattr(DiffusionFeedbackCallback, "attach", watched)
    monkeypatch.setattr(DiffusionFeedbackCallback, "on_pre_optimizer_step", probe.on_pre_optimizer_step)
    settings = {"feedback__conditioner": "null", "feedback__condition__prompt": "null", "training__learning_rate": 0.1}
    final = train(recipe_for(name, parts, tmp_path, **settings, training__max_steps=2))

    # The first step leaves A without a gradient of any size, since B starts at zero.
    adapters = {key: value for key, value in probe.steps[1].items() if "lora_" in key}
    assert len(adapters) == 2 * (3 * 6 + 1) and all(value.any() for value in adapters.values())
    after = load_file(final / "model.safetensors")
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert "visual_projection.weight" in moved
    assert all(key.startswith(("vision_model.encoder.", "visual_projection.")) for key in moved)
    callback = callbacks[0]
    fresh = load_encoder(recipe_for(name, parts, tmp_path).model, reads_pooled=True)
    untouched = DiffusionFeedbackCallback(callback.config)
    attach(untouched, fresh[1], fresh[2])
    for part in (
        lambda c: c.conditioner,
        lambda c: c.diffusion_model.denoiser.model,
        lambda c: c.diffusion_model.codec.vae,
    ):
        was, is_now = part(untouched).state_dict(), part(callback).state_dict()
        assert all(torch.equal(is_now[key], value) for key, value in was.items())


@pytest.mark.slow
def test_a_resumed_run_draws_the_crops_that_it_would_have_drawn(parts, tmp_path):
    settings = {"training__max_steps": 3, "training__save_steps": 2, "feedback__condition__num_patches": 7}
    whole = train(recipe_for("diva", parts, tmp_path / "whole", **settings))
    stop = {"training__resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"}

    resumed = train(recipe_for("diva", parts, tmp_path / "parts", **settings, **stop))

    expected, given = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    before = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(given[name], value) for name, value in expected.items())
    assert not all(torch.equal(before[name], given[f"{name}"]) for name in before if name in given)
