"""Which epoch is the best one, whose weights are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MEASURES = {"accuracy": "val accuracy", "macro-f1": "val macro F1", "loss": "val loss"}  # as --select names them


@dataclass(frozen=True)
class Best:
    """The best epoch so far: its number, its val accuracy, loss and macro F1, and its weights.

    epoch: 0 for the head that was fitted before, below while there is none; network: a state_dict on the CPU.
    """

    epoch: float = -1
    accuracy: float = -1.0
    loss: float = 0.0
    network: dict[str, Tensor] = field(default_factory=dict)
    macro_f1: float = -1.0


def is_better(val: dict[str, Any], best: Best, select: str) -> bool:
    """Whether an epoch is better than the best so far.

    Args:
        val: the `score` of the val split.
        select: the measure that decides, a key of MEASURES. Of two epochs with the same accuracy or macro F1, as there
            often are on few images, the lower loss is better; of two with the same loss, the higher accuracy.
    """
    rank = _rank(val["accuracy"], val["macro"]["f1"], val["loss"], select)
    return best.epoch < 0 or rank > _rank(best.accuracy, best.macro_f1, best.loss, select)


def _rank(accuracy: float, macro_f1: float, loss: float, select: str) -> tuple[float, float]:
    """The higher, the better."""
    return {"accuracy": (accuracy, -loss), "macro-f1": (macro_f1, -loss), "loss": (-loss, accuracy)}[select]


def snapshot(epoch: float, val: dict[str, Any], network: nn.Module) -> Best:
    """The epoch with a copy of its weights on the CPU, in the plain memory layout."""
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    return Best(epoch, val["accuracy"], val["loss"], weights, val["macro"]["f1"])
