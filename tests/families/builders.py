"""Tiny models of the vision-language families in transformers, with random weights and their real image processors."""

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


def build(name: str) -> Case:
    """Makes the tiny model of a family and its batch."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _without_dropout(AutoModelForImageTextToText.from_config(family.config()).float())
    image_processor = family.processor()
    images, sources = zip(*(picture(*size, seed) for seed, size in enumerate(family.sizes)), strict=True)
    given = [[image] for image in images] if family.nested else list(images)
    pixels = dict(image_processor(images=given, return_tensors="pt"))
    pixels = {k: v.float() if v.is_floating_point() else v for k, v in pixels.items() if isinstance(v, torch.Tensor)}
    if callable(family.tokens):
        counts = family.tokens(pixels)
    else:
        counts = _counts(model, pixels, len(images)) if family.tokens is None else [family.tokens] * len(images)
    batch = _texts(counts) | {k: v for k, v in pixels.items() if k not in PROCESSORS_OWN}
    if family.prepare is not None:
        family.prepare(model, batch)
    return Case(model, image_processor, batch, list(sources) if family.exact else [])


# Outputs of image processors that their processors use and no model takes.
PROCESSORS_OWN = ("num_patches", "num_crops", "aspect_ratios", "num_tiles", "num_soft_tokens_per_image", "grids")


def _counts(model, pixels, images):
    """Asks a model how many tokens each picture has."""
    import inspect

    owner = next(part for part in (model, model.base_model) if hasattr(part, "get_image_features"))
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


def _tokens_of_tiles(pixels):
    """Four tokens for each tile; Idefics pads an image to the most tiles of the batch."""
    return [4 * int(n) for n in pixels["pixel_attention_mask"].flatten(2).any(dim=-1).sum(dim=1)]


def _without_dropout(model):
    """Takes out all that is drawn, so that gradients can be compared in training mode, too."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_p", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.eval()


def _texts(counts):
    """One conversation for each picture: its tokens and four words to learn, padded on the right."""
    rows = [[1, START, *[IMAGE] * count, END, 10, 11, 12, 13] for count in counts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((ids >= IMAGE) | (mask == 0), -100)}


def _multimodal_types(model, batch):
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()


def _token_types(model, batch):
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    # Gemma 3's projector starts at zero, as no trained one is.
    projector = getattr(model.model, "multi_modal_projector", None)
    if hasattr(projector, "mm_input_projection_weight"):
        nn.init.normal_(projector.mm_input_projection_weight, std=0.1)


def _text_alone(model, batch):
    """For models that put no image tokens into the text."""
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] >= IMAGE, 7)


def _mllama(model, batch):
    _text_alone(model, batch)
    batch["cross_attention_mask"] = torch.ones(*batch["input_ids"].shape, 1, 4, dtype=torch.long)
    for name, parameter in model.named_parameters():
        if "gate" in name and not parameter.any():  # closed at first, open in any trained model
            nn.init.constant_(parameter, 0.5)


def _qwen(config_class, text_class, vision, text_options=None):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    # Three layers: DeepStack's second level enters behind the second, and must still reach the text.
    options = {"rope_parameters": rope, "num_hidden_layers": 3} if text_options is None else text_options
    return lambda: config_class(
        text_config=text(text_class, **options).to_dict(),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen_processor(patch):
    side = 2 * patch
    return lambda: hf.Qwen2VLImageProcessor(patch_size=patch, min_pixels=side**2, max_pixels=side**2 * 100)


QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 16,
    "intermediate_size": 64,
    "num_position_embeddings": 64,
}
DEEPSTACK = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
TILED = ((64, 32), (64, 64))


def _tiles(**options):
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return lambda: hf.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4, **statistics, **options
    )


def siglip(**options):
    """A tiny SigLIP tower without a pooling head."""
    return hf.SiglipVisionConfig(**VISION, vision_use_head=False, **options)


