"""The published variants differ from the methods by the defects that they are named for, and train."""

import pytest
import torch
from PIL import Image

from deem_plugin.feedback.contrastive import ContrastiveFeedback
from deem_plugin.training.run import train
from experiments.faithful.dcr import RECIPE, PublishedContrastiveFeedback

from ..feedback.test_contrastive import by_hand
from ..feedback.test_invariants import IMAGENET, augmented_span, what_the_vae_sees
from ..tiny import tiny_image_processor
from ..training.test_run import recipe_for


def test_the_published_target_is_the_velocity_of_an_epsilon_model(denoiser, inputs):
    loss = PublishedContrastiveFeedback(denoiser)(**inputs)

    velocity = denoiser.scheduler.get_velocity(inputs["latents"], inputs["noise"], inputs["timesteps"])
    torch.testing.assert_close(loss, by_hand(denoiser, inputs, 3, velocity), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loss, ContrastiveFeedback(denoiser)(**inputs), atol=1e-2)


def test_as_published_all_that_is_darker_than_the_mean_is_lost():
    lowest, _, (least, _) = augmented_span(PublishedContrastiveFeedback(None))

    assert least >= -1e-6 and lowest < -1


def test_diva_faithful_shows_the_vae_its_published_contrast():
    """DIVA un-normalises CLIP's pictures by ImageNet's statistics: white 0.78 to 0.85, black -0.87 to -0.85."""
    white = what_the_vae_sees(Image.new("RGB", (32, 32), "white"), tiny_image_processor(), **IMAGENET)
    black = what_the_vae_sees(Image.new("RGB", (32, 32), "black"), tiny_image_processor(), **IMAGENET)

    assert white == pytest.approx((0.78, 0.85), abs=0.01) and black == pytest.approx((-0.87, -0.85), abs=0.01)


@pytest.mark.parametrize("name", ["deem", "diva", "dcr", "genhancer"])
def test_each_trains(name, parts, tmp_path):
    recipe = recipe_for(name, parts, tmp_path, path=RECIPE.with_name(f"{name}-faithful.yaml"))

    final = train(recipe, PublishedContrastiveFeedback if name == "dcr" else None)

    assert (final / "feedback.safetensors").is_file()
