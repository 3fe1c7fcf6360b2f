"""Deformable attention over the multi-scale maps of several images, with torch's own `grid_sample`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


class ImageFeatures(NamedTuple):
    """
    The multi-scale features of each sample's images, and who may look at them.

    Args:
        tokens (`torch.Tensor`): All cells of all levels, shape `(batch, images, cells, dim)`.
        sizes (`tuple[tuple[int, int], ...]`): Height and width of each level, in the order of the cells.
        mask (`torch.Tensor`): Boolean, `(batch, queries, images)` or, the same for all queries, `(batch, 1, images)`.
    """

    tokens: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    mask: torch.Tensor


def image_features(maps: Sequence[torch.Tensor], mask: torch.Tensor) -> ImageFeatures:
    """
    Lays the maps of each level side by side.

    Args:
        maps (`Sequence[torch.Tensor]`): One tensor a level, each `(batch, images, dim, height, width)`.
        mask (`torch.Tensor`): Nonzero where an image may be looked at: `(batch, images)`, or, to say it for each
            query, `(batch, queries, images)`.
    """
    shapes = [tuple(level.shape) for level in maps]
    if any(len(shape) != 5 for shape in shapes) or len({shape[:3] for shape in shapes}) != 1:
        raise ValueError(
            f"Maps must be (batch, images, dim, height, width), the first three equal on all levels; got {shapes}."
        )
    batch, images = shapes[0][:2]
    mask = mask.bool()
    mask = mask[:, None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or (len(mask), mask.shape[2]) != (batch, images):
        raise ValueError(
            f"The mask of images must be ({batch}, {images}) or ({batch}, queries, {images}) for maps of {batch} "
            f"samples with {images} images each; got {tuple(mask.shape)}."
        )
    tokens = torch.cat([level.flatten(3).transpose(2, 3) for level in maps], dim=2)
    return ImageFeatures(tokens, tuple(shape[3:] for shape in shapes), mask)


def relative_positions(mask: torch.Tensor) -> torch.Tensor:
    """
    Numbers the images (last dimension of `mask`) that a query sees from the latest backwards: 1, 2, ...; those it does
    not see have 0.
    """
    seen = mask.long()
    return (seen.sum(-1, keepdim=True) + 1 - seen.cumsum(-1)) * seen


def softmax_with_null(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Normalises scores over their last dimension and one more entry of score 0, where attention goes that finds nothing.
    Returns the weights and that of the null entry, one dimension less. Scores may all be minus infinity.
    """
    weights = F.pad(scores, (0, 1)).softmax(-1)
    return weights[..., :-1], weights[..., -1]


def sample_maps(values, sizes, points, weights):
    """
    Sums what is found at `points` of every map of every image, by `weights`: `(batch, queries, heads * head_dim)`.

    Args:
        values (`torch.Tensor`): Shape `(batch, images, cells, heads, head_dim)`, cells as in [`ImageFeatures`].
        sizes (`Sequence[tuple[int, int]]`): Height and width of each level.
        points (`torch.Tensor`): Shape `(batch, images, queries, heads, points, 2)`: x and y as fractions of the
            picture, (0, 0) its upper left corner, the same on every level. What lies outside is zero.
        weights (`torch.Tensor`): Shape `(batch, images, queries, heads, levels, points)`.
    """
    batch, images, queries, heads = points.shape[:4]
    grid = (2 * points - 1).transpose(2, 3).flatten(0, 2)  # (batch * images * heads, queries, points, 2)
    weights = weights.transpose(2, 3).flatten(0, 2)  # (batch * images * heads, queries, levels, points)
    found = 0
    levels = values.split([height * width for height, width in sizes], dim=2)
    for level, (cells, size) in enumerate(zip(levels, sizes, strict=True)):
        level_map = cells.permute(0, 1, 3, 4, 2).flatten(0, 2).unflatten(2, size)
        sampled = F.grid_sample(level_map, grid, align_corners=False)  # (..., head_dim, queries, points)
        found = found + (sampled * weights[:, None, :, level]).sum(-1)
    found = found.unflatten(0, (batch, images, heads)).sum(1)  # (batch, heads, head_dim, queries)
    return found.flatten(1, 2).transpose(1, 2)


