"""The diffusion feedback: how well visual tokens explain a picture, by the error of a frozen denoiser."""

import torch

from .denoisers import check_context_dim
from .objectives import masked_mean, squared_error
from .timesteps import uniform
from .weighting import uniform_weight


class DiffusionFeedback:
    """
    Scores how well visual tokens explain a picture (DEEM, https://arxiv.org/abs/2405.15232, Eq. 5).

    The denoiser's weights never change, yet its input `context` receives gradients. That gradient is the feedback
    which trains the vision encoder.

    Args:
        denoiser (`Denoiser`): The frozen network.
        sample_timesteps (`Callable`, *optional*):
            `(batch_size, num_train_timesteps, *, generator, device) -> (batch,)`, one of `TIMESTEP_SAMPLERS`.
            Defaults to uniform over the whole schedule.
        draws (`int`, *optional*, defaults to `1`):
            Noises and timesteps drawn for each picture, whose errors are averaged: the same gradient on average, with
            less variance, at so many times the cost.
        weigh_timesteps (`Callable`, *optional*):
            `(process, timesteps) -> (batch,)`, one of `LOSS_WEIGHTINGS`. By default all timesteps count alike.
    """

    def __init__(self, denoiser, sample_timesteps=uniform, draws=1, weigh_timesteps=uniform_weight):
        self.denoiser = denoiser
        self.sample_timesteps = sample_timesteps
        self.draws = draws
        self.weigh_timesteps = weigh_timesteps

    @property
    def context_dim(self) -> int:
        """Width of the context tokens that it scores."""
        return self.denoiser.context_dim

    @property
    def vector_dim(self) -> int:
        """Width of the vector that modulates the denoiser; 0 if it takes none."""
        return self.denoiser.vector_dim

    def __call__(self, latents, context, *, vector=None, mask=None, timesteps=None, noise=None, generator=None):
        """
        Args:
            latents (`torch.Tensor`): Latents of the picture, shape `(batch, channels, height, width)`.
            context (`torch.Tensor`): Context made of the picture's tokens, shape `(batch, tokens, context_dim)`.
            vector (`torch.Tensor`, *optional*): What modulates the denoiser, shape `(batch, vector_dim)`.
            mask (`torch.Tensor`, *optional*): Latent cells that count, shape `(batch, 1, height, width)`.
            timesteps (`torch.Tensor`, *optional*): Integers, shape `(batch * draws,)`. Drawn when not given.
            noise (`torch.Tensor`, *optional*):
                Standard normal, shape `(batch * draws, channels, height, width)`. Drawn when not given. The draws of
                one picture follow each other.
            generator (`torch.Generator`, *optional*): Source of what is drawn.

        Returns:
            `torch.Tensor`: The denoising error of each picture, shape `(batch,)`, float32.
        """
        check_context_dim(context.shape[-1], self.denoiser)
        latents, context, vector, mask = (self._for_each_draw(value) for value in (latents, context, vector, mask))
        if noise is None:
            noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        if timesteps is None:
            timesteps = self.sample_timesteps(
                len(latents), self.denoiser.num_train_timesteps, generator=generator, device=latents.device
            )
        noisy_latents = self.denoiser.noise(latents, noise, timesteps)
        # Not under no_grad: the weights are frozen, but the gradient has to pass through to `context`.
        prediction = self.denoiser(noisy_latents, timesteps, context, vector)
        error = masked_mean(squared_error(prediction, self.denoiser.target(latents, noise, timesteps)), mask)
        weighted = error * self.weigh_timesteps(self.denoiser.process, timesteps)
        return weighted.unflatten(0, (-1, self.draws)).mean(dim=1)

    def _for_each_draw(self, value):
        return value if value is None or self.draws == 1 else value.repeat_interleave(self.draws, dim=0)
