"""The exponential moving average of a network's weights, which often classifies better than the weights themselves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A second network that follows the first: after each step, weights = decay · weights + (1 - decay) · new ones.

    BatchNorm's statistics are averaged too. In the first steps the decay is smaller, (1 + n) / (10 + n) after n of
    them, so that the random weights of the beginning are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for own, new in zip(self._tensors(self.network), self._tensors(network), strict=True):
            if own.is_floating_point():
                own.lerp_(new, 1 - decay)
            else:
                own.copy_(new)

    @staticmethod
    def _tensors(network: nn.Module) -> list[Tensor]:
        return list(network.state_dict().values())
