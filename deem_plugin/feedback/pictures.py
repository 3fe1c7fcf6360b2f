"""Pictures of any shape as a diffusion model takes them: not squashed, but in a letterbox that does not count."""

import torch
import torch.nn.functional as F

# Brightness of a letterbox's bars.
GREY = 0.5


def fit(picture, mask, side):
    """
    Resizes a picture `(3, height, width)` in [0, 1] into a square of `side` pixels, keeping its shape; bars fill the
    rest. `mask` `(height, width)` is True where the picture counts; None is everywhere.

    Returns:
        `tuple`: The picture `(1, 3, side, side)` and the share of each pixel that counts, float32 `(1, 1, side,
        side)`; None where all of them do.
    """
    height, width = picture.shape[-2:]
    counts = None if mask is None else mask.float()[None, None]
    if height == width == side:
        return picture[None], counts
    inner = [max(1, round(length * side / max(height, width))) for length in (height, width)]
    resized = F.interpolate(picture[None], inner, mode="bicubic", antialias=True).clamp(0, 1)
    if inner == [side, side]:
        return resized, None if counts is None else F.adaptive_avg_pool2d(counts, inner)
    if counts is None:
        counts = torch.ones(1, 1, height, width, device=picture.device)
    top, left = ((side - length) // 2 for length in inner)
    bars = (left, side - inner[1] - left, top, side - inner[0] - top)
    return F.pad(resized, bars, value=GREY), F.pad(F.adaptive_avg_pool2d(counts, inner), bars)


def latent_mask(masks, size, device):
    """
    Returns which cells of latents of `size` (height, width) count, `(pictures, 1, *size)` in [0, 1]: the share of the
    pixels below them that do, of masks as [`fit`] gives them; None where all count.
    """
    if all(mask is None for mask in masks):
        return None
    whole = torch.ones(1, 1, *size, device=device)
    cells = torch.cat([whole if mask is None else F.adaptive_avg_pool2d(mask.to(device), size) for mask in masks])
    # A tile of bars alone is blank and has no weight; its mean is to be a number all the same.
    return torch.where(cells.amax(dim=(1, 2, 3), keepdim=True) > 0, cells, 1.0)
