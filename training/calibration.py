"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): one number that makes confidences mean what they say."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import cross_entropy

MISTAKES = 10
COLDEST, HOTTEST = 0.05, 20.0
STEPS = 60  # each narrows the place of the best one to 0.62 of what it was


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature by which the logits are to be divided for the least loss, from `COLDEST` to `HOTTEST`.

    The loss has one minimum in it, so a golden-section search finds it. Labels keep their order, so accuracy stays.

    Args:
        logits: float32 (N, C), of images that the network was not trained on.
        targets: int64 (N,).

    Returns:
        Rounded to 4 digits; 1 if there are fewer than `MISTAKES`, which say too little of how sure it may be.
    """

    def loss(place: float) -> float:
        return float(cross_entropy(logits.double() / math.exp(place), targets))

    if int((logits.argmax(dim=1) != targets).sum()) < MISTAKES:
        return 1.0
    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(COLDEST), math.log(HOTTEST)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = loss(right)
    return float(f"{math.exp((low + high) / 2):.4g}")
