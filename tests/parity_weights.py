"""Tiny configuration and weights of the parity fixtures, which hold the official visual tokenizer alone."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import LlamaConfig

from deem_plugin.feedback import DiffusionModel, UNetDenoiser, VaeCodec
from deem_plugin.models.official import rename


def part(weights: dict, prefix: str) -> dict:
    """Returns the weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def parity_settings(shared_dir: Path) -> dict:
    """Configuration of everything but the language model, as the fixtures state it."""
    return json.loads((shared_dir / "parity/f2_summary.json").read_text())["config"]


def parity_generator(shared_dir: Path, weights: dict, prefix: str = "") -> DiffusionModel:
    """The fixtures' UNet, VAE and noise schedule; `prefix` precedes `encoder.unet.` in the names of the weights."""
    settings = parity_settings(shared_dir)
    unet, vae = UNet2DConditionModel(**settings["unet"]), AutoencoderKL(**settings["vae"])
    unet.load_state_dict(part(weights, f"{prefix}encoder.unet."), strict=True)
    vae.load_state_dict(part(weights, f"{prefix}encoder.vae."), strict=True)
    return DiffusionModel(UNetDenoiser(unet, DDPMScheduler(**settings["scheduler"])), VaeCodec(vae))


def parity_text_config() -> LlamaConfig:
    """Configuration of the fixtures' Llama, before the new tokens."""
    return LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=99,
    )


def _renamed_part(state_dict: dict, official_prefix: str, prefix: str) -> dict:
    """Renames weights as those of the whole official model, and returns the part whose names then start so."""
    renamed = {rename(official_prefix + name) or "": value for name, value in state_dict.items()}
    return part(renamed, prefix)


def resampler_weights(state_dict: dict, prefix: str) -> dict:
    """State dict of a `PerceiverResampler` from the official `perceiver_resampler`, whose keys start with `prefix`."""
    own = part(state_dict, prefix)
    return _renamed_part(own, "visual_tokenizer.perceiver_resampler.", "vision_tower.resampler.")


def tower_weights(state_dict: dict) -> dict:
    """
    State dict of a multi-scale `DeemVisionTower` from the official visual tokenizer (fixture F2).

    What is not part of the tower is left out: the two heads `proj_i` and `proj_t`, and the diffusion model
        (`encoder.*`).
    The position embedding is computed, not stored.
    """
    return _renamed_part(state_dict, "visual_tokenizer.", "vision_tower.")


def parity_tower_config(**options) -> dict:
    """Keyword arguments of the `DeemVisionConfig` that fixture F2 was made with."""
    return {
        "open_clip_config": {
            "timm_model_name": "convnext_base",
            "image_size": 64,
            "timm_kwargs": {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64], "ls_init_value": 0.5},
        },
        "embed_dim": 64,
        "multiscale": True,
        "num_queries": 8,
        "resampler_hidden_size": 32,
        "resampler_num_layers": 3,
        "resampler_num_heads": 4,
        "resampler_intermediate_size": 64,
    } | options
