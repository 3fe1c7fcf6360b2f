"""A document: texts, pictures and regions of pictures in reading order, what the interleaved model learns from."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Region:
    """
    A picture of which one region is meant.

    Args:
        image (`PIL.Image.Image`): The whole picture.
        mask (`np.ndarray`): True inside the region; boolean, shape `(height, width)` of the picture.
    """

    image: Image.Image
    mask: np.ndarray


@dataclass
class Document:
    """
    Texts, pictures and regions in reading order.

    Args:
        parts (`list[str | PIL.Image.Image | Region]`): What stands in the document. Texts are joined as they are.
        learn_from (`int`): Index of the first part that is a training target. The parts before it are the prompt.
        name (`str`): What the document is called in an error, such as its file and number.

    Raises:
        ValueError: If it is empty, a part is none of the three or an empty text, a mask is not boolean, has not its
            picture's size or covers no pixel, or `learn_from` leaves nothing to learn.
    """

    parts: list[str | Image.Image | Region]
    learn_from: int = 0
    name: str = "a document"

    def __post_init__(self):
        if not self.parts:
            raise ValueError(f"{self.name} has no parts; expected texts, pictures or regions. Leave it out.")
        for index, part in enumerate(self.parts):
            self._check_part(part, f"Part {index} of {self.name}")
        if not 0 <= self.learn_from < len(self.parts):
            raise ValueError(
                f"`learn_from` of {self.name} is {self.learn_from}, but it has {len(self.parts)} part(s); expected 0 "
                f"to {len(self.parts) - 1}, so that something is left to learn."
            )

    @property
    def images(self) -> list[Image.Image]:
        """The pictures in reading order, those of regions among them."""
        return [part.image if isinstance(part, Region) else part for part in self.parts if not isinstance(part, str)]

    @property
    def masks(self) -> list[np.ndarray | None]:
        """For each of `images` the mask of its region, or `None` where the whole picture is meant."""
        return [getattr(part, "mask", None) for part in self.parts if not isinstance(part, str)]

    def columns(self) -> dict[str, Any]:
        """Returns the document in the columns of `load_documents`, as `DocumentCollator` takes it."""
        parts = []
        for part in self.parts:
            columns = dict.fromkeys(("text", "image", "box", "points", "mask"))
            if isinstance(part, str):
                columns["text"] = part
            elif isinstance(part, Region):
                columns |= {"image": part.image, "mask": Image.fromarray(part.mask)}
            else:
                columns["image"] = part
            parts.append(columns)
        return {"parts": parts, "learn_from": self.learn_from}

    @staticmethod
    def _check_part(part, where: str):
        """Raises a `ValueError` unless `part` is a text, a picture, or a region with pixels."""
        if isinstance(part, str):
            if not part:
                raise ValueError(f"{where} is an empty text. Leave it out.")
            return
        if isinstance(part, Image.Image):
            return
        if not isinstance(part, Region):
            raise ValueError(f"{where} is a {type(part).__name__}; expected a text, a PIL picture or a `Region`.")
        if not isinstance(part.image, Image.Image):
            raise ValueError(f"{where} is a region of a {type(part.image).__name__}; expected one of a PIL picture.")
        width, height = part.image.size
        mask = part.mask
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (height, width):
            given = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise ValueError(
                f"{where} has a mask that is {given}; expected a boolean NumPy array of shape {(height, width)}, the "
                f"picture's height and width. `deem_plugin.vision.regions.region_mask` makes one."
            )
        if not mask.any():
            raise ValueError(f"{where} has an empty mask: no pixel of the picture is meant. Leave the sample out.")
