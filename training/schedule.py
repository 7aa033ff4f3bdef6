"""The learning rate over time, when the state is saved, and when the time is over."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable

from torch.optim import Optimizer

from training import distributed
from training.resolve import Plan


class Schedule:
    """Sets the learning rate before each step; a run ends after `plan.epochs` or `plan.seconds`, whichever comes first,
    so the schedule also completes on a slow machine.

    head_seconds: of the run, before its first step, in which the head was fitted: they count as time, and not as a part
        of the learning rate's schedule.
    progress: how much of the run is done, 0..1, in steps or in time, as of the last step or `is_over`.
    interrupted: the number of the signal that ends the run, 0 for none; any process may have had it.
    must_save: whether the state is to be saved now: it is time, or SIGTERM came.

    These are the same in all processes.
    """

    def __init__(self, optimizer: Optimizer, plan: Plan, interrupted: Callable[[], int]) -> None:
        self._optimizer, self._plan, self._interrupted = optimizer, plan, interrupted
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._started = time.perf_counter()
        self.progress, self.interrupted, self.must_save = 0.0, 0, False
        self._saved = self.head_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a kill and its resumption."""
        return time.perf_counter() - self._started

    @property
    def left(self) -> float:
        """Seconds until the run ends, if it goes on as fast as it went; 0 if it has not begun."""
        return self.seconds * (1 - self.progress) / self.progress if self.progress else 0.0

    def go_on_from(self, seconds: float) -> None:
        """Takes the run as having lasted `seconds` so far."""
        self._started, self._saved = time.perf_counter() - seconds, seconds

    def saved(self) -> None:
        """Takes the state as having been saved now."""
        self._saved = self.seconds

    def leave_out(self, seconds: float) -> None:
        """Takes what has just lasted `seconds` as no part of the run."""
        self._started += seconds

    @property
    def lr(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def is_over(self, epochs: float) -> bool:
        """Whether the run ends here, `epochs` after its beginning."""
        return self._look(epochs) >= 1 or self.interrupted > 0

    def before_step(self, epoch: int, done: float) -> bool:
        """Sets the learning rate for a step at the share `done` of an epoch; False if the run is over."""
        progress = self._look(epoch + done)
        before = min(self.head_seconds / self._plan.seconds, 0.999)
        factor = lr_factor(self._plan, max(0.0, (self.progress - before) / (1 - before)), epoch)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return progress < 1 and not self.interrupted

    def _look(self, epochs: float) -> float:
        """How much of the run is done, 0 to 1 or above; brings what all processes agree on up to date."""
        seconds = self.seconds
        spent = max(epochs / self._plan.epochs, seconds / self._plan.seconds)
        is_due = seconds - self._saved >= self._plan.checkpoint_seconds
        progress, interrupted, due = distributed.largest(spent, self._interrupted(), is_due)
        self.progress, self.interrupted = min(progress, 1), int(interrupted)
        self.must_save = bool(due) or self.interrupted == signal.SIGTERM
        return progress


def lr_factor(plan: Plan, progress: float, epoch: int) -> float:
    """The share of the peak learning rate.

    Args:
        progress: how much of the run is done, 0..1, in steps or in time.
        epoch: epochs completed; the step schedule counts these.
    """
    # 1. from 0 to the peak, linearly
    if progress < plan.warmup:
        return max(progress / plan.warmup, 1e-3)
    # 2. from the peak down
    rest = min((progress - plan.warmup) / max(1 - plan.warmup, 1e-9), 1)
    if plan.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    if plan.schedule == "linear":
        return 1 - rest
    if plan.schedule == "step":
        return plan.gamma ** (epoch // plan.step_size)
    return 1.0
