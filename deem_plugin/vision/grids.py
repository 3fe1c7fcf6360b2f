"""Grids of patches: where each one is, and which of them a region touches."""

import torch
import torch.nn.functional as F

# Side of the grid on which the position embedding is defined before it is resized (official code).
POSITION_GRID = 16


def sincos_positions(length: int, dim: int, device=None) -> torch.Tensor:
    """Makes the 1-D sine-cosine position embedding of arXiv 1706.03762, all sines first, in float32."""
    # In double precision on the CPU: Apple's GPUs have none.
    frequencies = 10000 ** -(torch.arange(dim // 2, device="cpu", dtype=torch.float64) / (dim // 2))
    angles = torch.arange(length, device="cpu", dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device)  # (length, dim)


def sincos_position_embedding(
    dim: int, height: int, width: int, device=None, grid: int = POSITION_GRID
) -> torch.Tensor:
    """
    Makes the 2-D sine-cosine position embedding of DEEM, `(height * width, dim)`, float32: that of a square grid,
    `grid` cells a side, resized bicubically. `dim` is a multiple of four.
    """
    axis = sincos_positions(grid, dim // 2, device)
    columns = axis[None, :].expand(grid, -1, -1)
    rows = axis[:, None].expand(-1, grid, -1)
    embedding = torch.cat([rows, columns], dim=2).permute(2, 0, 1)[None]
    if (height, width) != (grid, grid):
        embedding = F.interpolate(embedding, size=(height, width), mode="bicubic", align_corners=False)
    return embedding[0].flatten(1).T


def region_to_patches(region_masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Marks the patches that a region touches, so that no region is too small to be seen: ones and zeros, `(batch, height
    * width, 1)`.

    Args:
        region_masks (`torch.Tensor`): Shape `(batch, 1, mask_height, mask_width)`, nonzero inside the region.
        height, width (`int`): The grid of patches.

    Raises:
        ValueError: If a mask is empty.
    """
    dtype = region_masks.dtype if region_masks.is_floating_point() else torch.float32
    inside = (region_masks != 0).float()
    if empty := int((inside.flatten(1).sum(1) == 0).sum()):
        raise ValueError(
            f"{empty} of {len(inside)} region masks are empty, so there is nothing to look at. Drop these samples, or "
            f"pass a mask of ones to look at the whole image."
        )
    touched = F.adaptive_avg_pool2d(inside, (height, width)) > 0
    return touched.to(dtype).flatten(1)[..., None]


def positioned_maps(maps, region_masks=None):
    """
    Adds positions to the tower's maps `{name: (images, dim, height, width)}`, and, with `region_masks` `(images, 1,
    height, width)`, leaves of each only the cells of its region. Returns a list, the finest first; shapes as given.
    """
    result = []
    for level in maps.values():
        height, width = level.shape[-2:]
        positions = sincos_position_embedding(level.shape[1], height, width, device=level.device)
        level = level + positions.T.unflatten(1, (height, width)).to(level.dtype)
        if region_masks is not None:
            cells = region_to_patches(region_masks, height, width)
            level = level * cells.mT.unflatten(2, (height, width)).to(level.dtype)
        result.append(level)
    return result
