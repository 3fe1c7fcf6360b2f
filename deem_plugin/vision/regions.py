"""Regions of a picture, given as a box, points or a mask, as one boolean mask; and the square that shows one."""

import numpy as np

POINT_RADIUS = 4  # pixels


def region_mask(region, width: int, height: int) -> np.ndarray:
    """
    Makes the mask of a region.

    Args:
        region:
            A mask `(height, width)`, nonzero inside; a compressed run-length encoding `{"size", "counts"}` of COCO; a
            box of four numbers `(left, top, right, bottom)`, right and bottom exclusive; or a list of points
            `[(x, y), ...]`, each a disc of 4 pixels' radius. All in pixels.
        width, height (`int`): Of the picture, in pixels.

    Returns:
        `np.ndarray`: Boolean, shape `(height, width)`.

    Raises:
        ValueError: If it is none of these, has another size than the picture, or no pixel lies inside the picture.
    """
    array = _decode(region) if isinstance(region, dict) else np.asarray(region)
    if array.shape == (height, width):
        inside = array != 0
    elif array.shape == (4,):
        left, top, right, bottom = array
        rows, columns = np.mgrid[:height, :width]
        inside = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
    elif array.ndim == 2 and array.shape[1] == 2:
        rows, columns = np.mgrid[:height, :width]
        distances = (columns[..., None] - array[:, 0]) ** 2 + (rows[..., None] - array[:, 1]) ** 2
        inside = (distances <= POINT_RADIUS**2).any(-1)
    else:
        raise ValueError(
            f"A region of shape {array.shape} is none: expected a mask of the picture's size ({height}, {width}), a "
            f"box (left, top, right, bottom), or points [(x, y), ...]."
        )
    if not inside.any():
        raise ValueError(
            f"The region {np.array2string(array, threshold=8)} covers no pixel of a picture of {width} x {height}. "
            f"Leave the sample out, or correct its coordinates."
        )
    return inside


def _decode(encoding: dict) -> np.ndarray:
    from pycocotools import mask

    return mask.decode(encoding)


def square_around(mask: np.ndarray) -> tuple[int, int, int, int]:
    """
    Finds the square of a picture's shorter side that shows a region, of all such the nearest to the middle.

    Args:
        mask (`np.ndarray`): Boolean, shape `(height, width)`, with a pixel inside.

    Returns:
        `tuple[int, int, int, int]`: Left, top, right, bottom in pixels, right and bottom exclusive. A region that is
        longer than the square is cut off on both sides alike.
    """
    side = min(mask.shape)
    top, left = (_place(mask.any(axis), side) for axis in (1, 0))
    return left, top, left + side, top + side


def _place(inside: np.ndarray, side: int) -> int:
    """Returns where a stretch of `side` pixels begins that covers what is `inside`, near the middle."""
    first, last = np.flatnonzero(inside)[[0, -1]].tolist()
    if last + 1 - first > side:
        return (first + last + 1 - side) // 2
    return min(max((len(inside) - side) // 2, last + 1 - side), first)
