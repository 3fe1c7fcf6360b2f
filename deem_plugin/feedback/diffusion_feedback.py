"""The diffusion feedback: how well visual tokens explain a picture, by the error of a frozen denoiser."""

import torch
import torch.nn.functional as F

from .denoisers import check_context_dim
from .timesteps import uniform, uniform_weight


class Objective:
    """
    What all objectives share: the frozen network that is asked, and what is drawn to ask it.

    Args:
        denoiser (`Denoiser`): The frozen network.
        sample_timesteps (`Callable`, *optional*): `(batch_size, num_train_timesteps, *, generator, device) ->
            (batch,)`, one of `TIMESTEP_SAMPLERS`. Defaults to uniform over the whole schedule.
    """

    def __init__(self, denoiser, sample_timesteps=uniform):
        self.denoiser = denoiser
        self.sample_timesteps = sample_timesteps

    @property
    def context_dim(self) -> int:
        """Width of the context tokens that it scores."""
        return self.denoiser.context_dim

    @property
    def vector_dim(self) -> int:
        """Width of the vector that modulates the denoiser; 0 if it takes none."""
        return self.denoiser.vector_dim

    def draw(self, latents, context, noise=None, timesteps=None, generator=None):
        """Returns noise and timesteps for latents, drawn unless given, and checks the width of the context."""
        check_context_dim(context.shape[-1], self.denoiser)
        source = {"generator": generator, "device": latents.device}
        if noise is None:
            noise = torch.randn(latents.shape, dtype=latents.dtype, **source)
        if timesteps is None:
            timesteps = self.sample_timesteps(len(latents), self.denoiser.process.num_train_timesteps, **source)
        return noise, timesteps


class DiffusionFeedback(Objective):
    """
    Scores how well visual tokens explain a picture (DEEM, https://arxiv.org/abs/2405.15232, Eq. 5).

    The denoiser's weights never change, yet its input `context` receives gradients. That gradient is the feedback
    which trains the vision encoder.

    Args:
        denoiser, sample_timesteps: As in [`Objective`].
        draws (`int`, *optional*, defaults to `1`): Noises and timesteps drawn for each picture, whose errors are
            averaged: the same gradient on average, with less variance, at so many times the cost.
        weigh_timesteps (`Callable`, *optional*):
            `(process, timesteps) -> (batch,)`, one of `LOSS_WEIGHTINGS`. By default all timesteps count alike.
    """

    def __init__(self, denoiser, sample_timesteps=uniform, draws=1, weigh_timesteps=uniform_weight):
        super().__init__(denoiser, sample_timesteps)
        self.draws = draws
        self.weigh_timesteps = weigh_timesteps

    def __call__(self, latents, context, *, vector=None, mask=None, timesteps=None, noise=None, generator=None):
        """
        Args:
            latents (`torch.Tensor`): Latents of the picture, shape `(batch, channels, height, width)`.
            context (`torch.Tensor`): Context made of the picture's tokens, shape `(batch, tokens, context_dim)`.
            vector (`torch.Tensor`, *optional*): What modulates the denoiser, shape `(batch, vector_dim)`.
            mask (`torch.Tensor`, *optional*): Latent cells that count, shape `(batch, 1, height, width)`.
            timesteps (`torch.Tensor`, *optional*): Integers, shape `(batch * draws,)`. Drawn when not given.
            noise (`torch.Tensor`, *optional*): Standard normal, shape `(batch * draws, channels, height, width)`.
                Drawn when not given. The draws of one picture follow each other.
            generator (`torch.Generator`, *optional*): Source of what is drawn.

        Returns:
            `torch.Tensor`: The denoising error of each picture, shape `(batch,)`, float32.
        """
        process = self.denoiser.process
        latents, context, vector, mask = (self._for_each_draw(value) for value in (latents, context, vector, mask))
        noise, timesteps = self.draw(latents, context, noise, timesteps, generator)
        # Not under no_grad: the weights are frozen, but the gradient has to pass through to `context`.
        prediction = self.denoiser(process.noise(latents, noise, timesteps), timesteps, context, vector)
        target = process.target(latents, noise, timesteps)
        error = masked_mean(F.mse_loss(prediction.float(), target.float(), reduction="none"), mask)
        return (error * self.weigh_timesteps(process, timesteps)).unflatten(0, (-1, self.draws)).mean(dim=1)

    def _for_each_draw(self, value):
        return value if value is None or self.draws == 1 else value.repeat_interleave(self.draws, dim=0)


def masked_mean(error, mask=None):
    """
    Averages an error `(batch, channels, height, width)` over each sample's channels and, with a mask `(batch, 1,
    height, width)` of zeros and ones, over its masked cells alone: `(batch,)`. A true mean: the size of a region does
    not change its weight.

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
