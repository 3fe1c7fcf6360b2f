"""Names of the official code's weights, mapped to ours."""

import re

_RESAMPLER_RULES = [
    (r"^blip2qformer\.layernorm\.", "norm."),
    (r"^blip2qformer\.encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"\.attention\.attention\.", ".self_attention."),
    (r"\.crossattention\.attention\.", ".cross_attention."),
    (r"\.attention\.output\.dense\.", ".self_attention.out."),
    (r"\.attention\.output\.LayerNorm\.", ".self_attention.norm."),
    (r"\.crossattention\.output\.dense\.", ".cross_attention.out."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_attention.norm."),
    (r"\.intermediate_query\.dense\.", ".feed_forward.up."),
    (r"\.output_query\.dense\.", ".feed_forward.down."),
    (r"\.output_query\.LayerNorm\.", ".feed_forward.norm."),
]


def resampler_weights(state_dict: dict, prefix: str) -> dict:
    """State dict of a `PerceiverResampler` from the official `perceiver_resampler`, whose keys start with `prefix`."""
    weights = {}
    for name, value in state_dict.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, replacement in _RESAMPLER_RULES:
                name = re.sub(pattern, replacement, name)
            weights[name] = value
    return weights


_TOWER_RULES = [
    (r"^sniffer\.vision_model\.visual\.trunk\.", "encoder.trunk."),
    (r"^sniffer\.vision_model\.adapter_cls\.", "encoder.class_adapter."),
    (r"^pos_proj\.", "position_proj."),
    (r"^pos_ln\.", "position_norm."),
    (r"^post_ln\.", "input_norm."),
]


def tower_weights(state_dict: dict) -> dict:
    """
    State dict of a multi-scale `DeemVisionTower` from the official visual tokenizer (fixture F2).

    What is not part of the tower is left out: the two heads `proj_i` and `proj_t`, and the generator (`encoder.*`).
    The position embedding is computed, not stored.
    """
    weights = {f"resampler.{k}": v for k, v in resampler_weights(state_dict, "perceiver_resampler.").items()}
    for name, value in state_dict.items():
        for stage in range(4):  # the official names count from the stride: c2 has 2**2, c5 has 2**5
            if name.startswith(adapter := f"sniffer.vision_model.adapter_c{stage + 2}."):
                weights[f"encoder.adapters.{stage}.{name.removeprefix(adapter)}"] = value
        for pattern, replacement in _TOWER_RULES:
            if re.match(pattern, name):
                weights[re.sub(pattern, replacement, name)] = value
    return weights


def parity_tower_config(**options) -> dict:
    """Keyword arguments of the `DeemVisionConfig` that fixture F2 was made with."""
    return {
        "open_clip_config": {
            "timm_model_name": "convnext_base",
            "image_size": 64,
            "timm_kwargs": {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64], "ls_init_value": 0.5},
        },
        "embed_dim": 64,
        "multiscale": True,
        "class_token": False,
        "num_queries": 8,
        "resampler_hidden_size": 32,
        "resampler_num_layers": 3,
        "resampler_num_heads": 4,
        "resampler_intermediate_size": 64,
    } | options
