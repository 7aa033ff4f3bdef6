"""Augmentation of whole batches at once. Each function draws one random choice per picture from `generator`."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def flip_and_shift(crops: Tensor, flip: bool, padding: int, generator: Generator) -> Tensor:
    """Mirrors half of the pictures and shifts each by up to `padding` px both ways, as one gather.

    The same as a padded random crop with mirrored edges (the edge pixel itself is not repeated).

    Args:
        crops: uint8 (N, S, S, 3).
        padding: px, 0 for no shift, below S.

    Returns:
        uint8 (N, S, S, 3).
    """
    if not flip and not padding:
        return crops
    count, size = crops.shape[:2]
    steps = torch.arange(size, device=crops.device)
    columns = steps.expand(count, size)
    rows = columns
    if flip:
        mirrored = _random(count, generator, crops) < 0.5
        columns = torch.where(mirrored[:, None], size - 1 - columns, columns)
    if padding:
        rows = _mirror(rows + _shifts(count, padding, generator, crops), size)
        columns = _mirror(columns + _shifts(count, padding, generator, crops), size)
    pictures = torch.arange(count, device=crops.device)
    return crops[pictures[:, None, None], rows[:, :, None], columns[:, None, :]]


def jitter(crops: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness, contrast and saturation of each picture, each by a factor from 1 - strength to 1 + strength.

    Args:
        crops: uint8 (N, S, S, 3).

    Returns:
        uint8 (N, S, S, 3).
    """
    if not strength:
        return crops
    pixels = crops.float()
    luma = torch.tensor([0.299, 0.587, 0.114], device=crops.device)  # ITU-R BT.601, as Pillow's "L"
    for kind in ("brightness", "contrast", "saturation"):
        grey = (pixels * luma).sum(dim=3, keepdim=True)  # (N, S, S, 1)
        if kind == "brightness":
            anchor = torch.zeros_like(grey)
        else:
            anchor = grey.mean(dim=(1, 2), keepdim=True) if kind == "contrast" else grey
        factor = 1 + strength * (2 * _random(len(crops), generator, crops) - 1)
        pixels = (anchor + (pixels - anchor) * factor[:, None, None, None]).clamp(0, 255)
    return pixels.round().to(torch.uint8)


def _random(count: int, generator: Generator, like: Tensor) -> Tensor:
    """Uniform in 0..1, drawn on the CPU so that a seed gives the same pictures on every device."""
    return torch.rand(count, generator=generator).to(like.device)


def _shifts(count: int, padding: int, generator: Generator, like: Tensor) -> Tensor:
    return torch.randint(-padding, padding + 1, (count, 1), generator=generator).to(like.device)


def _mirror(places: Tensor, size: int) -> Tensor:
    """Places outside 0..size-1 reflected back into it."""
    return size - 1 - (size - 1 - places.abs()).abs()
