"""Preprocessing as tensor code, so that it is exported inside the graph.

`Resize` is Pillow's antialiased resize written as two matrix products, bit for bit: no runtime's own Resize is asked
(OpenVINO and OpenCV ignore its antialias flag, TensorRT rejects it). The method is that of Pillow's Resample.c:
horizontal, then vertical, with weights of 22 fractional bits and rounding to whole grey levels after each pass.

A triangle's weights (bilinear) are quotients of whole numbers. Each is split into two integers of 11 bits, so that
every product is a whole number below 2^24 and float32 holds it exactly, on any device (TF32 too: it keeps 11 bits).
The weights of the other filters come out of a formula that Pillow evaluates in double precision; so does the graph,
operation by operation, and sums the pixels in it, which is exact in any order. Lanczos calls a sine, whose last bit
each library chooses: after rounding to 22 bits few values differ, by one grey level (docs/onnx.md).
"""

import math

import torch
from torch import Tensor, nn

from predictor.spec import PixelRule


class Resize(nn.Module):
    """The pixel rule of the spec, equal to `predictor.pillow_preprocessing.crop`, which uses Pillow.

    Scriptable, and exportable with dynamic N, H and W.
    """

    def __init__(self, rule: PixelRule) -> None:
        super().__init__()
        self.height, self.width, self.resize = rule.height, rule.width, rule.resize
        self.interpolation, self.fit, self.fill = rule.interpolation, rule.fit, list(rule.fill)
        least = min(rule.height, rule.width)
        # In lowest terms, where float32 holds them too: a runtime may have nothing wider.
        self.share = _in_lowest_terms(least, rule.resize)
        self.height_share = _in_lowest_terms(rule.height * least, rule.width * rule.resize)  # of the image's width
        self.width_share = _in_lowest_terms(rule.width * least, rule.height * rule.resize)  # of the image's height

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3), RGB, any H and W, to uint8 (N, height, width, 3)."""
        if self.interpolation == "bilinear" and self.fit != "pad":
            return self._in_single(images)
        return self._in_double(images)

    def _in_single(self, images: Tensor) -> Tensor:
        height = torch.full([], images.shape[1], dtype=torch.float32, device=images.device)
        width = torch.full([], images.shape[2], dtype=torch.float32, device=images.device)
        if self.fit != "crop":
            box_height, box_width = height, width
        elif self.height == self.width:
            side = torch.minimum(height, width) * (2 * self.height) + self.resize
            box_height = torch.floor(side / (2 * self.resize)).clamp(min=1.0)
            box_width = box_height
        else:
            box_height, box_width = self._box(height.double(), width.double())
            box_height, box_width = box_height.float(), box_width.float()
        rows = torch.arange(images.shape[1], dtype=torch.float32, device=images.device)
        columns = torch.arange(images.shape[2], dtype=torch.float32, device=images.device)
        across = _halves(columns - torch.floor((width - box_width) / 2), box_width, self.width)
        down = _halves(rows - torch.floor((height - box_height) / 2), box_height, self.height)
        pixels = images.permute(0, 3, 1, 2).float()  # (N, 3, H, W)
        pixels = _to_levels(pixels @ across[0].T, pixels @ across[1].T)  # (N, 3, H, width)
        pixels = _to_levels(down[0] @ pixels, down[1] @ pixels)  # (N, 3, height, width)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)

    def _in_double(self, images: Tensor) -> Tensor:
        height = torch.full([], images.shape[1], dtype=torch.float64, device=images.device)
        width = torch.full([], images.shape[2], dtype=torch.float64, device=images.device)
        box_height, box_width = self._box(height, width)
        inner_height, inner_width = self._inner(height, width)
        rows = torch.arange(images.shape[1], dtype=torch.float64, device=images.device)
        columns = torch.arange(images.shape[2], dtype=torch.float64, device=images.device)
        across = _weights(
            columns - torch.floor((width - box_width) / 2), box_width, self.width, inner_width, self.interpolation
        )
        down = _weights(
            rows - torch.floor((height - box_height) / 2), box_height, self.height, inner_height, self.interpolation
        )
        pixels = images.permute(0, 3, 1, 2).double()  # (N, 3, H, W)
        pixels = _clipped(pixels @ across.T)  # (N, 3, H, width)
        pixels = _clipped(down @ pixels)  # (N, 3, height, width)
        if self.fit == "pad":
            inside = _inside(self.height, inner_height).view(-1, 1) * _inside(self.width, inner_width)
            fill = torch.tensor(self.fill, dtype=torch.float64, device=images.device).view(3, 1, 1)
            pixels = pixels * inside + fill * (1.0 - inside)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)

    def _box(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width of `predictor.pillow_preprocessing.crop_box`, float64 as are those of the image."""
        if self.fit != "crop":
            return height, width
        is_narrow = width * self.height <= height * self.width
        down = torch.where(is_narrow, _scaled(width, self.height_share), _scaled(height, self.share))
        across = torch.where(is_narrow, _scaled(width, self.share), _scaled(height, self.width_share))
        return down, across

    def _inner(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Height and width of `predictor.pillow_preprocessing.pad_box`, float64 as are those of the image."""
        down, across = torch.full_like(height, self.height), torch.full_like(width, self.width)
        if self.fit == "pad":
            is_wide = width * self.height >= height * self.width
            scaled_height = torch.floor((height * (2 * self.width) + width) / (2 * width)).clamp(min=1.0)
            scaled_width = torch.floor((width * (2 * self.height) + height) / (2 * height)).clamp(min=1.0)
            down, across = torch.where(is_wide, scaled_height, down), torch.where(is_wide, across, scaled_width)
        return down, across


def normalise(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W): `(pixels / 255 - mean) / std`, with mean and std of shape (3,)."""
    scale = 1 / (255 * std)
    return crops.permute(0, 3, 1, 2).float() * scale.view(3, 1, 1) - (mean / std).view(3, 1, 1)


def _in_lowest_terms(numerator: int, denominator: int) -> tuple[int, int]:
    common = math.gcd(numerator, denominator)
    return numerator // common, denominator // common


def _scaled(length: Tensor, share: tuple[int, int]) -> Tensor:
    """A share of a length, rounded half up, and at least 1."""
    return torch.floor((length * (2 * share[0]) + share[1]) / (2 * share[1])).clamp(min=1.0)


# In single precision: the triangle


def _halves(taps: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Triangle filter of one axis. taps: (n,) positions in the box, px; those outside 0..side-1 get no weight.

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


# In double precision: every filter


def _weights(taps: Tensor, side: Tensor, size: int, inner: Tensor, interpolation: str) -> Tensor:
    """A filter of one axis, float64.

    Args:
        taps: (n,) positions in the box, px; those outside 0..side-1 get no weight.
        side: of the box, px.
        size: of the result, px.
        inner: of the scaled box in the middle of it; rows outside are 0.

    Returns:
        (size, n), whole numbers: weight times 2^22.
    """
    scale = side / inner
    centres = (_outputs(size, inner) + 0.5) * scale
    offsets = (taps - centres.view(size, 1) + 0.5) * (1.0 / scale.clamp(min=1.0))
    values = _kernel(offsets.abs(), interpolation) * (taps >= 0).double() * (taps < side).double()
    values = values * _inside(size, inner).view(size, 1)
    total = values.sum(dim=1, keepdim=True)
    weights = values / (total + (total == 0).double())
    return torch.sign(weights) * torch.floor(weights.abs() * 4194304.0 + 0.5)


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    """The filter at distances x >= 0, in Pillow's order of operations."""
    if interpolation == "bilinear":
        return (1.0 - x).clamp(min=0.0)
    if interpolation == "bicubic":
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        return near * (x < 1.0).double() + far * (x >= 1.0).double() * (x < 2.0).double()
    return _sinc(x) * _sinc(x / 3.0) * (x < 3.0).double()


def _sinc(x: Tensor) -> Tensor:
    is_zero = (x == 0.0).double()
    turned = x * 3.141592653589793 + is_zero  # sin(1) / 1 there, which is not used
    return torch.sin(turned) / turned * (1.0 - is_zero) + is_zero


def _clipped(sums: Tensor) -> Tensor:
    """Sums of pixels times weights of 22 bits, rounded half up to grey levels, within 0..255."""
    return torch.floor((sums + 2097152.0) / 4194304.0).clamp(min=0.0, max=255.0)


def _outputs(size: int, inner: Tensor) -> Tensor:
    """Indices of the result counted from the scaled box in its middle, float64 (size,)."""
    return torch.arange(size, dtype=torch.float64, device=inner.device) - torch.floor((size - inner) / 2)


def _inside(size: int, inner: Tensor) -> Tensor:
    """1 for the indices in the scaled box, 0 for those that are filled, float64 (size,)."""
    outputs = _outputs(size, inner)
    return (outputs >= 0).double() * (outputs < inner).double()
