"""TrivialAugment (Müller & Hutter 2021, in its wide range): one operation of random strength for each image.

The operations, their ranges and their 31 strengths are those of torchvision's TrivialAugmentWide. Images of the same
operation are worked on together, each at its own strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from training.augmentation import Draws, blend, luma

STRENGTHS = 31  # evenly from none to the full range
SHEAR, SHIFT, TURN, BLEND = 0.99, 32, 135, 0.99  # the ranges: px per px, px, degrees, share
POSTERIZED = 6  # of 8 bits, at the most

CPU = torch.device("cpu")


def trivial_augment(crops: Tensor, draws: Draws) -> Tensor:
    """Each image after one operation, with black where it has no pixels.

    Args:
        crops: uint8 (N, H, W, 3).

    Returns:
        uint8 (N, H, W, 3).
    """
    chosen = draws.integers(0, len(OPERATIONS) - 1, CPU)[:, 0]
    levels = draws.integers(0, STRENGTHS - 1, CPU)[:, 0] / (STRENGTHS - 1)
    levels = levels * (2 * draws.integers(0, 1, CPU)[:, 0] - 1)
    changed = crops.clone()
    for i, operation in enumerate(OPERATIONS.values()):
        rows = (chosen == i).nonzero().flatten()  # known on the CPU: no waiting for the device
        if len(rows):
            there = rows.to(crops.device)
            changed[there] = operation(crops[there], levels[rows].to(crops.device))
    return changed


def _shear_x(crops: Tensor, levels: Tensor) -> Tensor:
    x, y = _centres(crops)
    return _gather(crops, x + SHEAR * levels[:, None, None] * y, y)


def _shear_y(crops: Tensor, levels: Tensor) -> Tensor:
    x, y = _centres(crops)
    return _gather(crops, x, y + SHEAR * levels[:, None, None] * x)


def _translate_x(crops: Tensor, levels: Tensor) -> Tensor:
    x, y = _centres(crops)
    return _gather(crops, x - (SHIFT * levels).trunc()[:, None, None], y)


def _translate_y(crops: Tensor, levels: Tensor) -> Tensor:
    x, y = _centres(crops)
    return _gather(crops, x, y - (SHIFT * levels).trunc()[:, None, None])


def _rotate(crops: Tensor, levels: Tensor) -> Tensor:
    (x, y), (height, width) = _centres(crops), crops.shape[1:3]
    angles = math.radians(TURN) * levels[:, None, None]
    x, y = x - width / 2, y - height / 2
    across, down = angles.cos() * x - angles.sin() * y, angles.sin() * x + angles.cos() * y
    return _gather(crops, across + width / 2, down + height / 2)


def _brightness(crops: Tensor, levels: Tensor) -> Tensor:
    pixels = crops.float()
    return _blended(torch.zeros_like(pixels), pixels, levels)


def _colour(crops: Tensor, levels: Tensor) -> Tensor:
    pixels = crops.float()
    return _blended(luma(pixels), pixels, levels)


def _contrast(crops: Tensor, levels: Tensor) -> Tensor:
    pixels = crops.float()
    return _blended(luma(pixels).mean(dim=(1, 2), keepdim=True), pixels, levels)


def _sharpness(crops: Tensor, levels: Tensor) -> Tensor:
    """Away from, or towards, a mean of 3×3 px in which the middle one counts five times, as Pillow's SMOOTH."""
    pixels = crops.float()
    means = avg_pool2d(pixels.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False)
    return _blended((9 * means.permute(0, 2, 3, 1) + 4 * pixels) / 13, pixels, levels)


def _posterize(crops: Tensor, levels: Tensor) -> Tensor:
    dropped = (POSTERIZED * levels.abs()).round().to(torch.uint8)[:, None, None, None]
    return crops >> dropped << dropped


def _solarize(crops: Tensor, levels: Tensor) -> Tensor:
    return torch.where(crops >= 255 * (1 - levels.abs())[:, None, None, None], 255 - crops, crops)


def _autocontrast(crops: Tensor, levels: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import autocontrast  # late, as in model.registry

    return autocontrast(crops.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _equalize(crops: Tensor, levels: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize(crops.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# Each takes m images, uint8 (m, H, W, 3), and their levels, float32 (m,) in -1..1; where an operation has only one
# direction, the level's sign does not matter.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda crops, levels: crops,
    "shear x": _shear_x,
    "shear y": _shear_y,
    "translate x": _translate_x,
    "translate y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}


def _blended(anchor: Tensor, pixels: Tensor, levels: Tensor) -> Tensor:
    return blend(anchor, pixels, 1 + BLEND * levels).round().to(torch.uint8)


def _centres(crops: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pixels' centres are: x, float32 (1, 1, W), and y, (1, H, 1), px from the top left corner."""
    height, width = (torch.arange(n, device=crops.device) + 0.5 for n in crops.shape[1:3])
    return width[None, None, :], height[None, :, None]


def _gather(crops: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of each image the pixels at these positions, (m, H, W) each or what broadcasts to it; black outside of it."""
    height, width = crops.shape[1:3]
    columns, rows = torch.broadcast_tensors(x.floor().long(), y.floor().long())
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    images = torch.arange(len(crops), device=crops.device)[:, None, None]
    found = crops[images, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return found * inside[..., None]
