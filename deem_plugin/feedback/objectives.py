"""The mathematics of the denoising error, as pure functions."""

import torch
import torch.nn.functional as F


def denoising_target(scheduler, latents, noise, timesteps):
    """
    Returns what a denoiser of the scheduler's prediction type should predict.

    Args:
        scheduler (`DDPMScheduler`): Its `prediction_type` is `epsilon`, `v_prediction` or `sample`.
        latents (`torch.Tensor`): Clean latents x0, shape `(batch, channels, height, width)`.
        noise (`torch.Tensor`): The noise that was added, same shape.
        timesteps (`torch.Tensor`): Integer timesteps, shape `(batch,)`.

    Returns:
        `torch.Tensor`: noise (DDPM), sqrt(a) noise - sqrt(1 - a) x0 (https://arxiv.org/abs/2202.00512, App. D), or x0.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return latents
    raise ValueError(
        f"The diffusion model's scheduler has prediction_type {prediction_type!r}; expected 'epsilon', 'v_prediction' "
        f"or 'sample'. Correct `scheduler_config.json` or choose another diffusion model."
    )


def masked_mean(error, mask=None):
    """
    Averages an error over each sample's channels and, where a mask is given, over its masked cells alone.

    Args:
        error (`torch.Tensor`): Per-element error, shape `(batch, channels, height, width)`.
        mask (`torch.Tensor`, *optional*): Cells that count, shape `(batch, 1, height, width)`, zero or one.

    Returns:
        `torch.Tensor`: Shape `(batch,)`. A true mean: the size of a region does not change its weight.

    Raises:
        ValueError: If a mask is empty; the mean over nothing is not a loss of zero.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    area = mask.flatten(1).sum(1)
    if (area == 0).any():
        empty = (area == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"The region masks of samples {empty} are empty on the {tuple(mask.shape[-2:])} grid of the latents. "
            f"Leave such samples out, or resize the masks by area so that small regions keep a cell."
        )
    return (error * mask).flatten(1).sum(1) / (area * error.shape[1])


def squared_error(prediction, target):
    """Returns the element-wise squared error in float32, shape of the inputs."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none")


def normalize(pictures, mean, std):
    """Undoes [`unnormalize`]: pictures `(batch, 3, height, width)` in [0, 1] to `pixel_values`, float32."""
    mean = torch.as_tensor(mean, device=pictures.device, dtype=torch.float32).view(-1, 1, 1)
    std = torch.as_tensor(std, device=pictures.device, dtype=torch.float32).view(-1, 1, 1)
    return (pictures.float() - mean) / std


def unnormalize(pixel_values, mean, std):
    """
    Turns a processor's `pixel_values` back into a picture in [0, 1].

    Args:
        pixel_values (`torch.Tensor`): Shape `(batch, 3, height, width)`, normalised with `mean` and `std`.
        mean, std (`Sequence[float]`): The processor's own, one value a channel.
    """
    values = pixel_values.float()
    mean = torch.as_tensor(mean, device=values.device, dtype=torch.float32).view(-1, 1, 1)
    std = torch.as_tensor(std, device=values.device, dtype=torch.float32).view(-1, 1, 1)
    return (values * std + mean).clamp(0, 1)
