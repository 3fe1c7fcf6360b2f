"""The tower's multi-scale maps, arranged by rows of text and by the images that they stand before."""

import torch
import torch.nn.functional as F


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
