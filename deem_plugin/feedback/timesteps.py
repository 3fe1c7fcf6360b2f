"""Rules that draw the timesteps at which the denoiser is asked."""

import torch


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
