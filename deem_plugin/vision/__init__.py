"""What the language model sees: vision tower, encoders, resampler, images, and the models that hold it."""

from transformers import AutoConfig, AutoModel

from .configuration import DeemVisionConfig
from .encoders import EncoderOutput
from .resampler import PerceiverResampler
from .tower import DeemVisionOutput, DeemVisionTower

# So that `from_pretrained` of the Auto classes, and every VLM whose `vision_config` is ours, finds the tower.
AutoConfig.register(DeemVisionConfig.model_type, DeemVisionConfig, exist_ok=True)
AutoModel.register(DeemVisionConfig, DeemVisionTower, exist_ok=True)

__all__ = [
    "DeemVisionConfig",
    "DeemVisionOutput",
    "DeemVisionTower",
    "EncoderOutput",
    "PerceiverResampler",
]
