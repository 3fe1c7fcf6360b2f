"""A view: one picture as a vision tower saw it, and the tokens that the language model reads of it."""

import math
import random
from dataclasses import dataclass, replace

import torch


@dataclass
class View:
    """
    What the feedback reads of one picture in one call of a vision tower.

    Args:
        tokens (`torch.Tensor`): Tokens that the language model reads, on the autograd graph, `(tokens, dim)`.
        picture (`torch.Tensor`): The picture, float32 in [0, 1], detached, `(3, height, width)`. Not clamped: values
            outside tell that the statistics are wrong.
        image (`int`): Which image of the call it belongs to; tiles and frames of one image share it.
        kind (`str`): `image`, `tile`, `thumbnail` or `frame`.
        positions (`torch.Tensor`, *optional*): Row and column of each token as fractions of the picture, in (0, 1),
            `(tokens, 2)`; None where the tokens form no grid.
        pooled (`torch.Tensor`, *optional*): The tower's pooled vector on the graph, `(dim,)`.
        maps (`dict[str, torch.Tensor]`, *optional*): The tower's multi-scale maps, each `(dim, height, width)`.
        mask (`torch.Tensor`, *optional*): True where the picture counts: no letterbox bar, or the region that is
            meant; `(height, width)` of any grid over the whole picture.
        weight (`float`): Share of the view in the loss of its image; those of one image sum to 1, or to more where
            it stands for others that were not drawn.
        elsewhere (`int`): Views of its image that are in another call of the tower.
    """

    tokens: torch.Tensor
    picture: torch.Tensor
    image: int
    kind: str = "image"
    positions: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    maps: dict[str, torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    weight: float = 1.0
    elsewhere: int = 0


def sample_images(views: list[View], share: float, before: int, offset: float, seed: int) -> list[View]:
    """
    Keeps the views of a share of the images, drawn at random, each counted 1 / `share` times.

    Each image is drawn with probability `share` where `offset` is uniform in [0, 1), and of the images of a whole step
    as near to that share as a whole number can be: systematic sampling (Madow 1949).

    Args:
        views (`list[View]`): Of one call.
        share (`float`): In (0, 1].
        before (`int`): Images of the step's earlier calls.
        offset (`float`): Rounds the number up or down, the same in all calls of a step.
        seed (`int`): Draws which images.
    """
    images = list(dict.fromkeys(view.image for view in views))
    count = math.floor(share * (before + len(images)) + offset) - math.floor(share * before + offset)
    drawn = set(random.Random(seed).sample(images, count))
    return [replace(view, weight=view.weight / share) for view in views if view.image in drawn]


def sample_views(views: list[View], limit: int | None, generator=None) -> list[View]:
    """
    Gives each view its share of its image's weight, and keeps at most `limit` views an image, drawn at random by
    `generator`.

    A thumbnail is always kept. The others are drawn without replacement and weighted so that the expectation of the
    weighted sum is the mean over all views. Views in another call count for the limit, and of each call one view
    stays.
    """
    by_image: dict[int, list[View]] = {}
    for view in views:
        by_image.setdefault(view.image, []).append(view)
    chosen = []
    for group in by_image.values():
        total = len(group) + group[0].elsewhere
        kept = [view for view in group if view.kind == "thumbnail"] if limit is not None else []
        others = [view for view in group if not any(view is other for other in kept)]
        places = len(others) if limit is None else limit - group[0].elsewhere - len(kept)
        count = min(len(others), max(places, 0))
        if not count and others:  # no place beside the thumbnail: either may come
            kept, others, count = [], group, 1
        drawn = others
        if count < len(others):
            device = "cpu" if generator is None else generator.device
            order = torch.randperm(len(others), generator=generator, device=device)[:count].sort().values
            drawn = [others[index] for index in order.tolist()]
        share = len(others) / (total * max(count, 1))
        chosen += [replace(view, weight=view.weight / total) for view in kept]
        chosen += [replace(view, weight=view.weight * share) for view in drawn]
    return chosen


def bars(picture: torch.Tensor) -> torch.Tensor:
    """
    Marks what of a tile `(3, height, width)` in [0, 1] is content, bool, `(height, width)`: all but rows and columns
    at its border that are black, the bars of a letterbox. Computed without a synchronisation.
    """
    dark = (picture <= 1 / 512).all(dim=0)
    inside = torch.ones_like(dark)
    for dim in (0, 1):
        filled = ~dark.all(dim=1 - dim)
        spread = (filled.cumsum(0) > 0) & (filled.flip(0).cumsum(0).flip(0) > 0)
        inside &= spread.unsqueeze(1 - dim)
    return inside


def is_blank(picture: torch.Tensor) -> torch.Tensor:
    """Tells whether a picture `(3, height, width)` has one colour only, as one that stands in for none; bool, `()`."""
    flat = picture.flatten(1)
    return (flat - flat[:, :1]).abs().amax() < 1 / 512
