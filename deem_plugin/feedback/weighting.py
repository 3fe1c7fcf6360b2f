"""How much the denoising error counts at each timestep, from diffusers' training utilities."""

import torch

from .processes import FlowProcess

# Clamp of min-SNR weighting (https://arxiv.org/abs/2303.09556), the authors' own.
GAMMA = 5.0


def uniform_weight(process, timesteps):
    """Returns 1 for each: the plain mean squared error, as in DEEM, DIVA, GenHancer and ROSS."""
    return torch.ones(len(timesteps), device=timesteps.device)


def min_snr(process, timesteps):
    """
    Returns the min-SNR-5 weights of a DDPM process (https://arxiv.org/abs/2303.09556, Eq. 3), `(batch,)`.

    At little noise the error says more about the denoiser than about the condition; here it counts less.

    Raises:
        ValueError: If the process is a flow, which has no such weights.
    """
    from diffusers.training_utils import compute_snr

    if isinstance(process, FlowProcess):
        raise ValueError(
            "`loss_weighting: min_snr` is for diffusion models with a DDPM noise schedule, and this one was trained "
            "by flow matching. Set `objective.loss_weighting` to uniform."
        )
    snr = compute_snr(process.scheduler, timesteps)
    clamped = snr.clamp(max=GAMMA)
    # The weight of the error of x0, divided by how much that of the target exceeds it.
    prediction_type = process.scheduler.config.prediction_type
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return clamped / divisor


# The names a recipe may use for `objective.loss_weighting`. To add one, write a function above and list it here.
LOSS_WEIGHTINGS = {"uniform": uniform_weight, "min_snr": min_snr}
