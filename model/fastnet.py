"""A small convolutional network that learns 32 px images in minutes: airbench's (Jordan 2024, arXiv:2404.00498)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d

WHITENED = 24  # filters of the first layer: the 12 principal components of 2×2 RGB patches, and their negatives
SCALE = 1 / 9  # of the logits: keeps the first losses, and with them the first steps, small


class FastNet(nn.Module):
    """A frozen whitening layer, three blocks that halve the side, a maximum over what is left, a linear head.

    Takes images of 16 px or more. Call `whiten` with training images before training.
    """

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        """
        Args:
            widths: channels of the blocks.
        """
        super().__init__()
        self.whitening = nn.Conv2d(3, WHITENED, 2)
        self.whitening.weight.requires_grad_(False)
        self.blocks = nn.Sequential(*(Block(i, o) for i, o in zip((WHITENED, *widths), widths, strict=False)))
        self.classifier = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(gelu(self.whitening(images)))
        features = max_pool2d(features, features.shape[-2:])  # amax's gradient is NaN if compiled in bfloat16
        return self.classifier(features.flatten(1) * SCALE)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Sets the first layer so that its outputs are uncorrelated and of variance 1 on `images`.

        Args:
            images: float32 (N, 3, H, W), normalised; a few thousand are enough.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2).flip(0)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()  # type: ignore[union-attr]


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm and GELU; the first one's output is halved in width and height."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(inputs, outputs), ShiftNorm(outputs)
        self.conv2, self.norm2 = _convolution(outputs, outputs), ShiftNorm(outputs)

    def forward(self, features: Tensor) -> Tensor:
        features = gelu(self.norm1(max_pool2d(self.conv1(features), 2)))
        return gelu(self.norm2(self.conv2(features)))


class ShiftNorm(nn.BatchNorm2d):
    """BatchNorm that learns a shift and no scale. Its statistics follow quickly, as trainings are short."""

    weight: Tensor  # type: ignore[assignment]

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.4)
        del self.weight
        self.register_buffer("weight", torch.ones(channels), persistent=False)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.zeros_(self.bias)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """It begins by passing its inputs on (Dirac), as far as it has outputs for them."""
    made = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(made.weight[: min(inputs, outputs)])
    return made
