"""What an official checkpoint says about its own shape: a DeemConfig from the shapes of its weights."""

import re

from .synchroniser_names import OFFICIAL_POINTS

_TRUNK = "visual_tokenizer.sniffer.vision_model.visual.trunk."
_ENCODER = "visual_tokenizer.perceiver_resampler."
_DECODER = "image_decoder.perceiver_resampler."
_LAYERS = "blip2qformer.encoder.layer."
_MMFS = "visual_tokenizer.encoder.mmfs_module."
_ATTENDING = "mm_decoder.layers."
# What every checkpoint with a ConvNeXt has, whatever parts it was trained without.
_NEEDED = (f"{_TRUNK}stem.0.weight", f"{_ENCODER}queries", "visual_tokenizer.pos_proj.bias")


def config_options(official, image_size: int, image_decoder_heads: int) -> dict:
    """
    Reads the options of a [`DeemConfig`] off the shapes of official weights.

    Args:
        official (`dict[str, torch.Tensor]`): State dict of the authors' `MMInterleaved`.
        image_size (`int`): Side of the encoder's input in pixels, which no weight tells: 256 of the first stage, 448
            of the later ones.
        image_decoder_heads (`int`): Heads of the image decoder, which no weight tells either.

    Returns:
        `dict`: Everything but `text_config` and the new tokens.

    Raises:
        ValueError: If the weights are not of a whole model with a ConvNeXt.
    """
    if lacking := [name for name in _NEEDED if name not in official]:
        raise ValueError(
            f"The checkpoint lacks {', '.join(lacking)} among its {len(official)} weights; expected the state dict of "
            f"the authors' MMInterleaved with a ConvNeXt (their ViTs are not supported), under their names and whole."
        )
    options = {"vision_config": _vision(official, image_size), "context_dim": None}
    if f"{_DECODER}queries" in official:
        layer = f"{_DECODER}{_LAYERS}"
        options |= {
            "context_dim": official[f"{_DECODER}queries"].shape[2],
            "image_decoder_layers": _count(official, layer),
            "image_decoder_heads": image_decoder_heads,
            "image_decoder_intermediate_size": len(official[f"{layer}0.intermediate_query.dense.bias"]),
        }
    blocks = sorted(
        {int(m[1]) for name in official if (m := re.match(r"mm_decoder\.layers\.(\d+)\.llama_cross", name))}
    )
    if blocks:
        attention = f"{_ATTENDING}{blocks[0]}.llama_cross_attn.attn."
        layers = _count(official, _ATTENDING)
        options["language_synchroniser"] = {
            "frequency": blocks[1] if len(blocks) > 1 else layers,
            **_attention(official, attention),
        }
    if f"{_MMFS}mmfs_mid_block.conv.weight" in official:
        attention = f"{_MMFS}mmfs_mid_block.mmfs."
        options["unet_synchroniser"] = {
            "unet": _unet(official),
            "inner_dim": len(official[f"{attention}value_proj.bias"]),
            **_attention(official, attention),
        }
    return options


def _vision(official, image_size):
    resampler = f"{_ENCODER}{_LAYERS}"
    queries = official[f"{_ENCODER}queries"]
    layers = _count(official, resampler)
    crossing = [
        index for index in range(layers) if f"{resampler}{index}.crossattention.attention.key.weight" in official
    ]
    stages = _count(official, f"{_TRUNK}stages.")
    depths = [_count(official, f"{_TRUNK}stages.{stage}.blocks.") for stage in range(stages)]
    widths = [len(official[f"{_TRUNK}stages.{stage}.blocks.0.norm.weight"]) for stage in range(stages)]
    return {
        "open_clip_config": {
            "timm_model_name": "convnext_base",
            "timm_drop_path": 0.1,
            "image_size": image_size,
            "timm_kwargs": {"depths": depths, "dims": widths},
        },
        "embed_dim": len(official["visual_tokenizer.pos_proj.bias"]),
        "multiscale": True,
        "region_tokens": "visual_tokenizer.feature_extractor.mask_feat_linear.weight" in official,
        "num_queries": queries.shape[1],
        "resampler_hidden_size": queries.shape[2],
        "resampler_num_layers": layers,
        "resampler_num_heads": queries.shape[2] // len(official[f"{resampler}0.attention.attention.q_norm.weight"]),
        "resampler_intermediate_size": len(official[f"{resampler}0.intermediate_query.dense.bias"]),
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else layers,
    }


def _attention(official, prefix):
    """Heads and levels: each head has two offsets a point, and a score a point and level and one more a level."""
    heads = len(official[f"{prefix}sampling_offsets.bias"]) // (2 * OFFICIAL_POINTS)
    return {
        "num_heads": heads,
        "num_levels": len(official[f"{prefix}attention_weights.bias"]) // (heads * (OFFICIAL_POINTS + 1)),
        "max_images": len(official[f"{prefix}query_relpos.weight"]),
    }


def _unet(official):
    """What a `UNetSynchroniser` asks of a UNet's config, from the number and width of the blocks that look at it."""
    skips = _count(official, f"{_MMFS}mmfs_down_blocks.")
    widths = [len(official[f"{_MMFS}mmfs_down_blocks.{index}.conv.bias"]) for index in range(skips)]
    levels, depth = 4, 2  # Stable Diffusion's, all versions; 1 + 4 * 2 layers and 3 downsamplings make 12 skips
    if skips != 1 + levels * depth + levels - 1:
        raise ValueError(f"The UNet's synchroniser has {skips} blocks; expected the 12 of Stable Diffusion.")
    return {
        "sample_size": round(len(official[f"{_MMFS}mmfs_down_blocks.0.pos_embed"]) ** 0.5),
        "block_out_channels": [widths[1 + level * (depth + 1)] for level in range(levels)],
        "layers_per_block": depth,
    }


def _count(official, prefix):
    """Returns how many numbered parts a prefix has."""
    found = {int(m[1]) for name in official if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    if found != set(range(len(found))):
        raise ValueError(f"The checkpoint has the parts {sorted(found)} of `{prefix}`; some are missing.")
    return len(found)
