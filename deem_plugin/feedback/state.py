"""What a training step knows of its feedback, reset at each step, and the sums that wait for the next log."""

from dataclasses import dataclass, field

import torch

from ..vision.views import View, sample_images
from .injection import Injection


@dataclass
class StepState:
    """
    State of one optimizer step; a new one is made at each step and each beginning, whatever ended the last one.

    Args:
        scale (`float`): Factor on the gradient of an image's loss; 0 computes nothing.
        seed (`int`): Of the noise of the step's first call; each further call adds 1.
        loss_scale (`float`): Factor on all gradients under fp16, in `scale` too.
        offset (`float`): Of [`sample_images`], in [0, 1), the same on all ranks.
        images (`int`): Images of the step's calls so far.
        model_inputs (`dict`): What the model is called with at the moment.
        target_pixel_values (`torch.Tensor`, *optional*): Of the batch, to be restored in place of its pictures.
        awaits_tower (`bool`): Whether the model was given pictures and has not called its tower yet.
        pending (`list[Injection]`): Losses whose gradient has not been seen in a backward pass yet.
    """

    scale: float = 0.0
    seed: int = 0
    loss_scale: float = 1.0
    offset: float = 0.0
    images: int = 0
    model_inputs: dict = field(default_factory=dict)
    target_pixel_values: torch.Tensor | None = None
    awaits_tower: bool = False
    pending: list[Injection] = field(default_factory=list)

    def draw(self, views: list[View], share: float) -> list[View]:
        """Returns the views of a `share` of the images of the next call."""
        drawn = sample_images(views, share, self.images, self.offset, self.seed)
        self.images += len({view.image for view in views})
        return drawn

    def generator(self, device) -> torch.Generator:
        """Returns the source of the next call's noise."""
        self.seed += 1
        return torch.Generator(device=device).manual_seed(self.seed - 1)


class Sums:
    """Sums by name that stay on the device until they are asked for, so that logging costs no synchronisation."""

    def __init__(self):
        self.totals: dict[str, torch.Tensor] = {}

    def add(self, **values):
        """Adds scalar tensors or numbers."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else value
            self.totals[name] = self.totals.get(name, 0.0) + value

    def take(self, names, device) -> dict[str, float]:
        """Returns the sums over all ranks since the last call, as floats, and starts anew. All ranks must call."""
        sums = torch.stack([torch.as_tensor(self.totals.get(name, 0.0), device=device).float() for name in names])
        self.totals = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))
