"""A small convolutional network that learns 32 px images in minutes, after airbench's (Jordan 2024, arXiv:2404.00498).

Of airbench's ways to begin (a first layer that whitens, filters that pass their inputs on, norms without a scale) none
was worth half a point here, so there are none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import gelu, max_pool2d

STEM = 24  # filters of the first layer, 2×2
SCALE = 1 / 9  # of the logits: keeps the first losses, and with them the first steps, small


class FastNet(nn.Module):
    """A first layer of 2×2 px, three blocks that halve the side, a maximum over what is left, a linear head.

    Takes images of 16 px or more.
    """

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        """
        Args:
            widths: channels of the blocks.
        """
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 2)
        self.blocks = nn.Sequential(*(Block(i, o) for i, o in zip((STEM, *widths), widths, strict=False)))
        self.classifier = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(gelu(self.stem(images)))
        features = max_pool2d(features, features.shape[-2:])  # amax's gradient is NaN if compiled in bfloat16
        return self.classifier(features.flatten(1) * SCALE)


class FastNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics follow quickly, as trainings are short; Muon moves its bias fast."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.4)


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm and GELU; the first one's output is halved in width and height."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = FastNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = FastNorm(outputs)

    def forward(self, features: Tensor) -> Tensor:
        features = gelu(self.norm1(max_pool2d(self.conv1(features), 2)))
        return gelu(self.norm2(self.conv2(features)))
