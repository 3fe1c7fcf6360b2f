"""Regions of a picture, given as a mask, a box or points, as one boolean mask."""

import numpy as np

POINT_RADIUS = 4  # pixels


def region_mask(region, width: int, height: int) -> np.ndarray:
    """
    Makes the mask of a region.

    Args:
        region:
            A mask `(height, width)`, nonzero inside; a box of four numbers `(left, top, right, bottom)`, right and
            bottom exclusive; or a list of points `[(x, y), ...]`, each a disc of 4 pixels' radius. All in pixels.
        width, height (`int`): Of the picture, in pixels.

    Returns:
        `np.ndarray`: Boolean, shape `(height, width)`.

    Raises:
        ValueError: If it is none of these, has another size than the picture, or no pixel lies inside the picture.
    """
    array = np.asarray(region)
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
