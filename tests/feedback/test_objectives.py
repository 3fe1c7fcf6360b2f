import pytest
import torch
from diffusers import DDPMScheduler

from deem_plugin.feedback.diffusion_feedback import masked_mean
from deem_plugin.feedback.processes import DiffusionProcess
from deem_plugin.vision.normalization import unnormalize


@pytest.fixture
def latents():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_and_the_noisy_latents_give_back_the_clean_ones(latents, prediction_type):
    """x_t = sqrt(a) x0 + sqrt(1 - a) e; x0 follows from x_t and any of the three targets."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    noise, timesteps = torch.randn_like(latents), torch.tensor([10, 700])
    alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(latents, noise, timesteps)

    target = DiffusionProcess(scheduler).target(latents, noise, timesteps)

    recovered = {
        "epsilon": (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt(),
        "v_prediction": alpha.sqrt() * noisy - (1 - alpha).sqrt() * target,
        "sample": target,
    }[prediction_type]
    torch.testing.assert_close(recovered, latents, atol=1e-4, rtol=1e-4)


def test_an_unknown_prediction_type_is_named(latents):
    scheduler = DDPMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="flow")

    with pytest.raises(ValueError, match="prediction_type 'flow'.*'epsilon'"):
        DiffusionProcess(scheduler).target(latents, latents, torch.tensor([0, 1]))


def test_a_masked_mean_is_the_mean_over_the_masked_cells_alone(latents):
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1:3, 2] = 1
    mask[1] = 1

    mean = masked_mean(latents, mask)

    assert mean[0] == pytest.approx(latents[0, :, 1:3, 2].mean().item())
    assert mean[1] == pytest.approx(masked_mean(latents)[1].item())


def test_an_empty_mask_is_refused_and_its_sample_named(latents):
    mask = torch.ones(2, 1, 4, 4)
    mask[1] = 0

    with pytest.raises(ValueError, match=r"samples \[1\] are empty"):
        masked_mean(latents, mask)


def test_unnormalize_gives_back_the_picture_that_a_processor_normalised():
    picture = torch.rand(2, 3, 5, 7)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    pixel_values = (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    torch.testing.assert_close(unnormalize(pixel_values, mean, std), picture, atol=1e-6, rtol=0)
