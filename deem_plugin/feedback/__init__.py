"""What the diffusion model answers: the feedback that trains a vision tower."""

from .callback import DiffusionFeedbackCallback
from .checkpoint import load_conditioner, save_conditioner
from .conditioner import Conditioner
from .config import ConditionConfig, DiffusionModelConfig, FeedbackConfig, ObjectiveConfig, RossConfig
from .denoisers import DENOISERS, Denoiser, PixArtDenoiser, UNetDenoiser
from .diffusion_feedback import DiffusionFeedback
from .diffusion_model import DiffusionModel, load_diffusion_model
from .latents import CODECS, DeepCompressionCodec, PixelCodec, VaeCodec
from .timesteps import TIMESTEP_SAMPLERS

__all__ = [
    "CODECS",
    "DENOISERS",
    "TIMESTEP_SAMPLERS",
    "ConditionConfig",
    "Conditioner",
    "DeepCompressionCodec",
    "Denoiser",
    "DiffusionFeedback",
    "DiffusionFeedbackCallback",
    "DiffusionModel",
    "DiffusionModelConfig",
    "FeedbackConfig",
    "ObjectiveConfig",
    "PixArtDenoiser",
    "PixelCodec",
    "RossConfig",
    "UNetDenoiser",
    "VaeCodec",
    "load_conditioner",
    "load_diffusion_model",
    "save_conditioner",
]
