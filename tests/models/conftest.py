"""Tensors of the authors' own code (fixtures F4 and F5) and what they were made with."""

import json

import pytest
from safetensors.torch import load_file

from deem_plugin.feedback.timesteps import shrink_timesteps
from deem_plugin.models.losses import Draws

from ..parity_weights import parity_generator


@pytest.fixture(scope="module")
def weights(shared_dir):
    return load_file(shared_dir / "parity/f45_weights.safetensors")


@pytest.fixture(scope="module")
def f4(shared_dir):
    return load_file(shared_dir / "parity/f4_interleave.safetensors")


@pytest.fixture(scope="module")
def f5(shared_dir):
    return load_file(shared_dir / "parity/f5_as_is.safetensors")


@pytest.fixture(scope="module")
def f5_summary(shared_dir):
    return json.loads((shared_dir / "parity/f5_losses.json").read_text())


@pytest.fixture(scope="module")
def diffusion_model(shared_dir, weights):
    return parity_generator(shared_dir, weights, "visual_tokenizer.")


@pytest.fixture(scope="module")
def draws(f5):
    """The official draws in their order; `inverted_noise` shrinks the feedback's timesteps after they are drawn."""
    return {
        "feedback": Draws(
            latent_noise=f5["draw.0.vae_eps"],
            noise=f5["draw.1.randn_like"],
            timesteps=shrink_timesteps(f5["draw.2.randint"], 1000),
        ),
        "image": Draws(
            latent_noise=f5["draw.4.vae_eps"],
            noise=f5["draw.5.randn_like"],
            timesteps=f5["draw.6.randint"],
            dropped=f5["draw.3.rand_like"].flatten() < 0.1,
        ),
    }