def _qformer():
    sizes = {k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")}
    return {**sizes, "num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": VOCABULARY}


def _opt():
    sizes = {"hidden_size": HIDDEN, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=HIDDEN, **sizes, **SPECIAL).to_dict()


def _idefics3(config_class):
    return lambda: config_class(
        vision_config=dict(VISION), text_config=text(hf.LlamaConfig), image_token_id=IMAGE, scale_factor=2
    )


def _unmasked(model, batch):
    """Kosmos-2 is told the places of its image tokens."""
    batch["image_embeds_position_mask"] = (batch["input_ids"] == IMAGE).long()


FAMILIES = {
    "llava": Family(
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION), text_config=text(hf.LlamaConfig), image_token_index=IMAGE
        ),
        unresized,
    ),
    "vipllava": Family(
        lambda: hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=text(hf.LlamaConfig),
            image_token_index=IMAGE,
            vision_feature_layers=[-3, -2],
        ),
        unresized,
    ),
    "llava_next": Family(
        lambda: hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**VISION),
            text_config=text(hf.LlamaConfig),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        ),
        lambda: hf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
        ),
        TILED,
        exact=False,
    ),
    "llava_onevision": Family(
        lambda: hf.LlavaOnevisionConfig(
            vision_config=siglip(),
            text_config=text(hf.Qwen2Config),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        ),
        lambda: hf.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS),
        TILED,
        exact=False,
    ),
    "qwen2_vl": Family(
        _qwen(
            hf.Qwen2VLConfig,
            hf.Qwen2VLTextConfig,
            {"depth": 3, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2},
        ),
        _qwen_processor(14),
        ((56, 56), (84, 56)),
        prepare=_multimodal_types,
    ),
    "qwen2_5_vl": Family(
        _qwen(
            hf.Qwen2_5_VLConfig,
            hf.Qwen2_5_VLTextConfig,
            {
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": HIDDEN,
                "num_heads": 2,
                "patch_size": 14,
                "intermediate_size": 64,
                "fullatt_block_indexes": [1],
            },
        ),
        _qwen_processor(14),
        ((56, 56), (84, 56)),
        prepare=_multimodal_types,
    ),
    "qwen3_vl": Family(
        _qwen(hf.Qwen3VLConfig, hf.Qwen3VLTextConfig, DEEPSTACK),
        _qwen_processor(16),
        ((64, 64), (96, 64)),
        prepare=_multimodal_types,
    ),
    "qwen3_vl_moe": Family(
        _qwen(hf.Qwen3VLMoeConfig, hf.Qwen3VLMoeTextConfig, DEEPSTACK),
        _qwen_processor(16),
        ((64, 64), (96, 64)),
        prepare=_multimodal_types,
    ),
    "qwen3_5": Family(
        _qwen(
            hf.Qwen3_5Config,
            hf.Qwen3_5TextConfig,
            QWEN3_VISION,
            {
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [2, 1, 1],
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                    "mrope_interleaved": True,
                },
            },
        ),
        _qwen_processor(16),
        ((64, 64), (96, 64)),
        prepare=_multimodal_types,
    ),
    "glm4v": Family(
        lambda: hf.Glm4vConfig(
            text_config=text(
                hf.Glm4vTextConfig,
                rope_parameters={
                    "rope_type": "default",
                    "mrope_section": [2, 1, 1],
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
            ).to_dict(),
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": HIDDEN,
                "num_heads": 2,
                "patch_size": 14,
                "intermediate_size": 64,
                "image_size": 112,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=START,
            image_end_token_id=END,
        ),
        lambda: hf.Glm4vImageProcessor(size={"shortest_edge": 112 * 112, "longest_edge": 112 * 112 * 16}),
        ((112, 112), (168, 112)),
        exact=False,
        prepare=_multimodal_types,
    ),
    "internvl": Family(
        lambda: hf.InternVLConfig(
            vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            text_config=text(hf.Qwen2Config),
            image_token_id=IMAGE,
            image_seq_length=4,
        ),
        _tiles(),
        TILED,
        exact=False,
    ),
    "gemma3": Family(
        lambda: hf.Gemma3Config(
            vision_config=siglip(),
            text_config=text(hf.Gemma3TextConfig),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        lambda: hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        prepare=_token_types,
    ),
    "paligemma": Family(
        lambda: hf.PaliGemmaConfig(
            vision_config=siglip(projection_dim=HIDDEN),
            text_config=text(hf.GemmaConfig),
            image_token_index=IMAGE,
            projection_dim=HIDDEN,
            hidden_size=HIDDEN,
            vocab_size=VOCABULARY,
        ),
        lambda: hf.SiglipImageProcessor(do_resize=False),
        prepare=_token_types,
    ),
    "smolvlm": Family(
        _idefics3(hf.SmolVLMConfig),
        lambda: hf.SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        TILED,
        exact=False,
        nested=True,
        tokens=_tokens_of_tiles,
    ),
    "idefics3": Family(
        _idefics3(hf.Idefics3Config),
        lambda: hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        TILED,
        exact=False,
        nested=True,
        tokens=_tokens_of_tiles,
    ),
    "idefics2": Family(
        lambda: hf.Idefics2Config(
            vision_config=dict(VISION),
            text_config=text(hf.MistralConfig),
            perceiver_config={
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
                "hidden_size": HIDDEN,
            },
            image_token_id=IMAGE,
        ),
        lambda: hf.Idefics2ImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}),
        tokens=4,
        nested=True,
    ),
    "mllama": Family(
        lambda: hf.MllamaConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 96,
                "image_size": 32,
                "patch_size": 8,
                "max_num_tiles": 4,
                "intermediate_layers_indices": [0, 1],
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            },
            text_config=text(
                hf.models.mllama.configuration_mllama.MllamaTextConfig,
                cross_attention_layers=[1],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ).to_dict(),
            image_token_index=VOCABULARY + 7,
        ),
        lambda: hf.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=4),
        ((64, 32), (32, 32)),
        exact=False,
        tokens=1,
        prepare=_mllama,
        nested=True,
    ),
    "mistral3": Family(
        lambda: hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(
                **{**VISION, "image_size": 64, "head_dim": 16},
            ),
            text_config=text(hf.MistralConfig),
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        lambda: hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        ((64, 32), (32, 32)),
    ),
    "lfm2_vl": Family(
        lambda: hf.Lfm2VlConfig(
            vision_config=hf.Siglip2VisionConfig(
                **{k: v for k, v in VISION.items() if k != "image_size"}, num_patches=16, vision_use_head=False
            ),
            text_config=text(hf.Lfm2Config, block_ff_dim=64, layer_types=["conv", "full_attention"]),
            image_token_id=IMAGE,
            projector_hidden_size=64,
        ),
        lambda: hf.Lfm2VlImageProcessor(
            encoder_patch_size=8, tile_size=32, min_image_tokens=4, max_image_tokens=16, do_image_splitting=False
        ),
        ((64, 32), (48, 48)),
    ),
    "gemma4": Family(
        lambda: hf.Gemma4Config(
            text_config=text(
                hf.Gemma4TextConfig,
                num_experts=None,
                moe_intermediate_size=None,
                vocab_size_per_layer_input=VOCABULARY,
                hidden_size_per_layer_input=8,
                layer_types=["sliding_attention", "full_attention"],
                num_kv_shared_layers=0,
                global_head_dim=16,
            ).to_dict(),
            vision_config={
                **{k: v for k, v in VISION.items() if k != "image_size"},
                "num_key_value_heads": 2,
                "head_dim": 16,
                "position_embedding_size": 64,
                "pooling_kernel_size": 2,
            },
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=499,
            boi_token_id=START,
            eoi_token_id=END,
        ),
        lambda: hf.Gemma4ImageProcessor(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2),
        ((64, 64), (96, 64)),
        exact=False,
        prepare=_multimodal_types,
    ),
    "aya_vision": Family(
        lambda: hf.AyaVisionConfig(
            vision_config=siglip(), text_config=text(hf.Cohere2Config), image_token_index=IMAGE
        ),
        _tiles(),
        TILED,
        exact=False,
    ),
    "cohere2_vision": Family(
        lambda: hf.Cohere2VisionConfig(
            vision_config=siglip(),
            text_config=text(hf.Cohere2Config),
            image_token_id=IMAGE,
            alignment_intermediate_size=64,
        ),
        _tiles(),
        TILED,
        exact=False,
    ),
    "deepseek_vl": Family(
        lambda: hf.DeepseekVLConfig(vision_config=siglip(), text_config=text(hf.LlamaConfig), image_token_id=IMAGE),
        lambda: hf.DeepseekVLImageProcessor(size={"height": 32, "width": 32}, min_size=8),
    ),
    "deepseek_vl_hybrid": Family(
        lambda: hf.DeepseekVLHybridConfig(
            vision_config=dict(VISION),
            high_res_vision_config=hf.SamVisionConfig(
                hidden_size=32,
                output_channels=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=128,
                patch_size=16,
                mlp_dim=64,
                window_size=4,
                global_attn_indexes=[1],
            ),
            text_config=text(hf.LlamaConfig),
            image_token_id=IMAGE,
        ),
        lambda: hf.DeepseekVLHybridImageProcessor(
            size={"height": 32, "width": 32}, high_res_size={"height": 128, "width": 128}, min_size=8
        ),
        tokens=16,
    ),
    "ovis2": Family(
        lambda: hf.Ovis2Config(
            vision_config={
                **VISION,
                "image_size": 28,
                "patch_size": 7,
                "vocab_size": 40,
                "hidden_stride": 2,
                "num_visual_indicator_tokens": 5,
            },
            text_config=text(hf.Qwen2Config),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[490, 491, 492, 493, 494],
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
        ),
        lambda: hf.Ovis2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=False),
        ((28, 28), (28, 28)),
        tokens=4,
    ),
    "florence2": Family(
        lambda: hf.Florence2Config(
            vision_config={
                "depths": [1] * 4,
                "embed_dim": [16, 16, 32, 32],
                "num_heads": [2] * 4,
                "num_groups": [2] * 4,
                "window_size": 4,
                "projection_dim": HIDDEN,
                "drop_path_rate": 0.0,
                "max_position_embeddings": 50,
            },
            text_config=hf.BartConfig(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                encoder_layers=2,
                decoder_layers=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                decoder_start_token_id=3,
                forced_eos_token_id=3,
                **SPECIAL,
            ),
            image_token_id=IMAGE,
        ),
        unresized,
        ((64, 64), (64, 64)),
    ),
    "got_ocr2": Family(
        lambda: hf.GotOcr2Config(
            vision_config={
                "hidden_size": 32,
                "output_channels": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 128,
                "patch_size": 16,
                "mlp_dim": 64,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            text_config=text(hf.Qwen2Config),
            image_token_index=IMAGE,
        ),
        lambda: hf.GotOcr2ImageProcessor(size={"height": 128, "width": 128}),
        ((128, 128), (128, 128)),
    ),
    "blip-2": Family(
        lambda: hf.Blip2Config(
            vision_config=dict(VISION),
            qformer_config=_qformer(),
            text_config=_opt(),
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        lambda: hf.BlipImageProcessor(do_resize=False),
        tokens=4,
    ),
    "kosmos-2": Family(
        lambda: hf.Kosmos2Config(
            text_config={
                "vocab_size": VOCABULARY,
                "embed_dim": HIDDEN,
                "layers": 2,
                "ffn_dim": 64,
                "attention_heads": 2,
                "max_position_embeddings": 256,
                **SPECIAL,
            },
            vision_config=dict(VISION),
            latent_query_num=4,
        ),
        unresized,
        tokens=4,
        prepare=_unmasked,
    ),
    "git": Family(
        lambda: hf.GitConfig(
            vision_config={**VISION, "hidden_size": HIDDEN},
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            **SPECIAL,
        ),
        unresized,
        tokens=1,
        prepare=_text_alone,
    ),
    "lighton_ocr": Family(
        lambda: hf.LightOnOcrConfig(
            vision_config=hf.PixtralVisionConfig(**{**VISION, "image_size": 64, "head_dim": 16}),
            text_config=text(hf.Qwen3Config),
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        lambda: hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        ((64, 32), (32, 32)),
    ),
}
