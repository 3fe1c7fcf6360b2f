"""Tiny models of the vision-language families in transformers, with random weights and their real image processors."""

from .grids import GRIDS
from .packed import PACKED
from .popular import POPULAR
from .vocabulary import Case, make, picture

__all__ = ["FAMILIES", "POPULAR", "Case", "build", "picture"]

FAMILIES = {**POPULAR, **PACKED, **GRIDS}


def build(name: str) -> Case:
    """Makes the tiny model of a family and its batch."""
    return make(FAMILIES[name])
