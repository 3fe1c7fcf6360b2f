import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from deem_plugin.feedback.processes import forward_process
from deem_plugin.feedback.timesteps import min_snr, uniform_weight

TIMESTEPS = torch.tensor([0, 250, 500, 999])


def ddpm(prediction_type):
    return forward_process(DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_picture_alike_for_every_target(prediction_type):
    """min(SNR, 5) times the error of x0, whatever is predicted (https://arxiv.org/abs/2303.09556, Eq. 3)."""
    process = ddpm(prediction_type)
    alpha = process.scheduler.alphas_cumprod[TIMESTEPS]
    snr = alpha / (1 - alpha)
    clean, guess, noise = torch.randn(3, 4, 2, 2, 2)
    root, rest = alpha.sqrt().view(-1, 1, 1, 1), (1 - alpha).sqrt().view(-1, 1, 1, 1)
    noisy = root * clean + rest * noise
    # The prediction that a guess of the picture stands for.
    guessed_noise = (noisy - root * guess) / rest
    prediction = {"epsilon": guessed_noise, "v_prediction": root * guessed_noise - rest * guess, "sample": guess}
    error = (prediction[prediction_type] - process.target(clean, noise, TIMESTEPS)).square().flatten(1).mean(1)

    expected = snr.clamp(max=5) * (guess - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(min_snr(process, TIMESTEPS) * error, expected, rtol=2e-3, atol=1e-5)


def test_a_weighting_of_the_other_process_is_refused():
    flow = forward_process(FlowMatchEulerDiscreteScheduler())

    with pytest.raises(ValueError, match="min_snr` is for diffusion models with a DDPM noise schedule.*to uniform"):
        min_snr(flow, TIMESTEPS)
    assert uniform_weight(flow, TIMESTEPS).tolist() == [1, 1, 1, 1]
