"""Frozen diffusion networks behind one contract: `(noisy_latents, timesteps, context) -> prediction`."""

from abc import ABC, abstractmethod

import torch

from .objectives import denoising_target


class Denoiser(ABC):
    """
    A frozen diffusion network that reads the picture's tokens as its context.

    It is deliberately no `nn.Module`: a denoiser that is an attribute of the trained model would end up in its state
    dict, its optimizer, its DDP buckets or FSDP shards. Its weights never change, yet gradients pass through it to
    `context`; that gradient is the feedback.

    Args:
        model (`nn.Module`): The diffusers network. Frozen and put in eval mode here.
        scheduler (`DDPMScheduler`): The forward process that the network was trained with.
    """

    def __init__(self, model, scheduler):
        self.model = model.requires_grad_(False).eval()
        self.scheduler = scheduler

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """Width of the context tokens that the network attends to."""

    @property
    def sample_size(self) -> int:
        """Height and width of the latents that the network was trained on, in cells."""
        return self.model.config.sample_size

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.model.config.in_channels

    @property
    def num_train_timesteps(self) -> int:
        """Length of the noise schedule, in steps."""
        return self.scheduler.config.num_train_timesteps

    def noise(self, latents, noise, timesteps):
        """Adds noise to clean latents: sqrt(a_t) x0 + sqrt(1 - a_t) noise; all `(batch, channels, height, width)`."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents, noise, timesteps):
        """Returns what the network should predict, by its prediction type."""
        return denoising_target(self.scheduler, latents, noise, timesteps)

    def to(self, device):
        """Moves the network to `device` and returns the denoiser."""
        self.model.to(device)
        return self

    def __call__(self, noisy_latents, timesteps, context):
        """
        Predicts the target.

        Args:
            noisy_latents (`torch.Tensor`): Shape `(batch, channels, height, width)`.
            timesteps (`torch.Tensor`): Integers, shape `(batch,)`.
            context (`torch.Tensor`): Shape `(batch, tokens, context_dim)`; gradients flow back to it.

        Returns:
            `torch.Tensor`: Shape of `noisy_latents`.
        """
        dtype = self.model.dtype
        return self._predict(noisy_latents.to(dtype), timesteps, context.to(dtype))

    @abstractmethod
    def _predict(self, noisy_latents, timesteps, context): ...


class UNetDenoiser(Denoiser):
    """Stable Diffusion 1.x and 2.x (`UNet2DConditionModel`)."""

    def __init__(self, model, scheduler):
        super().__init__(model, scheduler)
        if model.config.addition_embed_type is not None:
            raise ValueError(
                f"The UNet asks for extra conditions (addition_embed_type={model.config.addition_embed_type!r}, as in "
                f"SDXL). Known UNets are those of Stable Diffusion 1.x and 2.x."
            )
        if not isinstance(model.config.cross_attention_dim, int):
            raise ValueError(
                f"The UNet has a different context width in each block ({model.config.cross_attention_dim}); "
                f"expected one width."
            )

    @property
    def context_dim(self) -> int:
        """Width of the text states that the UNet was trained on: 768 (SD 1.x) or 1024 (SD 2.x)."""
        return self.model.config.cross_attention_dim

    def _predict(self, noisy_latents, timesteps, context):
        return self.model(noisy_latents, timesteps, encoder_hidden_states=context).sample


class PixArtDenoiser(Denoiser):
    """PixArt's cross-attention diffusion transformer (`PixArtTransformer2DModel`)."""

    @property
    def context_dim(self) -> int:
        """Width of the caption states that the transformer projects."""
        return self.model.config.caption_channels

    def _predict(self, noisy_latents, timesteps, context):
        prediction = self.model(
            noisy_latents,
            encoder_hidden_states=context,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        # The published weights also predict a variance, in the second half of the channels.
        return prediction[:, : self.channels]


# The networks we know, by the class name in `model_index.json`.
DENOISERS = {"UNet2DConditionModel": UNetDenoiser, "PixArtTransformer2DModel": PixArtDenoiser}


def check_context_dim(context_dim, denoiser):
    """Raises a `ValueError` if `denoiser` cannot attend to context tokens of width `context_dim`."""
    if context_dim != denoiser.context_dim:
        raise ValueError(
            f"The conditioner makes context tokens of width {context_dim}, but the denoiser "
            f"({type(denoiser.model).__name__}) attends to tokens of width {denoiser.context_dim}. "
            f"Build the conditioner with `context_dim={denoiser.context_dim}`, or choose another generator."
        )


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of a name such as `"bfloat16"`."""
    return getattr(torch, name)
