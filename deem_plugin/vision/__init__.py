"""What the language model sees: vision tower, encoders, resampler, images, and the models that hold it."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .build import build_vision_tower
from .configuration import DeemVisionConfig
from .encoders import EncoderOutput
from .hosts import HOSTS, assemble_llava, check_host, mount_tower
from .image_processing import DeemImageProcessor, build_image_processor
from .llava import LlavaTower
from .resampler import PerceiverResampler
from .tower import DeemVisionOutput, DeemVisionTower
from .towers import find_tower

# So that `from_pretrained` of the Auto classes, and every VLM whose `vision_config` is ours, finds the tower.
AutoConfig.register(DeemVisionConfig.model_type, DeemVisionConfig, exist_ok=True)
AutoModel.register(DeemVisionConfig, DeemVisionTower, exist_ok=True)
AutoImageProcessor.register(
    DeemVisionConfig, image_processor_classes={"torchvision": DeemImageProcessor}, exist_ok=True
)

__all__ = [
    "HOSTS",
    "DeemImageProcessor",
    "DeemVisionConfig",
    "DeemVisionOutput",
    "DeemVisionTower",
    "EncoderOutput",
    "LlavaTower",
    "PerceiverResampler",
    "assemble_llava",
    "build_image_processor",
    "build_vision_tower",
    "check_host",
    "find_tower",
    "mount_tower",
]
