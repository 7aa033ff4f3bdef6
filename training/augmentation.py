"""Augmentation of whole batches at once. Each function takes one random choice per image from `draws`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample

ATTEMPTS = 10  # at a box that lies within its image, as torchvision's RandomResizedCrop
ERASED, ERASED_RATIO = (0.02, 0.33), (1 / 3, 3.0)  # shares of an image's area, and aspect ratios


@dataclass(frozen=True)
class Draws:
    """Random numbers for a whole batch, of which only some rows are worked on here.

    They are drawn for the batch and then chosen, so an image is augmented the same way whether one process works on
    the batch or several do; and on the CPU, so a seed gives the same images on every device.

    rows: int64 (n,), indices in the batch of the images at hand.
    """

    generator: Generator
    batch: int
    rows: Tensor

    def uniform(self, device: torch.device) -> Tensor:
        """float32 (n,), in 0..1."""
        return torch.rand(self.batch, generator=self.generator)[self.rows].to(device)

    def table(self, columns: int) -> Tensor:
        """float32 (n, columns), in 0..1, on the CPU."""
        return torch.rand(self.batch, columns, generator=self.generator)[self.rows]

    def noise(self, height: int, width: int) -> Tensor:
        """uint8 (height, width, 3), on the CPU: one image of noise for the whole batch."""
        return torch.randint(256, (height, width, 3), generator=self.generator, dtype=torch.uint8)

    def integers(self, low: int, high: int, device: torch.device) -> Tensor:
        """int64 (n, 1), from `low` up to and with `high`."""
        return torch.randint(low, high + 1, (self.batch, 1), generator=self.generator)[self.rows].to(device)


def flip_and_shift(crops: Tensor, flip: bool, padding: int, draws: Draws) -> Tensor:
    """Mirrors half of the images and shifts each by up to `padding` px both ways, as one gather if there are shifts.

    The same as a padded random crop with mirrored edges (the edge pixel itself is not repeated).

    Args:
        crops: uint8 (N, H, W, 3).
        padding: px, 0 for no shift, below H and W.

    Returns:
        uint8 (N, H, W, 3).
    """
    if not flip and not padding:
        return crops
    count, height, width = crops.shape[:3]
    mirrored = draws.uniform(crops.device) < 0.5 if flip else torch.zeros(count, dtype=torch.bool, device=crops.device)
    if not padding:
        return torch.where(mirrored[:, None, None, None], crops.flip(2), crops)  # a tenth of a gather's time
    rows, columns = (torch.arange(side, device=crops.device).expand(count, side) for side in (height, width))
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    rows = _mirror(rows + draws.integers(-padding, padding, crops.device), height)
    columns = _mirror(columns + draws.integers(-padding, padding, crops.device), width)
    images = torch.arange(count, device=crops.device)
    return crops[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_boxes(shapes: Tensor, scale: float, ratio: tuple[float, float], draws: Draws) -> Tensor:
    """The boxes of the random resized crop (Szegedy et al. 2015), as torchvision's RandomResizedCrop draws them.

    Of ATTEMPTS boxes the first that lies within its image counts; where none does, the largest centred box whose aspect
    ratio is in range. Positions and sides are not rounded to whole pixels.

    Args:
        shapes: int (n, 2), height and width of each image, px.
        scale: the smallest share of an image's area; shares are uniform from there to 1.
        ratio: the smallest and largest aspect ratio, width / height in px, such as (3 / 4, 4 / 3); log-uniform.

    Returns:
        float32 (n, 4): left, top, right, bottom, as shares 0..1 of the image's width and height; on the CPU.
    """
    return _boxes(shapes, (scale, 1.0), ratio, draws)


def _boxes(shapes: Tensor, share: tuple[float, float], ratio: tuple[float, float], draws: Draws) -> Tensor:
    """As `random_boxes`, of a share of the area between two bounds."""
    areas, aspects, places = draws.table(ATTEMPTS), draws.table(ATTEMPTS), draws.table(2)
    areas = share[0] + (share[1] - share[0]) * areas
    low, high = (math.log(aspect) for aspect in ratio)
    height, width = shapes.cpu().double().T
    relative = torch.exp(low + (high - low) * aspects) * (height / width)[:, None]  # of the box to its image
    sides = torch.stack([areas * relative, areas / relative], dim=2).sqrt()  # (n, ATTEMPTS, 2): width, height
    fits = (sides <= 1).all(dim=2)
    first = sides[torch.arange(len(sides)), fits.int().argmax(dim=1)]  # (n, 2)
    aspect = (width / height).clamp(*ratio) * height / width
    centred = torch.stack([aspect.clamp(max=1), (1 / aspect).clamp(max=1)], dim=1)
    found = fits.any(dim=1, keepdim=True)
    chosen = torch.where(found, first, centred)
    corner = torch.where(found, places, 0.5) * (1 - chosen)
    return torch.cat([corner, corner + chosen], dim=1).clamp(0, 1).float()


def jitter(crops: Tensor, strength: float, draws: Draws) -> Tensor:
    """Brightness, contrast and saturation of each image, each by a factor from 1 - strength to 1 + strength.

    Args:
        crops: uint8 (N, H, W, 3).

    Returns:
        uint8 (N, H, W, 3).
    """
    if not strength:
        return crops
    pixels = crops.float()
    for kind in ("brightness", "contrast", "saturation"):
        grey = luma(pixels)
        if kind == "brightness":
            anchor = torch.zeros_like(grey)
        else:
            anchor = grey.mean(dim=(1, 2), keepdim=True) if kind == "contrast" else grey
        factor = 1 + strength * (2 * draws.uniform(crops.device) - 1)
        pixels = blend(anchor, pixels, factor)
    return pixels.round().to(torch.uint8)


def luma(pixels: Tensor) -> Tensor:
    """float32 (N, H, W, 1) of RGB (N, H, W, 3): ITU-R BT.601, as Pillow's "L"."""
    return (pixels * torch.tensor([0.299, 0.587, 0.114], device=pixels.device)).sum(dim=3, keepdim=True)


