"""Grids of patches: where each one is, and which of them a region touches."""

import torch
import torch.nn.functional as F

# Side of the grid on which the position embedding is defined before it is resized (official code).
POSITION_GRID = 16


def sincos_position_embedding(
    dim: int, height: int, width: int, device=None, grid: int = POSITION_GRID
) -> torch.Tensor:
    """
    Makes the 2-D sine-cosine position embedding of DEEM: that of a square grid, resized bicubically.

    Args:
        dim (`int`): Width, a multiple of four.
        height, width (`int`): Grid to make it for.
        device (`torch.device`, *optional*): Where to make it.
        grid (`int`, *optional*, defaults to 16): Side of the grid that it is defined on.

    Returns:
        `torch.Tensor`: Shape `(height * width, dim)`, float32.
    """
    # In double precision on the CPU: Apple's GPUs have none.
    frequencies = 10000 ** -(torch.arange(dim // 4, device="cpu", dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, device="cpu", dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device)  # (grid, dim / 2)
    columns = axis[None, :].expand(grid, -1, -1)
    rows = axis[:, None].expand(-1, grid, -1)
    embedding = torch.cat([rows, columns], dim=2).permute(2, 0, 1)[None]
    if (height, width) != (grid, grid):
        embedding = F.interpolate(embedding, size=(height, width), mode="bicubic", align_corners=False)
    return embedding[0].flatten(1).T


def region_to_patches(region_masks: torch.Tensor, height: int, width: int, official: bool = False) -> torch.Tensor:
    """
    Marks the patches that a region touches.

    A patch belongs to the region when any part of it does, so that no region is too small to be seen.

    Args:
        region_masks (`torch.Tensor`): Shape `(batch, 1, mask_height, mask_width)`, nonzero inside the region.
        height, width (`int`): The grid of patches.
        official (`bool`, *optional*, defaults to `False`):
            The rule of the authors' code instead, under which a patch belongs to the region when what lies around
            its middle does. Small regions, and empty ones, then come out empty.

    Returns:
        `torch.Tensor`: Shape `(batch, height * width, 1)`, ones and zeros.
    """
    dtype = region_masks.dtype if region_masks.is_floating_point() else torch.float32
    if official:
        resized = F.interpolate(region_masks.float(), (height, width), mode="bilinear", align_corners=False)
        return (resized > 0).to(dtype).flatten(1)[..., None]
    inside = (region_masks != 0).float()
    if empty := int((inside.flatten(1).sum(1) == 0).sum()):
        raise ValueError(
            f"{empty} of {len(inside)} region masks are empty, so there is nothing to look at. Drop these samples, or "
            f"pass a mask of ones to look at the whole image."
        )
    touched = F.adaptive_avg_pool2d(inside, (height, width)) > 0
    return touched.to(dtype).flatten(1)[..., None]


def positioned_maps(maps, region_masks=None, official=False):
    """
    Adds positions to the tower's maps, and leaves of each only the cells of its region.

    Args:
        maps (`dict[str, torch.Tensor]`): From the tower, each `(images, dim, height, width)`.
        region_masks (`torch.Tensor`, *optional*): Shape `(images, 1, height, width)`, nonzero in the region meant.
        official (`bool`, *optional*, defaults to `False`): As in `region_to_patches`.

    Returns:
        `list[torch.Tensor]`: In the tower's order, the finest first; shapes as given.
    """
    result = []
    for level in maps.values():
        height, width = level.shape[-2:]
        positions = sincos_position_embedding(level.shape[1], height, width, device=level.device)
        level = level + positions.T.unflatten(1, (height, width)).to(level.dtype)
        if region_masks is not None:
            cells = region_to_patches(region_masks, height, width, official)
            level = level * cells.mT.unflatten(2, (height, width)).to(level.dtype)
        result.append(level)
    return result
