"""Classes of unequal size: how unequal they are, weights that make up for it, and an order that does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

UNEVEN = 5  # times the training images of the smallest class, from which on the largest is worth a line


def class_weights(targets: Tensor) -> Tensor:
    """What each class's images count in the loss: N / (classes · images of the class).

    Every class then counts the same, and the mean weight of the images is 1.

    Args:
        targets: int64 (N,), of the training images.

    Returns:
        float32 (C,).
    """
    counts = torch.bincount(targets)
    return len(targets) / (int((counts > 0).sum()) * counts.clamp(min=1).float())


def draw_evenly(generator: Generator, targets: Tensor) -> Tensor:
    """As many images as there are, drawn with replacement, each class being as likely as any other.

    Args:
        targets: int64 (N,), of the training images.

    Returns:
        int64 (N,), indices.
    """
    counts = torch.bincount(targets)
    starts, present = counts.cumsum(0) - counts, counts.nonzero().flatten()
    drawn = present[torch.randint(len(present), (len(targets),), generator=generator)]
    inside = torch.rand(len(targets), generator=generator, dtype=torch.float64) * counts[drawn]
    return targets.argsort(stable=True)[starts[drawn] + inside.long()]


def say_uneven(targets: Tensor, labels: Sequence[str]) -> str:
    """A line about classes of very unequal size, or nothing."""
    counts = torch.bincount(targets, minlength=len(labels))
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] < UNEVEN * counts[smallest]:
        return ""
    return (
        f"unequal classes: {int(counts[largest]):,} training images of '{labels[largest]}', {int(counts[smallest]):,} "
        f"of '{labels[smallest]}'; --balance loss or sampler gives all classes the same weight"
    )