class DeformableAttention(nn.Module):
    """
    Each query looks at a few learned points around its own place, on every level of every image it may see.

    Deformable DETR's attention (https://arxiv.org/abs/2010.04159, Sec. 4.1) as MM-Interleaved extends it to many
    images (MMFS, https://arxiv.org/abs/2401.10208): points and weights also depend on how many images ago an image
    came, and a null entry takes the attention of queries that see nothing of use.

    Args:
        query_dim (`int`): Width of the queries and of the output.
        feature_dim (`int`): Width of the images' features.
        inner_dim (`int`): Width of the values, over all heads.
        num_heads (`int`): Number of heads; must divide `inner_dim`.
        num_levels (`int`): Number of maps an image.
        num_points (`int`): Points that each head looks at on each map.
        max_images (`int`): Number of relative positions, 0 included: images a sample may have, plus one.
        offset_grid (`int`): Offsets of points are counted in cells of a grid of this many cells a side.
        offset_init (`float`): Offsets start anywhere up to this many cells to either side.
        offset_map (`int`, *optional*): Side of the largest map for which that holds; with one twice as large, an
            offset reaches half as far. By default it holds for maps of every size.
        learn_null (`bool`, *optional*, defaults to `False`):
            Whether the null entry has a value that is learned; it is zero otherwise.
    """

    def __init__(
        self,
        query_dim: int,
        feature_dim: int,
        inner_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        max_images: int,
        offset_grid: int,
        offset_init: float,
        offset_map: int | None = None,
        learn_null: bool = False,
    ):
        super().__init__()
        if inner_dim % num_heads:
            raise ValueError(
                f"The width of the values must be a multiple of the number of heads, got inner_dim={inner_dim} and "
                f"num_heads={num_heads}. Choose a `num_heads` that divides {inner_dim}."
            )
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.max_images = max_images
        self.offset_grid, self.offset_init, self.offset_map = offset_grid, offset_init, offset_map
        self.query = nn.Linear(query_dim, query_dim)
        self.image_positions = nn.Embedding(max_images, query_dim)
        self.offsets = nn.Linear(query_dim, num_heads * num_points * 2)
        self.scores = nn.Linear(query_dim, num_heads * num_levels * num_points)
        self.value = nn.Linear(feature_dim, inner_dim)
        self.out = nn.Linear(inner_dim, query_dim)
        self.null_value = nn.Parameter(torch.empty(inner_dim)) if learn_null else None
        self.reset_parameters()

    def reset_parameters(self):
        """Starts with random points that are the same for every query, and with weights that are nearly equal."""
        for linear in (self.query, self.scores):
            init.normal_(linear.weight, std=0.02)
        init.zeros_(self.offsets.weight)
        init.uniform_(self.offsets.bias, -self.offset_init, self.offset_init)
        for linear in (self.value, self.out):
            init.xavier_uniform_(linear.weight)
        for linear in (self.query, self.scores, self.value, self.out):
            init.zeros_(linear.bias)
        if self.null_value is not None:
            init.zeros_(self.null_value)
        init.trunc_normal_(self.image_positions.weight, std=0.02)

    def forward(self, queries: torch.Tensor, reference_points: torch.Tensor, images: ImageFeatures) -> torch.Tensor:
        """
        Updates queries `(batch, queries, query_dim)`.

        Args:
            queries (`torch.Tensor`): See above.
            reference_points (`torch.Tensor`): Each query's place, x and y as fractions of the picture; broadcasts to
                `(batch, queries, 2)`.
            images (`ImageFeatures`): What is looked at. Images that the mask hides have no influence.
        """
        batch, length = queries.shape[:2]
        count, levels = images.tokens.shape[1], len(images.sizes)
        if levels != self.num_levels:
            raise ValueError(f"Expected {self.num_levels} maps an image, got {levels} of sizes {images.sizes}.")
        if count >= self.max_images:
            raise ValueError(
                f"A sample has {count} images, but positions were made for at most {self.max_images - 1}. Split the "
                f"sample, or build the model with `max_images={count + 1}` or more."
            )
        if len(images.mask) != batch or images.mask.shape[1] not in (1, length):
            raise ValueError(
                f"The mask of images must be ({batch}, 1 or {length}, {count}) for {batch} samples of {length} "
                f"queries; got {tuple(images.mask.shape)}."
            )
        mask = images.mask.expand(-1, length, -1).transpose(1, 2)  # (batch, images, queries)
        positions = relative_positions(images.mask).expand(-1, length, -1).transpose(1, 2)
        queries = self.query(queries)

        # In float32: bfloat16 would move points by up to an eighth of a cell, on a map 64 cells wide.
        offsets = self._by_image(self.offsets, queries, positions).unflatten(-1, (self.num_heads, -1, 2))
        if self.offset_map is not None:
            height, width = images.sizes[0]
            offsets = offsets * (self.offset_map / offsets.new_tensor([width, height]))
        points = reference_points.float()[:, None, :, None, None] + offsets / self.offset_grid
        scores = self._by_image(self.scores, queries, positions).unflatten(-1, (self.num_heads, levels, -1))
        scores = scores.masked_fill(~mask[..., None, None, None], -torch.inf)
        weights, of_null = softmax_with_null(scores.permute(0, 2, 3, 1, 4, 5).flatten(3))  # images, levels, points
        weights = weights.unflatten(-1, (count, levels, -1)).permute(0, 3, 1, 2, 4, 5)

        values = self.value(images.tokens).unflatten(-1, (self.num_heads, -1))
        found = sample_maps(values.float(), images.sizes, points, weights)
        if self.null_value is not None:
            nothing = of_null[..., None] * self.null_value.unflatten(-1, (self.num_heads, -1)).float()
            found = found + nothing.flatten(2)
        return self.out(found.to(values.dtype))

    def _by_image(self, linear, queries, positions):
        """Applies `linear` to the sum of query and position of every image; both only once, as it is linear."""
        of_positions = F.linear(self.image_positions.weight, linear.weight)
        return (linear(queries)[:, None] + of_positions[positions]).float()