def blend(anchor: Tensor, pixels: Tensor, factors: Tensor) -> Tensor:
    """Pixels moved away from the anchor, or towards it, by each image's factor; within 0..255.

    Args:
        anchor: float32, as `pixels` or what broadcasts to it; pixels: float32 (N, H, W, 3); factors: float32 (N,).
    """
    return (anchor + (pixels - anchor) * factors[:, None, None, None]).clamp(0, 255)


def rotate(crops: Tensor, degrees: float, draws: Draws) -> Tensor:
    """Turns each image about its centre by up to `degrees` both ways, bilinearly, with mirrored edges.

    Args:
        crops: uint8 (N, H, W, 3).

    Returns:
        uint8 (N, H, W, 3).
    """
    if not degrees:
        return crops
    return turn(crops, degrees * (2 * draws.uniform(crops.device) - 1))


def turn(crops: Tensor, degrees: Tensor) -> Tensor:
    """Each image, uint8 (N, H, W, 3), turned counter-clockwise by its own angle, float32 (N,)."""
    count, height, width = crops.shape[:3]
    angles = degrees.deg2rad()
    cos, sin, none = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = [cos, -sin * height / width, none], [sin * width / height, cos, none]  # the grid's axes are each -1..1
    matrices = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (N, 2, 3)
    grid = affine_grid(matrices, [count, 3, height, width], align_corners=False)
    turned = grid_sample(crops.permute(0, 3, 1, 2).float(), grid, padding_mode="reflection", align_corners=False)
    return turned.permute(0, 2, 3, 1).round().to(torch.uint8)


def erase(crops: Tensor, share: float, draws: Draws) -> Tensor:
    """Random erasing (Zhong et al. 2020): a rectangle of noise in this share of the images.

    Args:
        crops: uint8 (N, H, W, 3).
        share: 0..1.

    Returns:
        uint8 (N, H, W, 3).
    """
    if not share:
        return crops
    height, width = crops.shape[1:3]
    shapes = torch.tensor([[height, width]]).expand(len(crops), 2)
    left, top, right, bottom = _boxes(shapes, ERASED, ERASED_RATIO, draws).to(crops.device).T[..., None]
    chosen = draws.uniform(crops.device) < share
    noise = draws.noise(height, width).to(crops.device)
    x, y = ((torch.arange(n, device=crops.device) + 0.5) / n for n in (width, height))
    across, down = (x >= left) & (x < right), (y >= top) & (y < bottom)  # (N, W) and (N, H)
    erased = chosen[:, None, None] & down[:, :, None] & across[:, None, :]
    return torch.where(erased[..., None], noise, crops)


@dataclass(frozen=True)
class Mix:
    """How each image of a batch is mixed with its neighbour: one choice for the whole batch.

    kept: share of the image itself, 0..1, by which its label counts too; the rest is its neighbour's.
    box: of CutMix, (top, bottom, left, right) px, where the neighbour's pixels are; None for mixup, which blends.
    """

    kept: float
    box: tuple[int, int, int, int] | None = None

    def __call__(self, images: Tensor, neighbours: Tensor) -> Tensor:
        """Mixes float (n, 3, H, W) with as many others."""
        if self.box is None:
            return self.kept * images + (1 - self.kept) * neighbours
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = neighbours[:, :, top:bottom, left:right]
        return mixed


def draw_mix(mixup: float, cutmix: float, height: int, width: int, generator: Generator) -> Mix | None:
    """mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), a coin deciding where both are on; None with both off.

    Args:
        mixup, cutmix: alpha of the Beta(alpha, alpha) that the shares are drawn from; 0 for off.
        height, width: of the images, px.
    """
    if not mixup and not cutmix:
        return None
    # NumPy has a Beta distribution that takes a generator; seeded anew each time, it has no state to be kept.
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    cut = random.random() < 0.5 if mixup and cutmix else bool(cutmix)
    kept = float(random.beta(cutmix, cutmix) if cut else random.beta(mixup, mixup))
    if not cut:
        return Mix(kept)
    edges = []
    for side in (height, width):
        middle, half = random.uniform(0, side), side * (1 - kept) ** 0.5 / 2
        edges += [int(np.clip(round(edge), 0, side)) for edge in (middle - half, middle + half)]
    top, bottom, left, right = edges
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def _mirror(positions: Tensor, size: int) -> Tensor:
    """Positions outside 0..size-1 reflected back into it."""
    return size - 1 - (size - 1 - positions.abs()).abs()
