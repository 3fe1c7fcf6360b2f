"""Weights of the synchronisers (MMFS) of the authors' code, in the names and shapes of ours."""

import re
from typing import NamedTuple

import torch

from ..vision.grids import sincos_position_embedding

# Points a head and a map in the official code, which hard-codes them.
OFFICIAL_POINTS = 8

# Where the parts are: DEEM has the UNet's in the visual tokenizer, MM-Interleaved in the image decoder.
_PLACES = [
    (r"^(?:visual_tokenizer\.encoder|image_decoder\.decoder)\.mmfs_module\.", "unet_synchroniser."),
    (r"^mm_decoder\.layers\.(\d+)\.llama_cross_attn\.", r"language_synchroniser.blocks.\1."),
]
_PARTS = [
    (r"\.mmfs_down_blocks\.", ".skip_blocks."),
    (r"\.mmfs_mid_block\.", ".middle_block."),
    (r"\.(?:query_norm|norm1)\.", ".query_norm."),
    (r"\.(?:feat_norm|norm2)\.", ".feature_norm."),
    (r"\.conv\.", ".zero."),
    (r"\.(?:mmfs|attn)\.", ".attention."),
    (r"\.dynamic_offset_mask\.", ".query."),
    (r"\.query_relpos\.", ".image_positions."),
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".scores."),
    (r"\.value_proj\.", ".value."),
    (r"\.output_proj\.", ".out."),
    (r"\.ignore_token$", ".null_value"),
]


class SynchroniserWeights(NamedTuple):
    """
    The synchronisers' share of an official checkpoint.

    Args:
        weights (`dict[str, torch.Tensor]`): State dicts of a `UNetSynchroniser` and a `LanguageModelSynchroniser`,
            whose names start with `unet_synchroniser.` and `language_synchroniser.`.
        renamed (`dict[str, str]`): Official name to ours.
        ignored (`dict[str, str]`): Official name to the reason.
    """

    weights: dict[str, torch.Tensor]
    renamed: dict[str, str]
    ignored: dict[str, str]


def synchroniser_weights(official: dict[str, torch.Tensor]) -> SynchroniserWeights:
    """
    Finds and renames what belongs to the synchronisers.

    Args:
        official (`dict[str, torch.Tensor]`): State dict of the authors' `MMInterleaved`. Other weights are left alone.

    Raises:
        ValueError: If a checkpoint has trained what the official code holds fixed.
    """
    result = SynchroniserWeights({}, {}, {})
    for name, value in official.items():
        place = next((place for place in _PLACES if re.match(place[0], name)), None)
        if place is None:
            continue
        if name.endswith(".pos_embed"):
            _check_position_embedding(name, value)
            result.ignored[name] = "a fixed sine-cosine embedding, which is computed"
        elif name.endswith(".ignore_token") and "mmfs_module" in name:
            if value.any():
                raise ValueError(
                    f"`{name}` is not zero. The official code trains it in the language model alone, and this project "
                    f"has no place for it in the UNet's."
                )
            result.ignored[name] = "zeros that are never trained"
        else:
            ours = re.sub(*place, name)
            for old, new in _PARTS:
                ours = re.sub(old, new, ours)
            result.renamed[name] = ours
            result.weights[ours] = _reshaped(ours, value)
    return result


def _reshaped(ours, value):
    if ".scores." in ours:
        # The last of each map's scores is overwritten by a constant before it is used, so it was never trained.
        return value.unflatten(0, (-1, OFFICIAL_POINTS + 1))[:, :-1].flatten(0, 1)
    if ours.endswith(".null_value"):
        return value.flatten()
    return value[:, :, 0, 0] if ours.endswith(".zero.weight") else value  # a 1 x 1 convolution


def _check_position_embedding(name, value):
    side = round(len(value) ** 0.5)
    computed = sincos_position_embedding(value.shape[1], side, side, device=value.device, grid=side)
    if not torch.allclose(value.float(), computed, atol=1e-3):
        raise ValueError(
            f"`{name}` is not the fixed 2-D sine-cosine embedding. Was it trained? This project computes the "
            f"embedding and has no place for another."
        )
