"""
Registers our own tower with the Auto classes of transformers, so that their `from_pretrained`, and every VLM whose
`vision_config` is ours, find it. Import it before a checkpoint is loaded that may hold such a tower.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration import DeemVisionConfig
from .image_processing import DeemImageProcessor
from .tower import DeemVisionTower

AutoConfig.register(DeemVisionConfig.model_type, DeemVisionConfig, exist_ok=True)
AutoModel.register(DeemVisionConfig, DeemVisionTower, exist_ok=True)
AutoImageProcessor.register(
    DeemVisionConfig, image_processor_classes={"torchvision": DeemImageProcessor}, exist_ok=True
)
