"""Frozen diffusion networks behind one contract, and the table of those that we know."""

from .base import Denoiser, FlowDenoiser, check_context_dim, torch_dtype
from .transformers import (
    AuraFlowDenoiser,
    FluxDenoiser,
    Lumina2Denoiser,
    PixArtDenoiser,
    SanaDenoiser,
    SD3Denoiser,
)
from .unets import UNetDenoiser

# The networks we know, by the class name in `model_index.json`. To add one, write an adapter and list it here.
DENOISERS = {
    "UNet2DConditionModel": UNetDenoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
    "SD3Transformer2DModel": SD3Denoiser,
    "FluxTransformer2DModel": FluxDenoiser,
    "SanaTransformer2DModel": SanaDenoiser,
    "Lumina2Transformer2DModel": Lumina2Denoiser,
    "AuraFlowTransformer2DModel": AuraFlowDenoiser,
}

__all__ = [
    "DENOISERS",
    "AuraFlowDenoiser",
    "Denoiser",
    "FlowDenoiser",
    "FluxDenoiser",
    "Lumina2Denoiser",
    "PixArtDenoiser",
    "SD3Denoiser",
    "SanaDenoiser",
    "UNetDenoiser",
    "check_context_dim",
    "torch_dtype",
]
