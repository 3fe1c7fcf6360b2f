"""Tiny configuration and weights of the parity fixtures, which hold the official visual tokenizer alone."""

from deem_plugin.models.official import rename


def _part(state_dict: dict, official_prefix: str, prefix: str) -> dict:
    """Renames weights as those of the whole official model, and returns the part whose names then start so."""
    renamed = {rename(official_prefix + name): value for name, value in state_dict.items()}
    return {name.removeprefix(prefix): value for name, value in renamed.items() if name and name.startswith(prefix)}


def resampler_weights(state_dict: dict, prefix: str) -> dict:
    """State dict of a `PerceiverResampler` from the official `perceiver_resampler`, whose keys start with `prefix`."""
    own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    return _part(own, "visual_tokenizer.perceiver_resampler.", "vision_tower.resampler.")


def tower_weights(state_dict: dict) -> dict:
    """
    State dict of a multi-scale `DeemVisionTower` from the official visual tokenizer (fixture F2).

    What is not part of the tower is left out: the two heads `proj_i` and `proj_t`, and the generator (`encoder.*`).
    The position embedding is computed, not stored.
    """
    return _part(state_dict, "visual_tokenizer.", "vision_tower.")


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
