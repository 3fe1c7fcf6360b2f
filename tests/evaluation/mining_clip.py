"""What the tests of mining share: a CLIP made from a config, and small data sets laid out as they are distributed."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from ..tiny import tiny_clip_config, tiny_image, tiny_image_processor, tiny_tokenizer


def save_mining_clip(path: Path, seed: int = 0) -> CLIPModel:
    """Saves a CLIP with tokenizer and image processor at `path`; it reads letter by letter and knows nothing."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    # CLIP reads a text's features at its end token.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, end)]
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        projection_dim=16,
    )
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=tiny_clip_config().to_dict(), projection_dim=16)
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 6  # as they are, all pictures would look alike to it
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    tiny_image_processor().save_pretrained(path)
    return model.eval()


def write_pictures(root: Path, classes: Iterable[str], per_class: int = 2, suffix: str = ".png") -> Path:
    """Writes random pictures into one subfolder for each class."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            tiny_image(100 * number + index).save(root / name / f"{index}{suffix}", format="PNG")
    return root
