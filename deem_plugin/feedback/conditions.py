"""Which of a picture's visual tokens the generator is shown."""

import math

import torch

from ..vision.grids import positioned_maps


def condition_tokens(views, condition, num_patches=None, generator=None):
    """
    Chooses the tokens that the conditioner reads.

    - `queries`, `patches`: the tokens that the language model reads, to be resampled or taken one by one;
    - `queries+dense`: the same as `queries`; what is dense comes by another way, see [`dense_maps`];
    - `cls`: the tower's pooled vector alone (GenHancer, https://arxiv.org/abs/2503.19480; DCR). A tower that is asked
      for a summary only keeps its patches as they are, and there is little that the condition could leak;
    - `cls+patches`: the pooled vector and then patches (DIVA, https://arxiv.org/abs/2407.20171).

    Args:
        views (`ImageViews`): What the tower gave.
        condition (`str`): One of the five.
        num_patches (`int`, *optional*): Of `cls+patches`: so many, drawn anew for each picture; all by default.
        generator (`torch.Generator`, *optional*): Draws them.

    Returns:
        `tuple`: The tokens `(images, tokens, dim)` and their mask `(images, tokens)`, None if none is padded.

    Raises:
        ValueError: If the tower pools nothing, or has fewer patches than asked for.
    """
    if condition in ("queries", "patches", "queries+dense"):
        return views.padded_tokens()
    if views.pooled is None:
        raise ValueError(
            f"`condition: {condition}` asks for the tower's pooled vector, and it gives none (`pooler_output` is "
            f"None). Set `feedback.condition` to queries or patches."
        )
    pooled = views.pooled[:, None]
    if condition == "cls":
        return pooled, None
    patches, mask = views.padded_tokens()
    if mask is not None or patches.shape[-1] != pooled.shape[-1]:
        raise ValueError(
            "`condition: cls+patches` needs as many tokens of each picture, as wide as the pooled vector; this model "
            "reads pictures of different sizes, or several layers at once. Set `feedback.condition` to queries."
        )
    if num_patches is not None:
        if num_patches > patches.shape[1]:
            raise ValueError(
                f"`num_patches` is {num_patches}, but the tower gives {patches.shape[1]} tokens a picture. Set "
                f"`feedback.num_patches` to that or less."
            )
        # Without replacement: the published code draws with it and so shows some patches twice.
        order = torch.rand(patches.shape[:2], generator=generator, device=patches.device).argsort(dim=1)
        chosen = order[:, :num_patches, None].expand(-1, -1, patches.shape[-1])
        patches = patches.gather(1, chosen)
    return torch.cat([pooled, patches], dim=1), None


def dense_maps(views):
    """
    Returns the maps that `queries+dense` lets the generator look at while it runs, each place for itself, as DEEM's
    official code does: the tower's own at several scales, or else its patches as one map.

    They are off by default, and no other method has them: maps of the very picture that is to be restored give the
    answer away, so that the queries need not say it.

    Args:
        views (`ImageViews`): What the tower gave.

    Returns:
        `list[torch.Tensor]`: Maps with their positions, each `(images, dim, height, width)`.

    Raises:
        ValueError: If there are no maps and the tokens are no square grid of patches.
    """
    if views.maps:
        return positioned_maps(views.maps)
    tokens, mask = views.padded_tokens()
    side = math.isqrt(tokens.shape[1])
    # Class and register tokens come first, fewer than would make the square one larger.
    if mask is not None or not side:
        raise ValueError(
            "`condition: queries+dense` lays a picture's patches out as a square, and the pictures of this batch have "
            "different numbers of them. Set `feedback.condition` to queries."
        )
    patches = tokens[:, tokens.shape[1] - side * side :]
    return positioned_maps({"patches": patches.transpose(1, 2).unflatten(2, (side, side))})
