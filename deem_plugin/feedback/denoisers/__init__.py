"""Frozen diffusion networks behind one contract, and the table of those that we know."""

from . import transformers
from .base import Denoiser, FlowDenoiser, check_context_dim
from .transformers import PixArtDenoiser
from .unets import UNetDenoiser

# The networks we know, by the class name in `model_index.json`. To add one, write an adapter and list it here.
DENOISERS = {
    "UNet2DConditionModel": UNetDenoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
    "SD3Transformer2DModel": transformers.SD3Denoiser,
    "FluxTransformer2DModel": transformers.FluxDenoiser,
    "SanaTransformer2DModel": transformers.SanaDenoiser,
    "Lumina2Transformer2DModel": transformers.Lumina2Denoiser,
    "AuraFlowTransformer2DModel": transformers.AuraFlowDenoiser,
}

__all__ = ["DENOISERS", "Denoiser", "FlowDenoiser", "PixArtDenoiser", "UNetDenoiser", "check_context_dim"]
