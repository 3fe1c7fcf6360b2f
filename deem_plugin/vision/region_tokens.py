"""RegionTokens: what a region looks like on each map, and its shape, as tokens of their own."""

import torch
import torch.nn.functional as F
from torch import nn

from .grids import region_to_patches

SHAPE_GRID = 112  # cells a side on which the shape of a region is read (official code)


class RegionTokens(nn.Module):
    """
    Makes tokens of a region for the queries to read (the official `mask_align`, after Osprey,
    https://arxiv.org/abs/2312.10032, Sec. 3.2): its mean on each map, and one token of its shape. `dim` is the width
    of maps and tokens.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.features = nn.Linear(dim, dim)
        self.shape = nn.Sequential(
            nn.Linear(SHAPE_GRID**2, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, maps: list[torch.Tensor], region_masks: torch.Tensor) -> torch.Tensor:
        """
        Makes one token a map and one of the shape, `(batch, maps + 1, dim)`, of maps with positions, `(batch, dim,
        height, width)` each, and region masks `(batch, 1, height, width)`, nonzero inside.
        """
        tokens = []
        for level in maps:
            inside = region_to_patches(region_masks, *level.shape[-2:])  # (batch, cells, 1)
            inside = inside.to(level.dtype)
            tokens.append(self.features((level.flatten(2) @ inside)[..., 0] / inside.sum(1).clamp(min=1)))
        size = (SHAPE_GRID, SHAPE_GRID)
        shape = F.interpolate((region_masks != 0).to(maps[0].dtype), size, mode="bilinear", align_corners=False)
        return torch.stack([*tokens, self.shape(shape.flatten(1))], dim=1)
