"""
What the language model sees: vision tower, encoders, resampler, images, and the models that hold it.

The names below are loaded on first use, for the feedback needs `towers`, `layouts`, `views` and `eyes` only, which ask
for torch and transformers. Our own tower asks for the extra `train`; its first use registers it with the Auto classes
(see `deem_plugin.vision.auto`).
"""

from importlib import import_module

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

__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if _PUBLIC[name] not in _CORE:
        import_module(f"{__name__}.auto")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
