"""Plans are made of the same tiny parts that recipes are trained with."""

from ..training.conftest import parts

__all__ = ["parts"]
