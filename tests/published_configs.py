"""
Writes the configs of the published models that the 7B recipes name, without weights: all that `deem plan` reads.

    python -m tests.published_configs FOLDER

The values are those of the files on the hub (llava-hf/llava-1.5-7b-hf, lmsys/vicuna-7b-v1.5,
openai/clip-vit-large-patch14 and -336, stabilityai/stable-diffusion-2-1-base,
stabilityai/stable-diffusion-xl-base-1.0, stabilityai/stable-diffusion-3-medium-diffusers).
"""

import json
import sys
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPConfig, LlamaConfig, LlavaConfig


def vicuna_7b(**settings) -> LlamaConfig:
    """Makes the config of Vicuna-7B v1.5, but for `settings`."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlamaConfig(**{**shape, "vocab_size": 32000, "max_position_embeddings": 4096, **settings})


def clip_large(image_size: int) -> CLIPConfig:
    """Makes the config of CLIP ViT-L/14, which exists for pictures of 224 and of 336 pixels."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPConfig(
        vision_config={**vision, "image_size": image_size, "patch_size": 14, "projection_dim": 768},
        text_config={**text, "projection_dim": 768},
        projection_dim=768,
    )


def llava_7b() -> LlavaConfig:
    """Makes the config of LLaVA-1.5-7B as transformers has it."""
    return LlavaConfig(
        text_config=vicuna_7b(vocab_size=32064),
        vision_config=clip_large(336).vision_config,
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def write_diffusion_model(folder: Path, networks: dict, scheduler):
    """Writes the configs of a diffusion model: network and VAE (by subfolder: class and config), noise schedule."""
    index = {"_class_name": "DiffusionPipeline", "scheduler": ["diffusers", type(scheduler).__name__]}
    for name, (network_class, config) in networks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": network_class.__name__, **config}, indent=2)
        (folder / name / "config.json").write_text(text)
        index[name] = ["diffusers", network_class.__name__]
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def vae(sample_size: int, **settings) -> tuple[type, dict]:
    """Returns class and config of Stable Diffusion's VAE, but for `settings`."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    shape = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    return AutoencoderKL, {"sample_size": sample_size, **shape, **blocks, **settings}


def stable_diffusion_2_1() -> tuple[dict, DDPMScheduler]:
    """Returns networks and noise schedule of Stable Diffusion 2.1 base."""
    unet = {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "in_channels": 4,
        "out_channels": 4,
    }
    return {"unet": (UNet2DConditionModel, unet), "vae": vae(768)}, scaled_linear()


def stable_diffusion_xl() -> tuple[dict, DDPMScheduler]:
    """Returns networks and noise schedule of Stable Diffusion XL base 1.0."""
    unet = {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "in_channels": 4,
        "out_channels": 4,
    }
    return {"unet": (UNet2DConditionModel, unet), "vae": vae(1024, scaling_factor=0.13025)}, scaled_linear()


def stable_diffusion_3() -> tuple[dict, FlowMatchEulerDiscreteScheduler]:
    """Returns networks and noise schedule of Stable Diffusion 3 medium."""
    transformer = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
    own = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    codec = vae(1024, **own, use_quant_conv=False, use_post_quant_conv=False)
    return {"transformer": (SD3Transformer2DModel, transformer), "vae": codec}, FlowMatchEulerDiscreteScheduler(
        shift=3
    )


def scaled_linear() -> DDPMScheduler:
    """Returns Stable Diffusion's noise schedule."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def write_configs(folder: str | Path):
    """Writes one folder a model."""
    folder = Path(folder)
    llava_7b().save_pretrained(folder / "llava-1.5-7b")
    vicuna_7b().save_pretrained(folder / "vicuna-7b")
    for size in (224, 336):
        clip_large(size).save_pretrained(folder / f"clip-large-{size}")
    write_diffusion_model(folder / "stable-diffusion-2-1-base", *stable_diffusion_2_1())
    write_diffusion_model(folder / "stable-diffusion-xl-base-1.0", *stable_diffusion_xl())
    write_diffusion_model(folder / "stable-diffusion-3-medium", *stable_diffusion_3())


if __name__ == "__main__":
    write_configs(sys.argv[1])
