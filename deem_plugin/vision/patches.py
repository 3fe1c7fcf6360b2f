"""The geometry of patches: pictures to patches and back, where tokens lie, and to which picture they belong."""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch


@dataclass(frozen=True)
class PatchOrder:
    """
    In which order the values of patches follow each other.

    Args:
        axes (`str`): Axes of a patch, from the outside in: channels `c`, time `t`, rows `y`, columns `x`.
        merge (`int`): Side of the blocks in which the patches follow each other; 1 for raster order.
    """

    axes: str = "ctyx"
    merge: int = 1


# Axes of a patch, the usual ones first.
PATCH_AXES = ("ctyx", "tcyx", "yxct")
CHANNELS_FIRST, CHANNELS_LAST = PatchOrder("cyx"), PatchOrder("yxc")


def unpack_patches(patches, grid, side, order):
    """
    Puts the patches of one picture or video together: frames `(t, T, 3, h * side, w * side)`, `T` the depth of a patch
    in time.

    Args:
        patches (`torch.Tensor`): Shape `(t * h * w, ...)`: the values of each patch.
        grid (`tuple[int, int, int]`): Steps of time, rows and columns `t`, `h`, `w`.
        side (`int`): Side of a patch, in pixels.
        order (`PatchOrder`): How the values follow each other.
    """
    t, h, w = grid
    depth = patches[0].numel() // (3 * side * side)
    axes, sizes = _axes(order, grid, side, depth)
    order_of_picture = [axes.index(axis) for axis in _PICTURE if axis in axes]
    frames = patches.reshape([sizes[axis] for axis in axes]).permute(order_of_picture)
    return frames.reshape(t, depth, 3, h * side, w * side)


def pack_patches(picture, side, order, depth=1):
    """Undoes [`unpack_patches`] for one picture `(3, height, width)`, shown `depth` times: `(h * w, 3 depth p^2)`."""
    h, w = grid_in(picture, side)
    axes, sizes = _axes(order, (1, h, w), side, depth)
    own = [axis for axis in _PICTURE if axis in axes]
    values = picture.expand(depth, *picture.shape).reshape([sizes[axis] for axis in own])
    return values.permute([own.index(axis) for axis in axes]).reshape(h * w, -1)


def join_patches(patches, grid, side, order):
    """Puts the patches of one picture `(rows * columns, ...)` together: `(3, height, width)`."""
    return unpack_patches(patches, (1, *grid), side, order)[0, 0]


# Axes of pictures in patches: steps of time, depth in time, channels; blocks, patches of a block and pixels, down and
# across.
_PICTURE = "TtcHiyWjx"


def _axes(order, grid, side, depth):
    """Returns the axes of packed patches, from the outside in, and the size of each."""
    t, h, w = grid
    m = order.merge
    sizes = {"T": t, "H": h // m, "W": w // m, "i": m, "j": m, "c": 3, "t": depth, "y": side, "x": side}
    return "THWij" + order.axes, sizes


def grid_in(picture, side) -> tuple[int, int]:
    """Returns rows and columns of a picture `(3, height, width)` in cells of `side` pixels."""
    return picture.shape[1] // side, picture.shape[2] // side


def grid_positions(rows, columns, device=None, merge=1):
    """Returns the centres of a grid's cells, row and column as fractions, by blocks of `merge`: `(cells, 2)`."""
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
    return places.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).flatten(0, 3)


def token_positions(count, size, device=None, merge=1):
    """
    Returns the positions of `count` tokens of a picture of `size` (height, width), as [`grid_positions`]; None if they
    make no grid of its proportions. `size` is in patches where these follow each other in blocks of `merge`.
    """
    height, width = size
    rows = round(math.sqrt(count * height / width)) if width else 0
    columns = count // rows if rows else 0
    if not count or rows * columns != count:
        return None
    return grid_positions(rows, columns, device, merge if count == height * width else 1)


def deal_out(tokens, shares, what):
    """
    Splits tokens `(..., dim)` of all pictures in one row among them, in proportion to their shares (such as numbers of
    patches); `what` tells in the error where these come from.

    Raises:
        ValueError: If no whole numbers of tokens are in proportion.
    """
    tokens = tokens.flatten(0, -2)
    ratio = sum(shares) / max(len(tokens), 1)
    ends = [round(total / ratio) for total in accumulate(shares)] if ratio else [0] * len(shares)
    lengths = [end - start for start, end in pairwise([0, *ends])]
    exact = all(math.isclose(share, length * ratio) for share, length in zip(shares, lengths, strict=True))
    if sum(lengths) != len(tokens) or not exact:
        raise ValueError(
            f"There are {len(tokens)} tokens for {sum(shares)} patches ({what}); the feedback expects the same number "
            f"of patches for each token."
        )
    return tokens.split(lengths)
