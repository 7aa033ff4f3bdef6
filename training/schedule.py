"""The learning rate over time, and when the time is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch.optim import Optimizer

from training.config import TrainConfig


class Schedule:
    """Sets the learning rate before each step; a run ends after `config.epochs`, or after `config.minutes`."""

    def __init__(self, optimizer: Optimizer, config: TrainConfig, interrupted: Callable[[], bool]) -> None:
        self._optimizer, self._config, self._interrupted = optimizer, config, interrupted
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self._started

    @property
    def lr(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def is_over(self, epochs: float) -> bool:
        """Whether the run ends here, `epochs` after its beginning."""
        return self._progress(epochs) >= 1 or self._interrupted()

    def before_step(self, epoch: int, done: float) -> bool:
        """Sets the learning rate for a step at the share `done` of an epoch; False if the run is over."""
        epochs = epoch + done
        factor = lr_factor(self._config, min(self._progress(epochs), 1), epoch)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return not self.is_over(epochs)

    def _progress(self, epochs: float) -> float:
        """How much of the run is done: 0 to 1 or above."""
        if self._config.minutes:
            return self.seconds / (60 * self._config.minutes)
        return epochs / self._config.epochs


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
