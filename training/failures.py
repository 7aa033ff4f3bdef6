"""What can end a training early, each said in one line with the way out."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from training import distributed
from training.resolve import Plan


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM before there were weights to keep; `number` is the signal's."""

    def __init__(self, number: int, last: Path) -> None:
        go_on = f"; --resume {shlex.quote(str(last.parent))} goes on" if last.exists() else ""
        super().__init__(f"interrupted before the first epoch was over: there are no weights to keep{go_on}")
        self.number = number


class Diverged(RuntimeError):
    """The loss is infinite or NaN. The message has the step and the learning rate."""


class OutOfMemory(RuntimeError):
    """The GPU's memory is too small. The message says what to halve."""


@contextmanager
def explained(last: Path, plan: Plan, epoch: int, images: int) -> Iterator[None]:
    """Gives what fails in an epoch of training its way out.

    Args:
        last: the checkpoint to go back to, if epochs are done.
        epoch: how many are.
        images: how many there are to train on.

    Raises:
        Diverged: with the last good checkpoint.
        OutOfMemory: instead of PyTorch's own.
        ValueError: `--compile` cannot be had.
    """
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{error}; {way_back(last, epoch)}") from None
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--compile: torch.compile cannot do it ({reason}); leave --compile out") from None
    except torch.OutOfMemoryError:
        raise OutOfMemory(what_to_halve(plan, images)) from None


def check_loss(loss: float, epochs: float, last: Path, epoch: int) -> None:
    """
    Args:
        loss: on val, after so many `epochs`; last, epoch: as `explained` has them.

    Raises:
        Diverged: by the last step's update, which no checkpoint may hold.
    """
    if not math.isfinite(loss):
        raise Diverged(f"the loss on val is {loss} after epoch {epochs}; {way_back(last, epoch)}")


def has_finite_weights(network: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def way_back(last: Path, epoch: int) -> str:
    """What a run that diverged after `epoch` epochs leaves, and what to do about it."""
    where = f"epoch {epoch}" if epoch else "from before the end of epoch 1"
    kept = f"the last good checkpoint is {last}, {where}" if last.exists() else "there is no checkpoint yet"
    return f"{kept}; pass a smaller --lr, or --clip-grad-norm 1"


def what_to_halve(plan: Plan, images: int) -> str:
    """One line for a step that found no room."""
    batch, parts = min(plan.batch_size, images), distributed.world() * plan.accumulate
    part = -(-batch // parts)
    said = f"{plan.device}: out of memory with --batch-size {plan.batch_size}, {part} images at a time"
    if batch < 4 * parts:  # a half would have less than 2 images for each
        return f"{said}; pass a smaller --size"
    return (
        f"{said}; pass --accumulate {2 * plan.accumulate}, which halves them and learns the same (but for BatchNorm), "
        f"or --batch-size {batch // 2}"
    )
