"""The learning rate over time."""

from __future__ import annotations

import math

from training.config import TrainConfig


def lr_factor(config: TrainConfig, progress: float, epoch: int) -> float:
    """The share of the peak learning rate.

    Args:
        progress: how much of the run is done, 0..1, in steps or in time.
        epoch: epochs completed; the step schedule counts these.
    """
    # 1. from 0 to the peak, linearly
    if progress < config.warmup:
        return max(progress / config.warmup, 1e-3)
    # 2. from the peak down
    if config.schedule == "cosine":
        rest = (progress - config.warmup) / max(1 - config.warmup, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(rest, 1)))
    if config.schedule == "step":
        return config.gamma ** (epoch // config.step_size)
    return 1.0
