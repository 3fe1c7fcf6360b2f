"""DEEM itself: one causal model that reads and draws pictures between its texts."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..vision import auto  # noqa: F401  # a checkpoint holds our tower
from .assembly import assemble_deem
from .configuration import DeemConfig
from .deem import DeemForConditionalGeneration, DeemOutput
from .drawing import generate_images, generate_interleaved
from .image_decoder import ImageDecoder
from .losses import Draws
from .processing import DeemProcessor

AutoConfig.register(DeemConfig.model_type, DeemConfig, exist_ok=True)
AutoModelForImageTextToText.register(DeemConfig, DeemForConditionalGeneration, exist_ok=True)
AutoProcessor.register(DeemConfig, DeemProcessor, exist_ok=True)

__all__ = [
    "DeemConfig",
    "DeemForConditionalGeneration",
    "DeemOutput",
    "DeemProcessor",
    "Draws",
    "ImageDecoder",
    "assemble_deem",
    "generate_images",
    "generate_interleaved",
]
