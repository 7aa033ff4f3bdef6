"""The pixels that an architecture was made for."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preset:
    """What an architecture's published weights want to see.

    size, resize: px, as in the spec.
    mean, std: RGB, for pixels in 0..1.
    interpolation: "bilinear", "bicubic" or "lanczos".
    fit: how an image becomes a square: "crop", "squash" or "pad".
    """

    size: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    fit: str = "crop"
