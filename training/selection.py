"""Which epoch is the best one, and when there is no use in more of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.resolve import Plan


@dataclass(frozen=True)
class Best:
    """The best epoch so far: its number, its val accuracy and loss, and its weights (a state_dict on the CPU)."""

    epoch: float = 0
    accuracy: float = -1.0
    loss: float = 0.0
    network: dict[str, Tensor] = field(default_factory=dict)


def is_better(val: dict[str, Any], best: Best) -> bool:
    """By accuracy; of two that are equal, as they often are on few images, by the lower loss."""
    return (val["accuracy"], -val["loss"]) > (best.accuracy, -best.loss)


def snapshot(epoch: float, val: dict[str, Any], network: nn.Module) -> Best:
    """The epoch with a copy of its weights on the CPU, in the plain memory layout."""
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    return Best(epoch, val["accuracy"], val["loss"], weights)


def is_out_of_patience(history: Sequence[dict[str, float]], plan: Plan, progress: float) -> bool:
    """Whether the val accuracy has not risen for `plan.patience` epochs; a lower loss is no gain.

    What is yet to come counts: a backbone that is frozen still, and images of the full size.

    Args:
        history: a row for each epoch, as in history.csv.
        progress: how much of the run is done, 0..1.
    """
    if not plan.patience or progress < plan.low_res:
        return False
    accuracies = [row["val_accuracy"] for row in history]
    gain = accuracies.index(max(accuracies)) + 1  # the last epoch with one
    return len(history) - max(gain, plan.unfreeze_at) >= plan.patience
