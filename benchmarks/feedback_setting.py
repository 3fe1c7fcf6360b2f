"""What `benchmarks.feedback_step` times: the options, and a step's parts with one of them on."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.feedback_sizes import CONFIGS


@dataclass(frozen=True)
class Option:
    """
    A way to make a step cheaper.

    Args:
        settings (`dict`): Of the `DiffusionModelConfig`.
        cached (`bool`): Whether what the VAE says is at hand; reading it from a disk adds a few ms (docs/feedback.md).
        exact (`bool`): Whether it is meant to change nothing but rounding in float32.
    """

    settings: dict = field(default_factory=dict)
    cached: bool = False
    exact: bool = True


PLAIN = Option()

OPTIONS = {
    "cached latents": Option(cached=True),
    "channels_last": Option({"channels_last": True}),
    "compiled denoiser": Option({"compile": True}),
    "gradient checkpointing": Option({"gradient_checkpointing": True}),
    "CPU offload": Option({"cpu_offload": True}),
    "cached latents, compiled denoiser": Option({"compile": True}, cached=True),
    "bfloat16": Option({"dtype": "bfloat16"}, exact=False),
    "float16": Option({"dtype": "float16"}, exact=False),
    "torchao_int8": Option({"quantization": "torchao_int8"}, exact=False),
    "bnb_8bit": Option({"dtype": "float16", "quantization": "bnb_8bit"}, exact=False),
    "bnb_4bit": Option({"dtype": "bfloat16", "quantization": "bnb_4bit"}, exact=False),
    "cached latents, bfloat16": Option({"dtype": "bfloat16"}, cached=True, exact=False),
}


@dataclass
class Setting:
    """
    Everything a step needs.

    Args:
        tower, conditioner (`nn.Module`): What trains.
        eyes (`Eyes`): Of the tower.
        diffusion_model (`DiffusionModel`): What gives the feedback.
        pixel_values, pictures (`torch.Tensor`): What the tower reads, and what is restored, in [0, 1].
        posterior (`tuple`, *optional*): What the VAE says of the pictures, where that is cached.
    """

    tower: torch.nn.Module
    conditioner: torch.nn.Module
    eyes: object
    diffusion_model: object
    pixel_values: torch.Tensor
    pictures: torch.Tensor
    posterior: tuple | None = None


def save_diffusion_model(config: str, folder: Path):
    """Saves a Stable Diffusion of one of the `CONFIGS` in diffusers' layout, with new weights from a fixed seed."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from deem_plugin.feedback import DiffusionModel, UNetDenoiser, VaeCodec, from_scratch

    sizes = CONFIGS[config]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae = UNet2DConditionModel(**sizes["unet"]), AutoencoderKL(**sizes["vae"])
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    from_scratch.save_diffusion_model(DiffusionModel(UNetDenoiser(unet, scheduler), VaeCodec(vae)), folder)


def make_setting(config: str, device: torch.device, folder: Path, option: Option = PLAIN) -> Setting:
    """
    Makes a step of one of the `CONFIGS` with an option on, from a fixed seed.

    Args:
        config (`str`): Name of the sizes.
        device (`torch.device`): Where it runs.
        folder (`Path`): With the diffusion model that [`save_diffusion_model`] wrote.
        option (`Option`): The plain step by default.

    Raises:
        ValueError: If a quantization cannot be had here.
    """
    from deem_plugin.feedback import Conditioner, DiffusionModelConfig
    from deem_plugin.feedback.factory import load_configured
    from deem_plugin.feedback.optimizations import apply_optimizations
    from deem_plugin.vision import DeemVisionConfig, DeemVisionTower
    from deem_plugin.vision.eyes import Eyes

    sizes, settings = CONFIGS[config], DiffusionModelConfig(str(folder), **option.settings)
    frozen = load_configured(settings)
    apply_optimizations(frozen, settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tower = DeemVisionTower(DeemVisionConfig(class_token=False, **sizes["tower"]))
        tower.to(device).eval()  # no stochastic depth: each step is then the same
        conditioner = Conditioner(tower.config.hidden_size, frozen.denoiser.context_dim)
        torch.nn.init.normal_(conditioner.head.weight, std=0.02)
        setting = Setting(
            tower,
            conditioner.to(device),
            Eyes.of(tower, mean=tower.config.image_mean, std=tower.config.image_std),
            frozen.to(device),
            torch.randn(sizes["batch"], 3, tower.config.image_size, tower.config.image_size).to(device),
            torch.rand(sizes["batch"], 3, frozen.image_size, frozen.image_size).to(device),
        )
    if option.cached:
        with frozen.on_device(device):
            setting.posterior = frozen.posterior(setting.pictures)
    return setting
