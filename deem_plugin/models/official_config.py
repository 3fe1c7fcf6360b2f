"""What an official checkpoint says about its own shape: a DeemConfig from the shapes of its weights."""

import re

from .official import OFFICIAL_POINTS

_TRUNK = "visual_tokenizer.sniffer.vision_model.visual.trunk."
_VIT = re.compile(r"visual_tokenizer\.(sniffer|encoder)\.vision_model\.(embeddings|encoder|adapter_interactions)\.")
_ENCODER = "visual_tokenizer.perceiver_resampler."
_DECODER = "image_decoder.perceiver_resampler."
_LAYERS = "blip2qformer.encoder.layer."
_MMFS = "visual_tokenizer.encoder.mmfs_module."
_ATTENDING = "mm_decoder.layers."


class _Shapes(dict):
    """Official names to shapes; asking for one that is missing, or has another number of dimensions, is an error."""

    def __missing__(self, name):
        raise ValueError(
            f"The checkpoint lacks `{name}` among its {len(self)} weights. Expected the whole state dict of the "
            f"authors' MMInterleaved with a ConvNeXt, under their names."
        )

    def of(self, name: str, dims: int) -> tuple[int, ...]:
        shape = self[name]
        if len(shape) != dims:
            raise ValueError(f"`{name}` is {shape}; expected {dims} dimensions. The checkpoint is damaged.")
        return shape

    def width(self, name: str) -> int:
        """Returns the length of a vector."""
        return self.of(name, 1)[0]

    def count(self, prefix: str) -> int:
        """Returns how many numbered parts a prefix has."""
        found = {int(match[1]) for name in self if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
        if found != set(range(len(found))):
            raise ValueError(f"The checkpoint has the parts {sorted(found)} of `{prefix}`; some are missing.")
        return len(found)


def config_options(official, image_size: int, image_decoder_heads: int = 16, resampler_heads: int = 12) -> dict:
    """
    Reads the options of a [`DeemConfig`] off the shapes of official weights.

    Args:
        official (`dict[str, torch.Tensor]`): State dict of the authors' `MMInterleaved`.
        image_size (`int`): Side of the encoder's input in pixels, which no weight tells: 256 of the first stage, 448
            of the later ones.
        image_decoder_heads (`int`): Heads of the image decoder, which no weight tells either.
        resampler_heads (`int`): Heads of the encoder's resampler, which no weight tells where it has no QK norm.

    Returns:
        `dict`: Everything but `text_config` and the new tokens.

    Raises:
        ValueError: If the weights are not of a whole model with a ConvNeXt.
    """
    if vit := next(filter(_VIT.match, official), None):
        raise ValueError(
            f"The checkpoint has `{vit}`: its encoder is a ViT with a ViT-Adapter, as in MM-Interleaved and two of "
            f"DEEM's four encoders. Its convolutions and deformable attention have no counterpart in this project; "
            f"models with a ConvNeXt are converted."
        )
    shapes = _Shapes({name: tuple(value.shape) for name, value in official.items()})
    options = {"vision_config": _vision(shapes, image_size, resampler_heads), "context_dim": None}
    if f"{_DECODER}queries" in shapes:
        layer = f"{_DECODER}{_LAYERS}"
        options |= {
            "context_dim": shapes.of(f"{_DECODER}queries", 3)[2],
            "image_decoder_layers": shapes.count(layer),
            "image_decoder_heads": image_decoder_heads,
            "image_decoder_intermediate_size": shapes.width(f"{layer}0.intermediate_query.dense.bias"),
        }
    blocks = sorted({int(m[1]) for name in shapes if (m := re.match(r"mm_decoder\.layers\.(\d+)\.llama_cross", name))})
    if blocks:
        options["language_synchroniser"] = {
            "frequency": blocks[1] if len(blocks) > 1 else shapes.count(_ATTENDING),
            **_attention(shapes, f"{_ATTENDING}{blocks[0]}.llama_cross_attn.attn."),
        }
    if any(name.startswith(_MMFS) for name in shapes):
        attention = f"{_MMFS}mmfs_mid_block.mmfs."
        options["unet_synchroniser"] = {
            "unet": _unet(shapes),
            "inner_dim": shapes.width(f"{attention}value_proj.bias"),
            **_attention(shapes, attention),
        }
    return options


def _vision(shapes, image_size, resampler_heads):
    resampler = f"{_ENCODER}{_LAYERS}"
    _, num_queries, width = shapes.of(f"{_ENCODER}queries", 3)
    layers = shapes.count(resampler)
    crossing = [i for i in range(layers) if f"{resampler}{i}.crossattention.attention.key.weight" in shapes]
    norm = f"{resampler}0.attention.attention.q_norm.weight"
    stages = [f"{_TRUNK}stages.{stage}.blocks." for stage in range(4)]
    return {
        "open_clip_config": {
            "timm_model_name": "convnext_base",
            "timm_drop_path": 0.1,
            "image_size": image_size,
            "timm_kwargs": {
                "depths": [shapes.count(blocks) for blocks in stages],
                "dims": [shapes.width(f"{blocks}0.norm.weight") for blocks in stages],
            },
        },
        "embed_dim": shapes.width("visual_tokenizer.pos_proj.bias"),
        "multiscale": True,
        "region_tokens": "visual_tokenizer.feature_extractor.mask_feat_linear.weight" in shapes,
        "num_queries": num_queries,
        "resampler_hidden_size": width,
        "resampler_num_layers": layers,
        "resampler_num_heads": width // max(shapes.width(norm), 1) if norm in shapes else resampler_heads,
        "resampler_qk_norm": norm in shapes,
        "resampler_intermediate_size": shapes.width(f"{resampler}0.intermediate_query.dense.bias"),
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else layers,
    }


def _attention(shapes, prefix):
    """Heads and levels: each head has two offsets a point, and a score a point and level and one more a level."""
    heads = max(shapes.width(f"{prefix}sampling_offsets.bias") // (2 * OFFICIAL_POINTS), 1)
    return {
        "num_heads": heads,
        "num_levels": shapes.width(f"{prefix}attention_weights.bias") // (heads * (OFFICIAL_POINTS + 1)),
        "max_images": shapes.of(f"{prefix}query_relpos.weight", 2)[0],
    }


def _unet(shapes):
    """What a `UNetSynchroniser` asks of a UNet's config, from the number and width of the blocks that look at it."""
    skips = shapes.count(f"{_MMFS}mmfs_down_blocks.")
    levels, depth = 4, 2  # Stable Diffusion's, all versions; 1 + 4 * 2 layers and 3 downsamplings make 12 skips
    if skips != 1 + levels * depth + levels - 1:
        raise ValueError(f"The UNet's synchroniser has {skips} blocks; expected the 12 of Stable Diffusion.")
    widths = [shapes.width(f"{_MMFS}mmfs_down_blocks.{index}.conv.bias") for index in range(skips)]
    return {
        "sample_size": round(shapes.of(f"{_MMFS}mmfs_down_blocks.0.pos_embed", 2)[0] ** 0.5),
        "block_out_channels": [widths[1 + level * (depth + 1)] for level in range(levels)],
        "layers_per_block": depth,
    }
