"""What the language model reads of a tower's output."""

import math
from dataclasses import dataclass

import torch

from .layouts import Layout
from .outputs import at_path, has_values, tokens_last
from .probe import Call

# Class and register tokens that a tower may have, where they can be told by their number only.
_MOST_SPECIAL_TOKENS = 8


@dataclass
class Reading:
    """
    Which of a tower's outputs the language model reads, so that the feedback acts on the same tokens and on no others.
    A class token that the language model never sees would be a hiding place: the tower could store there what the
    denoiser asks for, and the language model would gain nothing.

    Args:
        paths (`list[tuple]`): Keys of each tensor that is read within the tower's output, from the outside in. Several
            with the same tokens (layers, DeepStack) are concatenated.
        rows (`list[int]`, *optional*): Tokens that are read of each picture; all by default.
        first (`int`): The first token that is read, where all that follow are.
    """

    paths: list[tuple]
    rows: list[int] | None = None
    first: int = 0

    def select(self, output) -> torch.Tensor:
        """Returns the tokens that are read of a tower's output, `(..., tokens, dim)`."""
        tokens = torch.cat([tokens_last(at_path(output, path)) for path in self.paths], dim=-1)
        if self.rows is not None:
            return tokens[..., self.rows, :]
        return tokens[..., self.first :, :] if self.first else tokens


def reading_of(call: Call, layout: Layout) -> Reading:
    """Chooses, of the tensors that are read, those with most tokens, and of a grid the rows with a gradient."""
    shapes = {path: tokens_last(gradient).shape[:-1] for path, gradient in call.read.items()}
    most = max(shapes.values(), key=math.prod)
    paths = [path for path, shape in shapes.items() if shape == most]
    reading = Reading(paths)
    gradients = [tokens_last(call.read[path]) for path in paths]
    if not layout.fixed_rows or gradients[0].dim() < 3:
        return reading
    if not has_values(gradients[0]):  # so many of the first are left out as the language model gets fewer
        surplus = gradients[0].shape[1] - call.features
        return Reading(paths, first=surplus if 0 < surplus <= _MOST_SPECIAL_TOKENS else 0)
    read = torch.stack([(gradient != 0).any(dim=-1) for gradient in gradients]).flatten(0, -2).any(dim=0)
    if not read.any():  # a projector that starts at zero passes no gradient yet
        return reading
    first = int(read.long().argmax())
    if read[first:].all():
        return Reading(paths, first=first)
    return Reading(paths, rows=read.nonzero().flatten().tolist())


def parameters_of(tower, tensors) -> set[str]:
    """Returns the names of the tower's trainable parameters that tensors depend on."""
    trainable = {name: value for name, value in tower.named_parameters() if value.requires_grad}
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    if not trainable or not tensors:
        return set()
    total = sum(tensor.float().sum() for tensor in tensors)
    gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    return {name for name, gradient in zip(trainable, gradients, strict=True) if gradient is not None}


def pooled_width(outputs) -> int:
    pooled = outputs.get(("pooler_output",))
    return pooled.shape[-1] if pooled is not None and pooled.dim() == 2 else 0
