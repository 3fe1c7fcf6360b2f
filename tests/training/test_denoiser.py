"""A denoiser of one's own: trained on a frozen encoder, loaded like any other, and put to use."""

import json

import pytest
import torch
from safetensors.torch import load_file

from deem_plugin.cli import main as cli
from deem_plugin.feedback import load_diffusion_model
from deem_plugin.feedback.checkpoint import load_conditioner
from deem_plugin.feedback.from_scratch import make_diffusion_model
from deem_plugin.feedback.latents import PixelCodec
from deem_plugin.training.denoiser import train_denoiser
from deem_plugin.training.recipes import load_recipe, read_sections
from deem_plugin.training.run import train

from .helpers import tiny_overrides


def overrides(parts, out, **settings):
    """Overrides that make a tiny diffusion model of 8 pixels on the tiny CLIP."""
    settings = {"model__encoder": parts / "clip", "data__path": parts / "images", **settings}
    small = [
        "denoiser.image_size=8",
        "denoiser.config={patch_size: 2, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8, "
        "joint_attention_dim: 16, caption_projection_dim: 16, pooled_projection_dim: 8, pos_embed_max_size: 4}",
    ]
    return [*small, *tiny_overrides(parts, out, feedback=None, **settings)]


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_it_learns_and_loads_as_any_diffusion_model_and_the_encoder_stays(parts, tmp_path):
    steps = {"training__max_steps": 60, "training__learning_rate": 1e-2, "training__per_device_train_batch_size": 16}
    before = load_file(parts / "clip" / "model.safetensors")

    final = train_denoiser(load_recipe("tiny-denoiser", overrides(parts, tmp_path, **steps)))

    curve = losses(tmp_path)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    diffusion_model = load_diffusion_model(str(final))
    assert diffusion_model.image_size == 8 and diffusion_model.denoiser.vector_dim == 8
    assert not any(parameter.requires_grad for parameter in diffusion_model.denoiser.model.parameters())
    conditioner, settings = load_conditioner(final)
    assert settings.diffusion_model.path == str(final) and conditioner.arguments["vector_dim"] == 8
    after = load_file(parts / "clip" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sorted(path.name for path in final.iterdir()) == [
        "feedback.safetensors",
        "model_index.json",
        "scheduler",
        "transformer",
    ]


def test_an_encoder_trains_with_it_in_the_second_stage(parts, tmp_path):
    first = train_denoiser(load_recipe("tiny-denoiser", overrides(parts, tmp_path / "first")))
    stage = {"model__encoder": parts / "clip", "data__path": parts / "images"}
    stage |= {"feedback__diffusion_model__path": first, "feedback__conditioner": first, "model__lora__r": 2}
    second = tiny_overrides(parts, tmp_path / "second", **stage, training__learning_rate=0.1)

    final = train(load_recipe("genhancer", second))

    before, after = (load_file(folder / "model.safetensors") for folder in (parts / "clip", final))
    assert any(not torch.equal(before[name], value) for name, value in after.items() if "vision" in name)
    network = load_file(first / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(value).all() for value in network.values())


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(parts, tmp_path):
    steps = {"training__max_steps": 4, "training__save_strategy": "steps", "training__save_steps": 2}
    whole = train_denoiser(load_recipe("tiny-denoiser", overrides(parts, tmp_path / "whole", **steps)))
    train_denoiser(load_recipe("tiny-denoiser", overrides(parts, tmp_path / "parts", **steps)))
    resume = {"training__resume_from_checkpoint": tmp_path / "parts" / "checkpoint-2"}
    resumed = train_denoiser(load_recipe("tiny-denoiser", overrides(parts, tmp_path / "parts", **steps, **resume)))

    for name in ("feedback.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        expected, given = load_file(whole / name), load_file(resumed / name)
        assert all(torch.equal(given[key], value) for key, value in expected.items())


def test_it_shares_the_autoencoder_of_another_diffusion_model(parts, tmp_path):
    shared = {"denoiser__autoencoder": parts / "sd", "denoiser__image_size": 16}
    recipe = load_recipe("tiny-denoiser", overrides(parts, tmp_path, **shared))

    diffusion_model = load_diffusion_model(str(train_denoiser(recipe)))

    assert (
        diffusion_model.image_size == 16 and diffusion_model.denoiser.channels == diffusion_model.codec.channels == 4
    )


def test_genhancers_network_has_the_published_size():
    """1.31 billion parameters (https://arxiv.org/abs/2503.19480, Table 7)."""
    section = read_sections("genhancer-denoiser")["denoiser"]
    codec = PixelCodec()
    codec.channels, codec.downscale = 16, 8
    with torch.device("meta"):
        diffusion_model = make_diffusion_model(section["network"], section["config"], codec, section["image_size"])

    assert round(sum(parameter.numel() for parameter in diffusion_model.denoiser.model.parameters()) / 1e9, 2) == 1.31
    assert diffusion_model.denoiser.sample_size == 28 and diffusion_model.image_size == 224


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoiser__network": "Unet"}, "`denoiser.network` must be one of UNet2DConditionModel"),
        ({"denoiser__config": "{widht: 3}"}, "names \\['widht'\\], which a SD3Transformer2DModel does not know"),
        ({"denoiser__config": "{in_channels: 5}"}, "of 5 channels, but its autoencoder's latents have 3"),
        ({"feedback__objective__kind": "contrastive"}, "trained by its denoising error on the tower's tokens alone"),
        ({"feedback__diffusion_model__path": "x"}, r"\['feedback.diffusion_model.path'\] mean nothing here"),
    ],
)
def test_what_makes_no_diffusion_model_is_an_error(settings, message, parts, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_denoiser(load_recipe("tiny-denoiser", overrides(parts, tmp_path, **settings)))


def test_either_command_names_the_other(parts, tmp_path, capsys):
    assert cli(["train", "tiny-denoiser", *overrides(parts, tmp_path)]) != 0
    assert "Run `deem train-denoiser tiny-denoiser`" in capsys.readouterr().err
    settings = tiny_overrides(parts, tmp_path, model__encoder=parts / "clip", data__path=parts / "images")
    assert cli(["train-denoiser", "deem", *settings]) != 0
    assert "needs the sections `denoiser` and `feedback`" in capsys.readouterr().err
