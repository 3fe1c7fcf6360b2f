"""What of a picture's visual tokens the denoiser is shown."""

import math
from contextlib import nullcontext

import torch
from torch.nn.utils.rnn import pad_sequence

from ..vision.grids import positioned_maps
from ..vision.views import View
from .config import ConditionConfig


def condition_of(views: list[View], config: ConditionConfig, conditioner, generator=None):
    """
    Makes the denoiser's context `(views, queries, context_dim)` of views, and the vector `(views, vector_dim)` or
    None. Without gradients all patches are shown; else `generator` draws them where a number of them is set.
    """
    num_patches = config.num_patches if torch.is_grad_enabled() else None
    tokens, mask, positions = condition_tokens(views, config.kind, num_patches, generator)
    return conditioner(tokens, mask, positions), conditioner.vector(tokens)


def condition_tokens(views: list[View], kind: str, num_patches=None, generator=None):
    """
    Chooses the tokens that the conditioner reads.

    - `queries`, `patches`: the tokens that the language model reads, to be resampled or taken one by one;
    - `queries+dense`: the same as `queries`; what is dense comes by another way, see [`dense_maps`];
    - `cls`: the tower's pooled vector alone (GenHancer, https://arxiv.org/abs/2503.19480; DCR). A tower that is asked
      for a summary only keeps its patches as they are, and there is little that the condition could leak;
    - `cls+patches`: the pooled vector and then patches (DIVA, https://arxiv.org/abs/2407.20171), `num_patches` of them
      drawn anew for each picture; all by default.

    Returns:
        `tuple`: The tokens `(views, tokens, dim)`, their mask `(views, tokens)`, None if none is padded, and their
        positions `(views, tokens, 2)`, None where a view has none.

    Raises:
        ValueError: If the tower pools nothing, or has fewer patches than asked for.
    """
    if kind in ("queries", "patches", "queries+dense"):
        tokens, mask = padded([view.tokens for view in views])
        if any(view.positions is None for view in views):
            return tokens, mask, None
        return tokens, mask, padded([view.positions for view in views])[0]
    if any(view.pooled is None for view in views):
        raise ValueError(
            f"`condition.kind: {kind}` asks for the tower's pooled vector, and it gives none (`pooler_output` is "
            f"None). Set `feedback.condition.kind` to queries or patches."
        )
    pooled = torch.stack([view.pooled for view in views])[:, None]
    if kind == "cls":
        return pooled, None, None
    patches, mask = padded([view.tokens for view in views])
    if mask is not None or patches.shape[-1] != pooled.shape[-1]:
        raise ValueError(
            "`condition.kind: cls+patches` needs as many tokens of each picture, as wide as the pooled vector; this "
            "model reads pictures of different sizes, or several layers at once. Set `feedback.condition.kind` to "
            "queries."
        )
    if num_patches is not None:
        if num_patches > patches.shape[1]:
            raise ValueError(
                f"`num_patches` is {num_patches}, but the tower gives {patches.shape[1]} tokens a picture. Set "
                f"`feedback.condition.num_patches` to that or less."
            )
        # Without replacement: the published code draws with it and so shows some patches twice.
        order = torch.rand(patches.shape[:2], generator=generator, device=patches.device).argsort(dim=1)
        chosen = order[:, :num_patches, None].expand(-1, -1, patches.shape[-1])
        patches = patches.gather(1, chosen)
    return torch.cat([pooled, patches], dim=1), None, None


def padded(rows: list[torch.Tensor]):
    """Returns rows `(length, dim)` as `(rows, longest, dim)`, and the mask `(rows, longest)` or None."""
    lengths = [len(row) for row in rows]
    if len(set(lengths)) == 1:
        return torch.stack(rows), None
    stacked = pad_sequence(rows, batch_first=True)
    places = torch.arange(stacked.shape[1], device=stacked.device)
    return stacked, places < torch.tensor(lengths, device=stacked.device)[:, None]


def attached_maps(views: list[View], config: ConditionConfig, conditioner, objective):
    """Returns a context in which the denoiser's UNet sees the maps of `views`, where the settings say so."""
    if not config.shows_maps:
        return nullcontext()
    return conditioner.attached_to(objective.denoiser.model, views)


def dense_maps(views: list[View]):
    """
    Returns the maps that `queries+dense` lets the denoiser see while it runs, each place for itself, as DEEM's
    official code does, `(views, dim, height, width)` each: the tower's own at several scales, or else its patches as
    one map.

    No other method has them: maps of the very picture that is to be restored give the answer away, so that the queries
    need not say it.

    Raises:
        ValueError: If there are no maps and the tokens are no square grid of patches.
    """
    if views[0].maps:
        return positioned_maps({name: torch.stack([view.maps[name] for view in views]) for name in views[0].maps})
    tokens, mask = padded([view.tokens for view in views])
    side = math.isqrt(tokens.shape[1])
    # Class and register tokens come first, fewer than would make the square one larger.
    if mask is not None or not side:
        raise ValueError(
            "`condition.kind: queries+dense` lays a picture's patches out as a square, and the pictures of this batch "
            "have different numbers of them. Set `feedback.condition.kind` to queries."
        )
    patches = tokens[:, tokens.shape[1] - side * side :]
    return positioned_maps({"patches": patches.transpose(1, 2).unflatten(2, (side, side))})
