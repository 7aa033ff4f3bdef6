"""Sizes of images as --size and --train-size take them: `192` for a square, `160x224` for height and width."""

from __future__ import annotations

import re
from typing import NamedTuple


class ImageSize(NamedTuple):
    """Height and width, px; as text, what --size takes."""

    height: int
    width: int

    @property
    def typed(self) -> int | str:
        """As options have it, and YAML: a number for a square."""
        return self.height if self.height == self.width else f"{self.height}x{self.width}"

    def __str__(self) -> str:
        return str(self.typed)


def as_size(typed: int | str, flag: str = "--size") -> ImageSize:
    """
    Args:
        flag: what the error message calls it.

    Raises:
        ValueError: it is neither N nor HEIGHTxWIDTH.
    """
    found = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", str(typed))
    if not found:
        raise ValueError(f"{flag} {typed}: must be N, or HEIGHTxWIDTH such as 160x224, px")
    return ImageSize(int(found[1]), int(found[2] or found[1]))
