"""Tiny vision encoders of all the families in transformers."""

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "num_hidden_layers": 3,
    "depth": 3,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 128,
    "patch_size": 16,
    "window_size": 4,
    "depths": 1,
    "num_patches": 64,
}
_DINOV2 = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_DINOV2 |= {"image_size": 64, "patch_size": 16}
OPTIONS = {
    "depth_pro": {
        "patch_size": 64,
        "image_model_config": _DINOV2,
        "patch_model_config": _DINOV2,
        "fov_model_config": _DINOV2,
    },
    "efficientloftr": {"hidden_size": 256},
    "efficientnet": {"depth_coefficient": 0.2, "initializer_range": 0.2},
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 128, "depth": 3}},
    "gemma3n_vision": {"architecture": "mobilenetv5_300m_enc", "model_args": {"channel_multiplier": 0.05}},
    "swin2sr": {"image_size": 16, "window_size": 4},
    "sapiens2": {"num_attention_heads": 4, "num_key_value_heads": 4},
}


# Those that people use for their tokens, and each rule of the encoder.
TOKENS = [
    "aimv2_vision_model",
    "beit",
    "deit",
    "dinov2_with_registers",
    "dinov3_vit",
    "internvl_vision",
    "ijepa",
    "pixio",
    "pixtral",
    "radio",
    "siglip2_vision_model",
    "timm_wrapper",
    "vit",
]


def image_encoders() -> list[str]:
    """The types of all models that `AutoModel` makes and that read pictures, and nothing else."""
    found = []
    for model_type, names in MODEL_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        try:
            model_class = getattr(transformers, name)
            reads, main = model_class.input_modalities, model_class.main_input_name
        except (AttributeError, ImportError):  # named by the mapping, but not there, or not without another package
            continue
        # Some say that they read texts, and read pictures alone.
        if ("image" in reads and "text" not in reads) or (reads in ("text", ("text",)) and main == "pixel_values"):
            found.append(model_type)
    return sorted(found)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small configuration of a type: what it knows of `SIZES`, each in the form that it has by default."""
    config_class = CONFIG_MAPPING[model_type]
    default, values = config_class(), {}
    stages = isinstance(getattr(default, "depths", None), list | tuple)
    for name, size in SIZES.items():
        own = getattr(default, name, None) if name in config_class.__dataclass_fields__ else None
        if name in ("depths", "image_size") and isinstance(own, list | tuple):
            values[name] = type(own)([size] * len(own))
        elif type(own) is int and not (stages and name not in ("image_size", "window_size")):
            values[name] = size
    return config_class(**{**values, **OPTIONS.get(model_type, {})})
