"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): one number that makes confidences mean what they say."""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

MISTAKES = 10
COLDEST, HOTTEST = 0.05, 20.0
XATOL = 1e-6  # of the temperature's logarithm: far below the four digits that are kept


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature by which the logits are to be divided for the least loss, from `COLDEST` to `HOTTEST`.

    The loss has one minimum in it, so Brent's bounded search finds it. Labels keep their order, so accuracy stays.

    Args:
        logits: float32 (N, C), of images that the network was not trained on.
        targets: int64 (N,).

    Returns:
        Rounded to 4 digits; 1 if there are fewer than `MISTAKES`, which say too little of how sure it may be.
    """

    def loss(log_temperature: float) -> float:
        return float(cross_entropy(logits.double() / math.exp(log_temperature), targets))

    if int((logits.argmax(dim=1) != targets).sum()) < MISTAKES:
        return 1.0
    found = minimize_scalar(
        loss, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded", options={"xatol": XATOL}
    )
    return float(f"{math.exp(found.x):.4g}")
