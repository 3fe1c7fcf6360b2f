"""Weights of the synchronisers, from the names and shapes of the official code to ours."""

import re

import torch

# Points a head and a map in the official code, which hard-codes them.
OFFICIAL_POINTS = 8

_ATTENTION = {
    "dynamic_offset_mask": "query",
    "query_relpos": "image_positions",
    "sampling_offsets": "offsets",
    "attention_weights": "scores",
    "value_proj": "value",
    "output_proj": "out",
}
_UNET = [
    (r"^mmfs_down_blocks\.(\d+)\.", r"skip_blocks.\1."),
    (r"^mmfs_mid_block\.", "middle_block."),
    (r"\.feat_norm\.", ".feature_norm."),
    (r"\.conv\.", ".zero."),
    (r"\.mmfs\.", ".attention."),
]
_LANGUAGE_MODEL = [
    (r"^layers\.(\d+)\.llama_cross_attn\.", r"blocks.\1."),
    (r"\.norm1\.", ".query_norm."),
    (r"\.norm2\.", ".feature_norm."),
    (r"\.attn\.", ".attention."),
]
# What has no place here, and why.
IGNORED = {
    "pos_embed": "a fixed sine-cosine embedding, which is computed",
    "ignore_token": "zeros that were never trained",
}


def unet_synchroniser_weights(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a `UNetSynchroniser` from that of the official `mmfs_module`, its names without a prefix."""
    return _converted(official, _UNET)


def language_model_synchroniser_weights(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a `LanguageModelSynchroniser` from the `layers.{index}.llama_cross_attn.*` of `mm_decoder`."""
    return _converted(official, _LANGUAGE_MODEL)


def _converted(official, rules):
    weights = {}
    for name, value in official.items():
        part = name.rsplit(".", 1)[-1]
        if part in IGNORED:
            if part == "ignore_token" and value.any():
                raise ValueError(
                    f"`{name}` is not zero, so this checkpoint gives ignored images a value that the official code "
                    f"never trains and this project has no place for. Was it changed by other code?"
                )
            continue
        for theirs, ours in _ATTENTION.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        weights[name] = _reshaped(name, value)
    return weights


def _reshaped(name, value):
    if ".scores." in name:
        # Their last score of each map is overwritten by a constant before it is used.
        return value.unflatten(0, (-1, OFFICIAL_POINTS + 1))[:, :-1].flatten(0, 1)
    return value[:, :, 0, 0] if name.endswith(".zero.weight") else value  # a 1 x 1 convolution
