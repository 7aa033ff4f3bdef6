"""Preprocessing as tensor code, so that it is exported inside the graph.

`resize_crop` is Pillow's antialiased bilinear resize written as two matrix products, bit for bit: no runtime's own
Resize is asked (OpenVINO and OpenCV ignore its antialias flag, TensorRT rejects it). The method is that of Pillow's
Resample.c: horizontal, then vertical, with weights of 22 fractional bits and rounding to whole grey levels after each
pass. Here each weight is split into two integers of 11 bits, so that every product and sum is a whole number below
2^24 and float32 holds it exactly, on any device and in any order of summation (TF32 too: it keeps 11 bits).
"""

import torch
from torch import Tensor


def resize_crop(images: Tensor, size: int, resize: int) -> Tensor:
    """The centred square of `round(min(H, W) * size / resize)` px, resized to `size`×`size`.

    Equal to `predictor.pillow_preprocessing.crop`, which uses Pillow. Scriptable, and exportable with dynamic N, H
    and W.

    Args:
        images: uint8 (N, H, W, 3), RGB.
        size: side of the result, px.
        resize: the short edge's length at the scale of the result, px; at least `size`.

    Returns:
        uint8 (N, size, size, 3).
    """
    height = torch.full([], images.shape[1], dtype=torch.float32, device=images.device)
    width = torch.full([], images.shape[2], dtype=torch.float32, device=images.device)
    side = torch.floor((torch.minimum(height, width) * (2 * size) + resize) / (2 * resize)).clamp(min=1.0)
    rows = torch.arange(images.shape[1], dtype=torch.float32, device=images.device)
    columns = torch.arange(images.shape[2], dtype=torch.float32, device=images.device)
    across = _weights(columns - torch.floor((width - side) / 2), side, size)
    down = _weights(rows - torch.floor((height - side) / 2), side, size)
    pixels = images.permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    pixels = _to_levels(pixels @ across[0].T, pixels @ across[1].T)  # (N, 3, H, size)
    pixels = _to_levels(down[0] @ pixels, down[1] @ pixels)  # (N, 3, size, size)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8)


def normalise(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, S, S, 3) to float32 (N, 3, S, S): `(pixels / 255 - mean) / std`, with mean and std of shape (3,)."""
    scale = 1 / (255 * std)
    return crops.permute(0, 3, 1, 2).float() * scale.view(3, 1, 1) - (mean / std).view(3, 1, 1)


def _weights(taps: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Triangle filter of one axis. taps: (n,) positions in the square, px; those outside 0..side-1 get no weight.

    Returns:
        The high and the low 11 bits of each weight, both (size, n), whole numbers: weight = (high + low / 2^11) / 2^11.
    """
    # 2048 is 2^11, half of Pillow's 22 bits; a literal, since TorchScript closes over no constants.
    outputs = torch.arange(size, dtype=torch.float32, device=taps.device).view(size, 1)
    distance = ((2 * taps + 1) * size - (2 * outputs + 1) * side).abs()  # in units of 1 / (2 * size) px
    triangle = (2 * side.clamp(min=float(size)) - distance).clamp(min=0.0)
    triangle = triangle * (taps >= 0).float() * (taps < side).float()
    total = triangle.sum(dim=1, keepdim=True)
    high = torch.floor(triangle * 2048 / total)
    low = torch.floor((triangle * 2048 - high * total) * 2048 / total + 0.5)
    return high, low


def _to_levels(high: Tensor, low: Tensor) -> Tensor:
    """Sums of weighted pixels, from the high and the low bits, rounded half up to grey levels 0..255."""
    return torch.floor((high + torch.floor(low / 2048) + 1024) / 2048)
