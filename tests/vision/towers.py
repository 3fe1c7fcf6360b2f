"""Tiny vision towers for the tests of this room."""

import torch
from transformers import CLIPVisionConfig, Dinov2Config, Siglip2VisionConfig, SiglipVisionConfig

from deem_plugin.vision import DeemVisionConfig, DeemVisionTower
from tests.parity_weights import parity_tower_config

VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
RESAMPLER = {
    "num_queries": 5,
    "resampler_hidden_size": 24,
    "resampler_num_layers": 2,
    "resampler_num_heads": 2,
}
OPEN_CLIP_VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3, "ls_init_value": 0.1}


def encoder_options(name: str) -> dict:
    """Options of a `DeemVisionConfig` for each kind of encoder. All have a grid of 4 x 4 patches."""
    if name == "convnext":
        plain = parity_tower_config(num_queries=0, multiscale=False)
        return {key: value for key, value in plain.items() if not key.startswith("resampler")}
    if name == "open_clip_vit":
        return {"open_clip_config": dict(OPEN_CLIP_VIT)}
    configs = {
        "clip": lambda: CLIPVisionConfig(**VIT),
        "siglip": lambda: SiglipVisionConfig(**VIT),
        "siglip2": lambda: Siglip2VisionConfig(
            **{key: value for key, value in VIT.items() if key != "image_size"}, num_patches=16
        ),
        "dinov2": lambda: Dinov2Config(**VIT),
    }
    return {"encoder_config": configs[name]()}


ENCODERS = ["convnext", "open_clip_vit", "clip", "siglip", "siglip2", "dinov2"]


def tiny_tower(encoder: str = "convnext", **options) -> DeemVisionTower:
    """Makes a tower with new weights, the same at each call."""
    torch.manual_seed(0)
    return DeemVisionTower(DeemVisionConfig(**(encoder_options(encoder) | options)))


def realigned(model: torch.nn.Module) -> torch.nn.Module:
    """
    Copies the weights of a loaded model to aligned memory.

    They lie in the checkpoint's memory map at any address, and the sums of some CPU kernels depend on the alignment in
    the last bit. Only with equal alignment can outputs be compared bit by bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def tiny_pixels(tower: DeemVisionTower, batch: int = 2) -> torch.Tensor:
    """Draws normalised images for the tower, the same at each call."""
    size = tower.config.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
