"""Tiny models of the real classes, made from their configs: no hub, no downloads, a fraction of a second each."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 32  # pixels
PATCH_SIZE = 8  # pixels, so 4 x 4 patches
LATENT_SIZE = 16  # the tiny VAE halves the picture

# ChatML, for contents that are strings as well as for contents that are lists of parts.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """
    Makes a byte-level tokenizer: every text is representable and decoding gives it back unchanged.

    Args:
        add_bos (`bool`): Whether it writes `<s>` before a text by itself, as Llama's does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", "<image>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
    )


def tiny_image_processor() -> CLIPImageProcessor:
    """Makes CLIP's image processor for pictures of `IMAGE_SIZE` pixels, with CLIP's own mean and std."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def tiny_clip_config() -> CLIPVisionConfig:
    """Makes the config of a 3-layer CLIP vision tower of width 32."""
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=16,
    )


def tiny_clip(seed: int = 0) -> CLIPVisionModel:
    """Makes a CLIP vision tower: 16 patches and a class token of width 32."""
    torch.manual_seed(seed)
    return CLIPVisionModel(tiny_clip_config())


def tiny_full_clip(path: str | Path, seed: int = 0) -> CLIPModel:
    """Saves a whole CLIP (vision and text tower) with its image processor at `path`, and returns it."""
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        projection_dim=16,
    )
    vision = tiny_clip_config()
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(path)
    tiny_image_processor().save_pretrained(path)
    return model


def tiny_llama_config(vocab_size: int) -> LlamaConfig:
    """Makes the config of a 2-layer Llama of width 32."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
        tie_word_embeddings=False,
    )


def tiny_llama(path: str | Path, seed: int = 0) -> LlamaForCausalLM:
    """Saves a Llama with its tokenizer (ChatML template) at `path`, and returns it."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(tiny_llama_config(len(tokenizer)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def tiny_processor(add_bos: bool = False) -> LlavaProcessor:
    """Makes the processor of `tiny_llava`: 16 image tokens a picture, ChatML."""
    return LlavaProcessor(
        image_processor=tiny_image_processor(),
        tokenizer=tiny_tokenizer(add_bos),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(path: str | Path | None = None, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    Makes a LLaVA of a tiny CLIP and a tiny Llama, with its processor; saves both when `path` is given.

    The tower's second-last layer is read and its class token dropped, as in LLaVA-1.5.
    """
    torch.manual_seed(seed)
    processor = tiny_processor()
    config = LlavaConfig(
        vision_config=tiny_clip_config(),
        text_config=tiny_llama_config(len(processor.tokenizer)),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 3
    if path is not None:
        model.save_pretrained(path)
        processor.save_pretrained(path)
    return model, processor


def tiny_unet(context_dim: int = 16, seed: int = 0, **settings) -> UNet2DConditionModel:
    """
    Makes a UNet of Stable Diffusion's class for latents of 4 x 16 x 16 and contexts of width `context_dim`.

    `settings` are further ones of its config, such as the conditions of Stable Diffusion XL.
    """
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context_dim,
        attention_head_dim=4,
        **settings,
    )


def tiny_vae(seed: int = 0, **settings) -> AutoencoderKL:
    """Makes a VAE of Stable Diffusion's class: 3 x 32 x 32 pixels to 4 x 16 x 16 latents, but for `settings`."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        **settings,
    )


def tiny_sd_folder(path: str | Path, context_dim: int = 16, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Saves a Stable Diffusion folder at `path`: model_index.json, unet, vae and scheduler, no text encoder."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    StableDiffusionPipeline(
        vae=tiny_vae(seed),
        unet=tiny_unet(context_dim, seed),
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return Path(path)


def tiny_text_encoder(folder: Path, context_dim: int = 16) -> Path:
    """Adds a tiny CLIP text encoder of eight positions, with a tokenizer, to a diffusion model's folder."""
    words = ["<pad>", "</s>", "a", "photo", "of", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder / "tokenizer"
    )
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=context_dim,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=1,
        pad_token_id=0,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def tiny_image(seed: int = 0, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    """Draws a random RGB picture of `size` (width, height) pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
