"""The timesteps at which the denoiser is asked: rules that draw them, and how much the error counts at each."""

import torch

from .processes import FlowProcess


def uniform(batch_size, num_train_timesteps, *, generator=None, device=None):
    """Draws timesteps uniformly from the whole schedule, as DDPM trains (https://arxiv.org/abs/2006.11239)."""
    return torch.randint(num_train_timesteps, (batch_size,), generator=generator, device=device)


def shrink_timesteps(timesteps, num_train_timesteps, scale=0.6):
    """
    Shrinks timesteps towards the middle of the schedule: 0..999 becomes 200..799.

    DEEM's code does so for the feedback loss alone, under the name `inverted_noise`; the paper does not mention it.
    Very noisy pictures ask for nothing in particular and nearly clean ones give the answer away.
    """
    middle = num_train_timesteps / 2
    return torch.round((timesteps - middle) * scale + middle).long()


def shrink(batch_size, num_train_timesteps, *, generator=None, device=None):
    """Draws timesteps uniformly from the middle 60 % of the schedule, as DEEM's code does."""
    timesteps = uniform(batch_size, num_train_timesteps, generator=generator, device=device)
    return shrink_timesteps(timesteps, num_train_timesteps)


def logit_normal(batch_size, num_train_timesteps, *, generator=None, device=None):
    """Draws timesteps denser towards the middle (SD3, https://arxiv.org/abs/2403.03206, Sec. 3.1)."""
    position = torch.randn(batch_size, generator=generator, device=device).sigmoid()
    return (position * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


# The names a recipe may use for `objective.timestep_sampling`. To add one, write a function above and list it here.
TIMESTEP_SAMPLERS = {"shrink": shrink, "uniform": uniform, "logit_normal": logit_normal}

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
