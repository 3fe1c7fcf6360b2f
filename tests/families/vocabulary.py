"""What tiny models of vision-language families are made of: sizes, pictures, texts, and how they become a batch."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

VOCABULARY, HIDDEN = 512, 64
IMAGE, VIDEO, START, END = 500, 501, 502, 503
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
SMALL_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    **SPECIAL,
}


def text(config_class, **options):
    """A small configuration of a language model: what of `SMALL_TEXT` its class knows, and `options`."""
    return config_class(**{k: v for k, v in SMALL_TEXT.items() if k in config_class.__dataclass_fields__} | options)


def unresized(**options):
    """CLIP's image processor, which leaves pictures as large as they are."""
    return hf.CLIPImageProcessor(do_resize=False, do_center_crop=False, **options)


@dataclass
class Family:
    """
    How a tiny model of a family is made.

    Args:
        config (`Callable`): Makes its configuration.
        processor (`Callable`): Makes its image processor.
        sizes (`tuple`): Width and height of two pictures.
        exact (`bool`): Whether the processor leaves them as they are, so that the views must equal them.
        tokens (`int` or `Callable`, *optional*): Image tokens that each picture has in the text, also as a function of
            the processor's output; asked of the model by default.
        prepare (`Callable`, *optional*): `(model, batch)`: what else the family needs.
        nested (`bool`): Whether its processor takes a list of images for each text.
    """

    config: Callable
    processor: Callable
    sizes: tuple = ((32, 32), (32, 32))
    exact: bool = True
    tokens: int | Callable | None = None
    prepare: Callable | None = None
    nested: bool = False


@dataclass
class Case:
    """A model, its image processor, a batch of two pictures, and the pictures `(3, height, width)` in [0, 1]."""

    model: nn.Module
    image_processor: object
    batch: dict
    sources: list = field(default_factory=list)


def picture(width, height, seed):
    """A picture of coarse colours with fine noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (height, width), mode="bilinear")[
        0
    ]
    pixels = (coarse * 215 + 40 * torch.rand(3, height, width, generator=generator)).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), pixels.float() / 255


def make(family: Family) -> Case:
    """Makes the tiny model of a family and its batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _without_dropout(AutoModelForImageTextToText.from_config(family.config()).float())
    image_processor = family.processor()
    pictures = range(len(family.sizes))
    batch = batch_of(family, model, image_processor, pictures, [WORDS] * len(pictures))
    sources = [picture(*size, seed)[1] for seed, size in enumerate(family.sizes)]
    return Case(model, image_processor, batch, sources if family.exact else [])


def batch_of(family: Family, model, image_processor, pictures, words, padding_side="right") -> dict:
    """Makes a batch of a family's pictures, by number, each with words behind it."""
    images = [picture(*family.sizes[number], number)[0] for number in pictures]
    given = [[image] for image in images] if family.nested else images
    pixels = image_processor(images=given, return_tensors="pt")
    pixels = {"pixel_values": pixels} if isinstance(pixels, torch.Tensor) else dict(pixels)
    pixels = {k: v for k, v in pixels.items() if isinstance(v, torch.Tensor) or k in LISTS}
    pixels = {k: v.float() if k not in LISTS and v.is_floating_point() else v for k, v in pixels.items()}
    if callable(family.tokens):
        counts = family.tokens(pixels)
    else:
        counts = _counts(model, pixels, len(images)) if family.tokens is None else [family.tokens] * len(images)
    batch = _texts(counts, words, padding_side) | {k: v for k, v in pixels.items() if k not in PROCESSORS_OWN}
    if family.prepare is not None:
        family.prepare(model, batch)
    return batch


# Words to learn.
WORDS = [10, 11, 12, 13]
# Outputs of image processors that are lists.
LISTS = ("num_local_patches", "patches_grid")
# Outputs of image processors that their processors use and no model takes.
PROCESSORS_OWN = ("num_patches", "num_crops", "aspect_ratios", "num_tiles", "num_soft_tokens_per_image", "grids")


def _counts(model, pixels, images):
    """Asks a model how many tokens each picture has."""
    import inspect

    owner = next(part for part in (model.base_model, model) if hasattr(part, "get_image_features"))
    names = inspect.signature(owner.get_image_features).parameters
    with torch.no_grad():
        features = owner.get_image_features(**{k: v for k, v in pixels.items() if k in names})
    features = getattr(features, "pooler_output", features)
    if isinstance(features, list | tuple) and len(features) == images:
        return [value.numel() // value.shape[-1] for value in features]
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    total = features.numel() // features.shape[-1]
    if "num_patches" in pixels:
        return [total * int(n) // int(pixels["num_patches"].sum()) for n in pixels["num_patches"]]
    return [total // images] * images


def tokens_of_tiles(pixels):
    """Four tokens for each tile; Idefics pads an image to the most tiles of the batch."""
    return [4 * int(n) for n in pixels["pixel_attention_mask"].flatten(2).any(dim=-1).sum(dim=1)]


def _without_dropout(model):
    """Takes out all that is drawn, so that gradients can be compared in training mode, too."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_p", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.eval()


def _texts(counts, words, padding_side):
    """One conversation for each picture: its tokens, and words behind them."""
    rows = [[1, START, *[IMAGE] * count, END, *own] for count, own in zip(counts, words, strict=True)]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    sides = [(0, count) if padding_side == "right" else (count, 0) for count in padding]
    ids = torch.tensor([[0] * left + row + [0] * right for row, (left, right) in zip(rows, sides, strict=True)])
    mask = torch.tensor(
        [[0] * left + [1] * len(row) + [0] * right for row, (left, right) in zip(rows, sides, strict=True)]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((ids >= IMAGE) | (mask == 0), -100)}


def multimodal_types(model, batch):
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()


def token_types(model, batch):
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    open_projector(model, batch)


def open_projector(model, batch):
    """Gemma 3's projector starts at zero, as no trained one is."""
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight") and not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def text_alone(model, batch):
    """For models that put no image tokens into the text."""
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] >= IMAGE, 7)


def open_gates(model, batch):
    text_alone(model, batch)
    batch["cross_attention_mask"] = torch.ones(*batch["input_ids"].shape, 1, 4, dtype=torch.long)
    for name, parameter in model.named_parameters():
        if "gate" in name and not parameter.any():  # closed at first, open in any trained model
            nn.init.constant_(parameter, 0.5)


PINPOINTS = [[32, 64], [64, 32], [64, 64]]
TILED = ((64, 32), (64, 64))


def tiles(**options):
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return lambda: hf.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4, **statistics, **options
    )


def siglip(**options):
    """A tiny SigLIP tower without a pooling head."""
    return hf.SiglipVisionConfig(**VISION, vision_use_head=False, **options)


def qformer():
    sizes = {k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")}
    return {**sizes, "num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": VOCABULARY}


def opt():
    sizes = {"hidden_size": HIDDEN, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=HIDDEN, **sizes, **SPECIAL).to_dict()
