"""The parts that the methods themselves are tested with."""

from ..feedback.test_contrastive import denoiser, inputs
from ..training.conftest import parts

__all__ = ["denoiser", "inputs", "parts"]
