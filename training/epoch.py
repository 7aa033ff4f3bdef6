"""One epoch: every training image once, in a new order; then the val split, evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset.decoded_images import Data, Split
from model.registry import train_mode
from training import distributed
from training.ahead import Ahead
from training.balance import draw_evenly
from training.batchnorm import estimate_statistics
from training.evaluation import evaluate
from training.failures import Diverged
from training.learner import Learner, head_of
from training.randomness import order_generator, seed_dropout, step_generator
from training.resolve import Plan
from training.schedule import Schedule
from training.step import make_batch, train_step

STEPS_A_LOOK = 50  # between two looks at the loss: reading it waits for the device
SECONDS_A_LOOK = 10  # after which one process alone looks before that


@dataclass(frozen=True)
class Trained:
    """How an epoch went, over the images seen, augmented as they were: mean loss (nats) and accuracy (0..1).

    share: how much of the epoch was done, 0..1, when the run ended in it.
    """

    loss: float
    accuracy: float
    steps: int
    share: float
    images: int
    seconds: float


@dataclass(frozen=True)
class PartialEpoch:
    """What the first steps of an epoch came to, in all processes together.

    losses: float32 (steps,), of each batch, nats; rates: its learning rate.
    correct: float32 (), predictions; seen: images; seconds: that this took.
    """

    losses: Tensor
    rates: list[float]
    correct: Tensor
    seen: int
    seconds: float


class Tally:
    """Counts what the steps of an epoch come to, in this process; `begun` stands for its first steps."""

    def __init__(self, steps: int, device: torch.device, begun: PartialEpoch | None) -> None:
        self.losses = torch.zeros(steps, device=device)  # of this process's share of each batch
        self.correct = torch.zeros((), device=device)
        self.rates: list[float] = list(begun.rates) if begun else []
        self.seen = begun.seen if begun else 0
        self._started = time.perf_counter() - (begun.seconds if begun else 0)
        if begun and distributed.rank() == 0:  # it is of all processes already
            self.losses[: len(begun.rates)] = begun.losses.to(device)
            self.correct += begun.correct.to(device)

    def add(self, loss: Tensor, correct: Tensor, rate: float, images: int) -> None:
        self.losses[len(self.rates)] = loss
        self.correct = self.correct + correct
        self.rates.append(rate)
        self.seen += images

    def together(self, epoch: int) -> PartialEpoch:
        """What it is in all processes, each of which must call this.

        Raises:
            Diverged: as `finite`.
        """
        losses = torch.tensor(finite(self.losses, self.rates, epoch))
        seconds = time.perf_counter() - self._started
        return PartialEpoch(losses, [*self.rates], distributed.total(self.correct).cpu(), self.seen, seconds)


def train_epoch(
    learner: Learner,
    split: Split,
    plan: Plan,
    schedule: Schedule,
    epoch: int,
    on_step: Callable[[float, int], None] = lambda loss, seen: None,
    begun: PartialEpoch | None = None,
    on_save: Callable[[PartialEpoch], None] = lambda begun: None,
) -> Trained:
    """Trains on every image once, in a new order; ends earlier where the schedule says that the run is over.

    With `--balance sampler` as many images are drawn, some of them more than once.

    Args:
        epoch: how many are done.
        on_step: called after each step with a recent loss and the images seen, to show progress.
        begun: the epoch's first steps, where a run goes on within it.
        on_save: called between two steps, in every process, where the state must be saved.

    Raises:
        Diverged: the loss became infinite or NaN.
    """
    train_mode(learner.network, hold_norms=plan.hold_norms)
    batches = shuffled(order_generator(plan.seed, epoch), split.targets, plan)
    ahead = Ahead(learner, split, batches, plan, epoch)
    tally, first = Tally(len(batches), plan.device, begun), len(begun.rates) if begun else 0
    shown, looked = math.nan, time.perf_counter()
    for step, indices in enumerate(batches[first:], start=first):
        goes_on = schedule.before_step(epoch, step / len(batches))
        if schedule.must_save and step > first:
            on_save(tally.together(epoch))
        if not goes_on:
            break
        batch = make_batch(
            learner, split, indices, plan, step_generator(plan.seed, epoch, step), boxes=ahead.boxes(step)
        )
        ahead.prepare(step)
        seed_dropout(plan.seed, epoch, step, distributed.rank())
        loss, correct = train_step(learner, batch, plan)
        tally.add(loss, correct, schedule.lr, len(indices))
        now = time.perf_counter()
        slow = distributed.world() == 1 and now - looked >= SECONDS_A_LOOK  # several would have to agree on it
        if step % STEPS_A_LOOK == 0 or slow:
            shown, looked = finite(tally.losses, tally.rates, epoch)[step], now
        on_step(shown, tally.seen)
    return _trained(tally.together(epoch), batches)


def _trained(done: PartialEpoch, batches: Sequence[Tensor]) -> Trained:
    """What the steps that were done came to, of those that there are."""
    seen, losses = max(done.seen, 1), zip(done.losses.tolist(), batches, strict=False)
    return Trained(
        loss=sum(value * len(batch) for value, batch in losses) / seen,
        accuracy=float(done.correct) / seen,
        steps=len(done.rates),
        share=len(done.rates) / len(batches),
        images=done.seen,
        seconds=done.seconds,
    )


def evaluate_val(learner: Learner, data: Data, plan: Plan) -> Tensor:
    """Logits of the val split, float32 (M, C), on the CPU; by the average of the weights, if there is one.

    BatchNorm's statistics are brought up to the weights before, where they would lag behind.
    """
    if learner.slow_norms:
        batch = max(2, largest_part(plan, len(data.train)))
        estimate_statistics(learner.averaged, learner.slow_norms, data.train, learner.scale, batch)
    distributed.copy_buffers(learner.averaged)
    if not learner.features:
        return evaluate(learner.averaged, data.val, *learner.scale, amp=plan.amp)
    with torch.inference_mode():
        return head_of(learner.averaged)(learner.features.val.to(plan.device)).cpu()


def make_row(
    history: Sequence[dict[str, float]], trained: Trained, val: dict[str, Any], schedule: Schedule
) -> dict[str, float]:
    """The history's row for the epoch that has just ended. A part of one counts as such: after 6 epochs and a half the
    "epoch" is 6.5."""
    before = history[-1]["epoch"] if history else 0
    epoch = before + 1 if trained.share == 1 else round(before + min(max(trained.share, 0.01), 0.99), 2)
    return history_row(epoch, schedule.lr, trained.loss, trained.accuracy, val, schedule.seconds)


def history_row(
    epoch: float, lr: float, loss: float, accuracy: float, val: dict[str, Any], seconds: float
) -> dict[str, float]:
    """A row of history.csv; `loss` and `accuracy` of the training images, `val`: the `score` of the val split."""
    return {
        "epoch": epoch,
        "lr": lr,
        "train_loss": loss,
        "train_accuracy": accuracy,
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "val_macro_f1": val["macro"]["f1"],
        "seconds": round(seconds, 2),
    }


def shuffled(generator: torch.Generator, targets: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """Indices of the images, in a new order, by batches. A last batch too small to be cut is left out.

    Args:
        targets: int64 (N,), of the training images.
    """
    if plan.balance == "sampler":
        order = draw_evenly(generator, targets)
    else:
        order = torch.randperm(len(targets), generator=generator)
    batches = order.split(plan.batch_size)
    parts = distributed.world() * plan.accumulate
    if len(batches) > 1 and len(batches[-1]) < 2 * parts:  # BatchNorm has no variance of one image
        batches = batches[:-1]
    return batches


def largest_part(plan: Plan, images: int) -> int:
    """How many images at a time go through the network, at the most."""
    return -(-min(plan.batch_size, images) // (distributed.world() * plan.accumulate))


def finite(losses: Tensor, rates: list[float], epoch: int) -> list[float]:
    """The loss of each step so far, one for each of `rates`, over all processes.

    Raises:
        Diverged: one of them is infinite or NaN.
    """
    values: list[float] = distributed.total(losses[: len(rates)]).tolist()
    for step, value in enumerate(values):
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} at step {step + 1} of {len(losses)} in epoch {epoch + 1}, "
                f"at a learning rate of {rates[step]:.2g}"
            )
    return values
