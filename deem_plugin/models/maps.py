"""The tower's multi-scale maps, in the order and place in which the synchronisers read them."""

import torch
import torch.nn.functional as F

from ..vision.tower import region_to_patches, sincos_position_embedding


def positioned_maps(maps, region_masks=None):
    """
    Adds positions to the tower's maps, and leaves of each only the cells of its region.

    Args:
        maps (`dict[str, torch.Tensor]`): From the tower, each `(images, dim, height, width)`.
        region_masks (`torch.Tensor`, *optional*): Shape `(images, 1, height, width)`, nonzero in the region meant.

    Returns:
        `list[torch.Tensor]`: In the tower's order, the finest first; shapes as given.
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


def by_rows(maps, counts):
    """
    Arranges maps of images by the rows of tokens that show them.

    Args:
        maps (`list[torch.Tensor]`): Each `(images, dim, height, width)`, in reading order.
        counts (`list[int]`): Images of each row.

    Returns:
        `list[torch.Tensor]`: Each `(rows, most images of a row, dim, height, width)`, zero where a row has fewer.
    """
    most = max(counts)
    return [
        torch.stack([F.pad(own, (0, 0) * 3 + (0, most - len(own))) for own in torch.split(level, counts)])
        for level in maps
    ]


def of_previous(maps, previous):
    """
    Gives each image the maps of the one before it.

    Args:
        maps (`list[torch.Tensor]`): Each `(images, dim, height, width)`.
        previous (`torch.Tensor`): Index of the image before, -1 where there is none, `(images,)`.

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor]`: Maps, each `(images, 1, dim, height, width)`, and the mask
        `(images, 1)` of those that have one before them.
    """
    exists = previous >= 0
    return [(level[previous] * exists[:, None, None, None])[:, None] for level in maps], exists[:, None]
