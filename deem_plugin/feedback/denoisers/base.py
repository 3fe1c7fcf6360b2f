"""The one contract of frozen diffusion networks: `(noisy_latents, timesteps, context) -> prediction`."""

from abc import ABC, abstractmethod

import torch

from ..processes import FlowProcess, forward_process


class Denoiser(ABC):
    """
    A frozen diffusion network that reads the picture's tokens as its context.

    It is deliberately no `nn.Module`: a denoiser that is an attribute of the trained model would end up in its state
    dict, its optimizer, its DDP buckets or FSDP shards. Its weights never change, yet gradients pass through it to
    `context`; that gradient is the feedback.

    Args:
        model (`nn.Module`): The diffusers network. Frozen and put in eval mode here.
        scheduler (`DDPMScheduler` or `FlowMatchEulerDiscreteScheduler`):
            The forward process that the network was trained with.
        downscale (`int`, *optional*, defaults to `8`):
            Pixels of a latent cell along each side, for networks that are told the picture's size in pixels.
    """

    def __init__(self, model, scheduler, downscale=8):
        self.model = model.requires_grad_(False).eval()
        self.scheduler = scheduler
        self.process = forward_process(scheduler)
        self.downscale = downscale

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """Width of the context tokens that the network attends to."""

    @property
    def vector_dim(self) -> int:
        """Width of the pooled text embedding that modulates the network; 0 if it takes none."""
        return 0

    @property
    def sample_size(self) -> int:
        """Height and width of the latents that the network was trained on, in cells."""
        return self.model.config.sample_size

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.model.config.in_channels

    def to(self, device):
        """Moves the network to `device` and returns the denoiser."""
        self.model.to(device)
        return self

    def __call__(self, noisy_latents, timesteps, context, vector=None):
        """
        Predicts the target, shape of `noisy_latents`.

        Args:
            noisy_latents (`torch.Tensor`): Shape `(batch, channels, height, width)`.
            timesteps (`torch.Tensor`): Integers, shape `(batch,)`.
            context (`torch.Tensor`): Shape `(batch, tokens, context_dim)`; gradients flow back to it.
            vector (`torch.Tensor`, *optional*): In place of the pooled text embedding, shape `(batch, vector_dim)`;
                neutral without it.
        """
        return self.at_times(noisy_latents, self.process.times(timesteps), context, vector)

    def at_times(self, noisy_latents, times, context, vector=None):
        """As a call, at `times` as a diffusers scheduler counts them while it samples: (0, T], not only integers."""
        dtype = self.model.dtype
        if self.vector_dim:
            vector = noisy_latents.new_zeros(len(noisy_latents), self.vector_dim) if vector is None else vector
            return self._predict(noisy_latents.to(dtype), times, context.to(dtype), vector.to(dtype))
        if vector is not None:
            raise ValueError(
                f"Got a vector of shape {tuple(vector.shape)}, but nothing modulates a {type(self.model).__name__}: "
                f"it reads its context only. Leave `vector` out."
            )
        return self._predict(noisy_latents.to(dtype), times, context.to(dtype))

    @abstractmethod
    def _predict(self, noisy_latents, times, context, *vector):
        """As [`at_times`], all of the network's dtype; `vector` where `vector_dim` is not 0."""

    def _picture_size(self, latents):
        """Returns height and width of the picture in pixels, shape `(batch, 2)`."""
        size = [side * self.downscale for side in latents.shape[-2:]]
        return torch.tensor([size] * len(latents), device=latents.device, dtype=torch.float32)


class FlowDenoiser(Denoiser):
    """A network that was trained by flow matching alone; a noise schedule of another kind is refused."""

    def __init__(self, model, scheduler, downscale=8):
        super().__init__(model, scheduler, downscale)
        if not isinstance(self.process, FlowProcess):
            raise ValueError(
                f"{type(model).__name__} was trained by flow matching, but its scheduler is a "
                f"{type(scheduler).__name__}; expected a FlowMatchEulerDiscreteScheduler. Correct `scheduler` in "
                f"`model_index.json` and its `scheduler_config.json`, or choose another diffusion model."
            )

    def _sigma(self, times):
        """Returns the share of noise, in (0, 1], of times in (0, T]."""
        return times / self.process.num_train_timesteps


def check_context_dim(context_dim, denoiser):
    """Raises a `ValueError` if `denoiser` cannot attend to context tokens of width `context_dim`."""
    if context_dim != denoiser.context_dim:
        raise ValueError(
            f"The conditioner makes context tokens of width {context_dim}, but the denoiser "
            f"({type(denoiser.model).__name__}) attends to tokens of width {denoiser.context_dim}. "
            f"Build the conditioner with `context_dim={denoiser.context_dim}`, or choose another diffusion model."
        )
