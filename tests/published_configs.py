"""
Writes the configs of the published models that the 7B recipes name, without weights: all that `deem plan` reads.

    python -m tests.published_configs FOLDER

The values are those of the files on the hub (llava-hf/llava-1.5-7b-hf, lmsys/vicuna-7b-v1.5,
openai/clip-vit-large-patch14 and -336, stabilityai/stable-diffusion-2-1-base).
"""

import json
import sys
from pathlib import Path

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
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


def write_stable_diffusion(folder: Path):
    """Writes the configs of Stable Diffusion 2.1 base: UNet, VAE and noise schedule."""
    with_attention = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    networks = {
        "unet": (
            UNet2DConditionModel,
            {
                "sample_size": 64,
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types": with_attention[0],
                "up_block_types": with_attention[1],
                "layers_per_block": 2,
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
                "in_channels": 4,
                "out_channels": 4,
            },
        ),
        "vae": (
            AutoencoderKL,
            {
                "sample_size": 768,
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
                "latent_channels": 4,
            },
        ),
    }
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    for name, (network_class, config) in networks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": network_class.__name__, **config}, indent=2)
        (folder / name / "config.json").write_text(text)
        index[name] = ["diffusers", network_class.__name__]
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def write_configs(folder: str | Path):
    """Writes one folder a model."""
    folder = Path(folder)
    llava_7b().save_pretrained(folder / "llava-1.5-7b")
    vicuna_7b().save_pretrained(folder / "vicuna-7b")
    for size in (224, 336):
        clip_large(size).save_pretrained(folder / f"clip-large-{size}")
    write_stable_diffusion(folder / "stable-diffusion-2-1-base")


if __name__ == "__main__":
    write_configs(sys.argv[1])
