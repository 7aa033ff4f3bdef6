"""Muon: momentum whose every step is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The rates of the rest beside that of the filters. The biases of FastNet's norms take a large one: airbench has
# 0.053 for the loss summed over 2,000 images, which is 106 for their mean, beside 0.24 for the filters.
HEAD, VECTORS, SHIFTS = 4.0, 0.22, 310.0


class Muon(torch.optim.Optimizer):
    """Muon for the filters of convolutions, which are kept at the norm sqrt(filters); Nesterov SGD for the rest.

    torch.optim.Muon takes matrices only, and does not keep norms.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.6,
        weight_decay: float = 0.0,
        shifts: Iterable[Tensor] = (),
    ) -> None:
        """
        Args:
            lr: of the filters; matrices get `HEAD` times that, vectors `VECTORS` times, and `shifts` `SHIFTS` times.
            weight_decay: of matrices, times their rate.
            shifts: those of `params` that shift what a norm gives.
        """
        apart = {id(p) for p in shifts}
        params = list(params)
        groups = [
            {"params": [p for p in params if p.ndim == 4], "lr": lr, "momentum": momentum},
            {
                "params": [p for p in params if p.ndim > 1 and p.ndim != 4],
                "lr": HEAD * lr,
                "weight_decay": weight_decay,
            },
            {"params": [p for p in params if p.ndim <= 1 and id(p) not in apart], "lr": VECTORS * lr},
            {"params": [p for p in params if id(p) in apart], "lr": SHIFTS * lr},
        ]
        super().__init__([group for group in groups if group["params"]], {"momentum": 0.85, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].mul_(momentum).add_(p.grad)
                update = p.grad + momentum * buffer
                if group["weight_decay"]:
                    update = update + group["weight_decay"] * p
                if p.ndim == 4:
                    p.mul_(len(p) ** 0.5 / p.norm())
                    update = orthogonal(update.flatten(1)).view_as(p)
                p.add_(update, alpha=-lr)


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """Near the nearest matrix with orthonormal rows or columns: float32 (N, M) to the same.

    A Newton-Schulz iteration, whose coefficients bring singular values near 1 quickly and not exactly.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if len(matrix) <= matrix.shape[1] else wide.T
