"""The whole feedback path against tensors of the authors' own code (fixtures F1 and F2)."""

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from deem_plugin.feedback import Conditioner, DiffusionFeedback
from deem_plugin.feedback.timesteps import shrink_timesteps
from deem_plugin.vision import DeemVisionConfig, DeemVisionTower

from ..parity_weights import parity_generator, parity_settings, parity_tower_config, part, tower_weights

VALUES = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = 1e-4  # relative


@pytest.fixture(scope="module")
def settings(shared_dir):
    return parity_settings(shared_dir)


@pytest.fixture(scope="module")
def weights(shared_dir):
    return load_file(shared_dir / "parity/f2_weights.safetensors")


@pytest.fixture(scope="module")
def case(shared_dir):
    return load_file(shared_dir / "parity/f2_full.safetensors")


@pytest.fixture(scope="module")
def diffusion_model(shared_dir, weights):
    return parity_generator(shared_dir, weights)


@pytest.fixture
def tower(weights):
    tower = DeemVisionTower(DeemVisionConfig(**parity_tower_config())).eval()
    tower.load_state_dict(tower_weights(weights), strict=True)
    return tower


@pytest.fixture
def conditioner(weights):
    """The official `proj_i`: a head alone, for the tower's queries are resampled already."""
    conditioner = Conditioner(32, 64)
    conditioner.head.load_state_dict(part(weights, "proj_i."))
    return conditioner


def test_the_schedule_is_the_official_one(settings, shared_dir):
    scheduler = DDPMScheduler(**settings["scheduler"])
    expected = load_file(shared_dir / "parity/f1_scheduler.safetensors")

    torch.testing.assert_close(scheduler.betas, expected["betas"], atol=1e-7, rtol=0)
    torch.testing.assert_close(scheduler.alphas_cumprod, expected["alphas_cumprod"], atol=1e-6, rtol=0)


def test_latents_and_noisy_latents_are_the_official_ones(diffusion_model, case):
    assert diffusion_model.image_size == 128
    picture = case["input.image_dec"].clone()

    latents = diffusion_model.encode(picture, noise=case["draw.vae_eps"])

    torch.testing.assert_close(latents, case["latents"], **VALUES)
    timesteps = shrink_timesteps(case["draw.timesteps"], 1000)
    assert torch.equal(timesteps, case["timesteps_mapped"].long())
    noisy = diffusion_model.denoiser.process.noise(latents, case["draw.noise"], timesteps)
    torch.testing.assert_close(noisy, case["noisy_latents"], **VALUES)
    # The official code normalises the caller's picture in place; a second reader then sees [-3, 1].
    assert torch.equal(picture, case["input.image_dec"])


def test_loss_and_gradients_are_the_official_ones(diffusion_model, tower, conditioner, case):
    queries = tower(case["image_normalised"]).last_hidden_state
    queries.retain_grad()
    context = conditioner(queries)
    context.retain_grad()
    latents = diffusion_model.encode(case["input.image_dec"], noise=case["draw.vae_eps"])

    loss = DiffusionFeedback(diffusion_model.denoiser)(
        latents, context, timesteps=case["timesteps_mapped"].long(), noise=case["draw.noise"]
    )
    loss.mean().backward()

    torch.testing.assert_close(context, case["dif_embed"], **VALUES)
    torch.testing.assert_close(loss, case["sd_loss"].flatten(1).mean(1), **VALUES)
    torch.testing.assert_close(loss.mean(), case["loss_sniffer"].squeeze(), **VALUES)
    ours = {
        "grad.dif_embed": context.grad,
        "grad.perceiver_out": queries.grad,
        "grad.param.proj_i.weight": conditioner.head.weight.grad,
        "grad.param.perceiver_resampler.queries": tower.resampler.queries.grad,
        "grad.param.sniffer.vision_model.visual.trunk.stem.0.weight": tower.encoder.trunk.stem[0].weight.grad,
    }
    for name, gradient in ours.items():
        expected = case[name]
        assert (gradient - expected).norm() / expected.norm() < GRADIENTS, name
    assert all(p.grad is None for p in diffusion_model.denoiser.model.parameters())


def test_the_region_loss_is_the_official_masked_mean(diffusion_model, conditioner, case, shared_dir, settings):
    """Case F2 partial: with MMFS the prediction differs, so its own squared error is averaged here."""
    from deem_plugin.feedback.diffusion_feedback import masked_mean

    partial = load_file(shared_dir / "parity/f2_partial_mmfs_random.safetensors")
    mask = (interpolate(partial["input.image_mask"].float(), size=(16, 16), mode="bilinear") > 0).float()

    loss = masked_mean(partial["sd_loss"], mask)

    torch.testing.assert_close(loss.mean(), partial["loss_sniffer"].squeeze(), **VALUES)
