"""
What the language model sees: vision tower, encoders, resampler, images, and the models that hold it.

The names below are loaded on first use, for the feedback needs `towers`, `layouts`, `views` and `eyes` only, which ask
for torch and transformers. Our own tower asks for the extra `train`; its first use registers it with the Auto classes
(see `deem_plugin.vision.auto`).
"""

from importlib import import_module

from ..lazy import lazy_names

# Public name -> module that defines it.
_PUBLIC = {
    "DeemImageProcessor": "image_processing",
    "DeemVisionConfig": "configuration",
    "DeemVisionOutput": "tower",
    "DeemVisionTower": "tower",
    "EncoderOutput": "encoder_output",
    "PerceiverResampler": "resampler",
    "assemble_llava": "llava",
    "build_image_processor": "image_processing",
    "build_vision_tower": "build",
    "find_tower": "towers",
}
# Modules that know nothing of our own tower.
_CORE = ("resampler", "towers")

_load, __dir__, __all__ = lazy_names(__name__, {name: f".{module}" for name, module in _PUBLIC.items()})


def __getattr__(name):
    if name in _PUBLIC and _PUBLIC[name] not in _CORE:
        import_module(f"{__name__}.auto")
    return _load(name)
