"""LLaVAs with new weights for `benchmarks.answers`, in the proportions of real ones and in others."""

from pathlib import Path

import torch
from PIL import Image

# Sizes by name: widths and layers of the CLIP and of the Llama, and pictures in pixels. LLaVA-1.5-7B's language model
# has 22 times the parameters of its tower, and a picture 576 tokens.
CONFIGS = {
    "tiny": {"tower": (32, 2), "language_model": (32, 2), "image_size": 32, "patch_size": 8},
    "llava": {"tower": (128, 6), "language_model": (512, 12), "image_size": 224, "patch_size": 16},
    "llava-576": {"tower": (192, 6), "language_model": (768, 12), "image_size": 384, "patch_size": 16},
    "tower-heavy": {"tower": (384, 12), "language_model": (32, 2), "image_size": 224, "patch_size": 16},
}

_IMAGE, _SPECIALS = "<image>", ["<pad>", "<s>", "</s>"]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def draw_picture(seed: int, size: int) -> Image.Image:
    """Draws a square picture of noise, `size` pixels wide."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy())


def save_model(config: str, folder: str | Path):
    """Saves a LLaVA of one of the `CONFIGS` and its processor, weights drawn from a fixed seed."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    sizes, tokenizer = CONFIGS[config], _tokenizer()
    side = sizes["image_size"]
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=sizes["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_IMAGE,
        chat_template=_TEMPLATE,
    )
    width, layers = sizes["tower"]
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        image_size=side,
        patch_size=sizes["patch_size"],
    )
    width, layers = sizes["language_model"]
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(settings).save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer():
    """Makes a tokenizer whose words are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIALS, _IMAGE, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": _IMAGE},
        padding_side="right",
    )
