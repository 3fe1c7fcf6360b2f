"""The contract of every encoder: `pixel_values (batch, 3, height, width)` in, [`EncoderOutput`] out."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


class Tokens(NamedTuple):
    """Class token `(batch, 1, dim)`, `None` where the encoder has none, and patches `(batch, patches, dim)`."""

    class_token: torch.Tensor | None
    patches: torch.Tensor


@dataclass
class EncoderOutput:
    """
    What every encoder returns.

    Args:
        tokens (`Tokens`): The encoder's final tokens, patches in row-major order.
        layers (`tuple[Tokens, ...]`): Tokens after the embedding and after each layer; a single entry for ConvNeXts.
        pooled (`torch.Tensor`): One vector an image, `(batch, dim)`.
        maps (`dict[str, torch.Tensor]`): Feature maps `(batch, dim, height, width)` under the names `stride{pixels}`.
    """

    tokens: Tokens
    layers: tuple[Tokens, ...]
    pooled: torch.Tensor
    maps: dict[str, torch.Tensor]


def to_map(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Lays patches `(batch, height * width, dim)` out as `(batch, dim, height, width)`."""
    return patches.transpose(1, 2).unflatten(2, (height, width))


class Encoder(nn.Module):
    """
    Base class of all encoders: gradient checkpointing that takes effect.

    transformers switches checkpointing on by setting the attribute `gradient_checkpointing` on the modules that have
    it. timm and open_clip do not, so without the property below nothing would be checkpointed and nobody told.
    """

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass; set for timm and open_clip too."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool):
        self._gradient_checkpointing = enable
        for module in self.modules():
            if hasattr(module, "set_grad_checkpointing"):
                module.set_grad_checkpointing(enable)
