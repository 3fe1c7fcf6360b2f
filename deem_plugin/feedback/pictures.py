"""Pictures of any shape as a diffusion model takes them: not squashed, but in a letterbox that does not count."""

import torch
import torch.nn.functional as F

# Brightness of a letterbox's bars.
GREY = 0.5


def fit(picture, mask, size):
    """
    Resizes a picture into a frame, keeping its shape; bars fill the rest.

    Args:
        picture (`torch.Tensor`): Shape `(3, height, width)` in [0, 1].
        mask (`torch.Tensor`, *optional*): True where the picture counts, `(height, width)`.
        size (`tuple[int, int]`): Height and width of the frame, in pixels.

    Returns:
        `tuple`: The picture `(1, 3, *size)` and the share of each pixel that counts, float32 `(1, 1, *size)`; None
        where all of them do.
    """
    height, width = picture.shape[-2:]
    counts = None if mask is None else mask.float()[None, None]
    if (height, width) == tuple(size):
        return picture[None], counts
    factor = min(size[0] / height, size[1] / width)
    inner = [max(1, min(side, round(length * factor))) for length, side in zip((height, width), size, strict=True)]
    resized = F.interpolate(picture[None], inner, mode="bicubic", antialias=True).clamp(0, 1)
    if inner == list(size):
        return resized, None if counts is None else F.adaptive_avg_pool2d(counts, inner)
    if counts is None:
        counts = torch.ones(1, 1, height, width, device=picture.device)
    top, left = ((side - length) // 2 for length, side in zip(inner, size, strict=True))
    bars = (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)
    return F.pad(resized, bars, value=GREY), F.pad(F.adaptive_avg_pool2d(counts, inner), bars)


def latent_mask(masks, size, device):
    """
    Returns which cells of latents count: the share of the pixels below them that do.

    Args:
        masks (`list[torch.Tensor | None]`): For each picture as [`fit`] gives it.
        size (`tuple[int, int]`): Height and width of the latents, in cells.

    Returns:
        `torch.Tensor`: Shape `(pictures, 1, *size)`, float32 in [0, 1]; None where all count.
    """
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(1, 1, *size, device=device)
    cells = torch.cat([whole if mask is None else F.adaptive_avg_pool2d(mask.to(device), size) for mask in masks])
    # A tile of bars alone is blank and has no weight; its mean is to be a number all the same.
    return torch.where(cells.amax(dim=(1, 2, 3), keepdim=True) > 0, cells, 1.0)
