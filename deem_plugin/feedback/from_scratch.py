"""Diffusion models from scratch: new networks of the known kinds, small enough to be trained from scratch."""

import inspect
import json
from pathlib import Path

from .denoisers import DENOISERS, FlowDenoiser
from .denoisers.transformers import FluxDenoiser
from .diffusion_model import DiffusionModel
from .latents import PixelCodec


def make_diffusion_model(network, config, codec, image_size):
    """
    Makes a diffusion model with new weights, in training mode: of flow matching without shift, but for networks that
    know DDPM only (epsilon).

    Args:
        network (`str`): Class of diffusers, one of `DENOISERS`.
        config (`dict`): Its arguments. `sample_size` and, where it is missing, `in_channels` are filled in.
        codec (`VaeCodec` or `PixelCodec`): Its autoencoder.
        image_size (`int`): Side of the pictures that it is trained on, in pixels.

    Raises:
        ValueError: If the network is unknown, does not take its arguments, or does not fit the codec.
    """
    import diffusers

    if network not in DENOISERS:
        raise ValueError(f"`denoiser.network` must be one of {', '.join(DENOISERS)}, got {network!r}.")
    adapter, network_class = DENOISERS[network], getattr(diffusers, network)
    packs = adapter is FluxDenoiser  # 2 x 2 cells to a token
    side = codec.downscale * (2 if packs else 1)
    if image_size % side:
        raise ValueError(
            f"`denoiser.image_size` is {image_size}, but a {network} on this autoencoder reads pictures of {side} "
            f"pixels a side and multiples of that."
        )
    if unknown := set(config) - set(inspect.signature(network_class.__init__).parameters):
        raise ValueError(f"`denoiser.config` names {sorted(unknown)}, which a {network} does not know.")
    defaults = {"sample_size": image_size // codec.downscale}
    if not packs:
        defaults |= {"in_channels": codec.channels, "out_channels": codec.channels}
    try:
        model = network_class.from_config({**defaults, **config})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`denoiser.config` does not make a {network}: {error}") from error
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler()
        if issubclass(adapter, FlowDenoiser)
        else diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )
    denoiser = adapter(model, scheduler, codec.downscale)
    if denoiser.channels != codec.channels:
        raise ValueError(
            f"`denoiser.config` makes a {network} of {denoiser.channels} channels, but its autoencoder's latents "
            f"have {codec.channels}. Leave `in_channels` out, or correct it (for FLUX four times the channels)."
        )
    model.requires_grad_(True).train()
    return DiffusionModel(denoiser, codec)


def save_diffusion_model(diffusion_model, folder):
    """Writes a diffusion model, its autoencoder too, as a folder that `load_diffusion_model` reads."""
    folder = Path(folder)
    denoiser, codec = diffusion_model.denoiser, diffusion_model.codec
    parts = {
        "unet" if hasattr(denoiser.model, "down_blocks") else "transformer": denoiser.model,
        "scheduler": denoiser.scheduler,
    }
    if not isinstance(codec, PixelCodec):
        parts["vae"] = codec.vae
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {"_class_name": "DiffusionPipeline"}
    index |= {name: ["diffusers", type(part).__name__] for name, part in sorted(parts.items())}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
