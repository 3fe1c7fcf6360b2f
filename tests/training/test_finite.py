"""What is not finite is never kept as a result: weights of a run, latents of a cache."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from deem_plugin.training.cache import cache_latents
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from .helpers import tiny_overrides


def recipe(parts, out, **settings):
    return load_recipe("tiny-tune", tiny_overrides(parts, out, model__model=parts / "llava", **settings))


@pytest.fixture(params=["the mean", "the deviation"])
def overflowing(parts, tmp_path, request):
    """A diffusion model whose autoencoder gives latents that are not finite, as in half precision."""
    folder = tmp_path / "overflowing"
    shutil.copytree(parts / "sd", folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    channels = vae.config.latent_channels
    with torch.no_grad():
        # The encoder's outputs are the means, then the logarithms of the variances.
        half = slice(0, channels) if request.param == "the mean" else slice(channels, None)
        vae.quant_conv.bias[half] = float("nan")
    vae.save_pretrained(folder / "vae")
    return folder


def test_a_run_on_an_autoencoder_that_overflows_stops_and_leaves_no_result(parts, tmp_path, overflowing):
    with pytest.raises(RuntimeError, match="pictures was not finite"):
        train(recipe(parts, tmp_path / "out", feedback__diffusion_model__path=overflowing, training__max_steps=4))

    assert not (tmp_path / "out/final").exists()


def test_latents_that_are_not_finite_are_not_kept(parts, tmp_path, overflowing):
    with pytest.raises(ValueError, match="not finite"):
        cache_latents(
            recipe(
                parts,
                tmp_path,
                feedback__diffusion_model__path=overflowing,
                feedback__diffusion_model__latent_cache=tmp_path / "c",
            )
        )

    for file in (tmp_path / "c").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            assert all(shard.get_tensor(name).isfinite().all() for name in shard.keys())


def test_weights_that_are_not_finite_are_no_result(parts, tmp_path):
    settings = {"training__learning_rate": 1e30, "training__max_steps": 4, "training__max_grad_norm": 0.0}

    with pytest.raises((RuntimeError, ValueError), match="not finite"):
        train(recipe(parts, tmp_path, feedback__weight=0.0, **settings))

    assert not (tmp_path / "final").exists()
