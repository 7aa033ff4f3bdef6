"""What a training says on the terminal: lines on standard output, bars on standard error.

The library speaks through `logging`, under the names of its packages, and `on_terminal` connects that to the terminal.
"""

from __future__ import annotations

import logging
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.decoded_images import Data
from dataset.terminal import printed
from training import distributed
from training.balance import say_uneven
from training.metrics import one_label_for_all
from training.options import TrainOptions
from training.resolve import Plan
from training.schedule import Schedule

SECONDS_A_LINE = 30  # of progress, where there is no terminal

log = logging.getLogger(__name__)


def on_terminal() -> AbstractContextManager[None]:
    """In the block, what `dataset` and `training` have to say is printed."""
    return printed("dataset", "training")


class _Pace:
    """How fast something goes, and when a line about it is due."""

    def __init__(self, before: int) -> None:
        self.before, self._started = before, time.perf_counter()
        self._said = self._started

    def is_due(self) -> bool:
        now = time.perf_counter()
        if now - self._said < SECONDS_A_LINE:
            return False
        self._said = now
        return True

    def rate(self, done: int) -> float:
        """Images per second."""
        return (done - self.before) / (time.perf_counter() - self._started)


@contextmanager
def image_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of how many images are done, of how many: from its first call on it moves a bar on a terminal,
    and says a line now and then elsewhere. Not before: what is printed until then would break the bar."""
    if sys.stderr.isatty() and distributed.rank() == 0:
        bar: tqdm[Any] | None = None

        def move(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = tqdm(total=total, desc=name, unit=" images", leave=False)
            bar.update(done - bar.n)

        try:
            yield move
        finally:
            if bar is not None:
                bar.close()
        return
    pace: _Pace | None = None

    def tell(done: int, total: int) -> None:
        nonlocal pace
        if pace is None or done <= pace.before:  # it may begin anew, in smaller batches
            pace = _Pace(done)
        elif pace.is_due():
            rate = pace.rate(done)
            left = tqdm.format_interval((total - done) / rate)
            log.info(f"{name}: {done:,} of {total:,} images, {rate:,.1f} images/s, {left} left")

    yield tell


@contextmanager
def epoch_progress(
    epoch: int, images: int, plan: Plan, schedule: Schedule, before: int = 0
) -> Iterator[Callable[[float, int], None]]:
    """Gives a function of the loss and the images seen in this epoch: it moves a bar on a terminal, and says a line
    now and then elsewhere.

    Args:
        epoch: how many are done; images: in each.
        before: of these, how many were seen before the run went on within the epoch.
    """
    name = f"epoch {epoch + 1}" + (f"/{plan.epochs:g}" if math.isfinite(plan.epochs) else "")
    if sys.stderr.isatty() and distributed.rank() == 0:
        with tqdm(total=images, initial=before, desc=name, unit=" images", leave=False) as bar:

            def move(loss: float, seen: int) -> None:
                bar.update(seen - bar.n)
                bar.set_postfix_str(f"loss {loss:.3f}, run {tqdm.format_interval(schedule.left)} left", refresh=False)

            yield move
        return
    pace = _Pace(before)

    def tell(loss: float, seen: int) -> None:
        if not pace.is_due():
            return
        rate = pace.rate(seen)
        left, run = (tqdm.format_interval(seconds) for seconds in ((images - seen) / rate, schedule.left))
        log.info(
            f"{name}: {seen:,} of {images:,} images, loss {loss:.3f}, {rate:,.1f} images/s, "
            f"{left} left of the epoch, {run} of the run"
        )

    yield tell


def announce(options: TrainOptions, plan: Plan, data: Data, seconds: float) -> None:
    """What is about to be done. `seconds`: that reading the data took."""
    if data.skipped:
        log.info("\n  ".join((f"left out {len(data.skipped)} unreadable images:", *data.skipped)))
    log.info(
        f"{data.name}: {len(data.labels)} classes, {len(data.train):,} train, {len(data.val):,} val, "
        f"{len(data.test):,} test images, read in {seconds:.1f} s"
    )
    lengths = [f"{plan.epochs:g} epochs"] if math.isfinite(plan.epochs) else []
    lengths += [f"{plan.seconds / 60:g} minutes"] if math.isfinite(plan.seconds) else []
    if plan.balance == "none" and (line := say_uneven(data.train.targets, data.labels)):
        log.info(line)
    crops = f"random crops of {plan.crop_scale:g} to 1 of the area at {plan.train_size} px"
    moved = crops if plan.crop_scale else f"shift {plan.crop_padding} px"
    log.info(
        f"{plan.arch} at {plan.size} px for {' or '.join(lengths)} on {plan.device}; batches of {plan.batch_size}, "
        f"flip {'on' if plan.flip else 'off'}, {moved}, jitter {plan.jitter:g}"
    )
    extras = [name.replace("_", " ") + ("" if on is True else f" {on}") for name, on in options.switched_on.items()]
    if distributed.world() > 1:
        extras.append(f"{distributed.world()} processes")
    if extras:
        log.info("with " + ", ".join(extras))


def say_what_is_kept(number: int, has_weights: bool) -> None:
    """At the first signal, `number`; where there are no weights to keep yet, the end says so."""
    if has_weights and distributed.local_rank() == 0:
        again, state = ("SIGTERM", ", and the state for --resume") if number == signal.SIGTERM else ("Ctrl-C", "")
        print(f"interrupted: the best weights so far are kept{state}; {again} again stops at once", file=sys.stderr)


def say_epoch(row: dict[str, float], val: dict[str, Any], stuck: str) -> str:
    """How an epoch went.

    Args:
        row: of the history; val: the `score` of the val split.
        stuck: what this function gave for the epoch before.

    Returns:
        The label that the network gives to nearly all val images, if it does; it is said once.
    """
    log.info(
        f"epoch {row['epoch']:3}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2%}  "
        f"val {row['val_accuracy']:.2%}  {row['seconds']:.0f} s"
    )
    label = one_label_for_all(val)
    if label and not stuck:
        log.info(f"the network gives '{label}' to nearly all val images; if it stays so, pass a smaller --lr")
    return label


def summarise(out: Path, metrics: dict[str, Any]) -> None:
    """What the training came to, and what comes next."""
    test, trained = metrics["test"], metrics["train"]
    log.info(
        f"test: {test['accuracy']:.2%} of {test['images']:,} images ({beside_accuracy(test)}); "
        f"best epoch {trained['best_epoch']:g}, {trained['seconds']:.0f} s, "
        f"{trained['images_per_second']:,.0f} images/s"
    )
    if label := one_label_for_all(test):
        log.info(f"the network gives '{label}' to nearly all test images; train longer, or with a smaller --lr")
    log.info(f"report: {out / 'report' / 'index.html'}\nnext:   {export_command(out)}")


def say_evaluation(scores: dict[str, Any]) -> None:
    log.info(
        f"{scores['data']}, {scores['split']}: {scores['accuracy']:.2%} of {scores['images']:,} images "
        f"({beside_accuracy(scores)}, macro F1 {scores['macro']['f1']:.4f})"
    )


def beside_accuracy(scores: dict[str, Any]) -> str:
    """What an accuracy is to be read with; of five classes or fewer all are among the top five."""
    top5 = f"top-5 {scores['top5']:.2%}, " if len(scores["per_class"]) > 5 else ""
    return f"the largest class alone {scores['baseline']:.2%}, {top5}calibration error {scores['ece']:.3f}"


def export_command(out: Path) -> str:
    """The next command, to be pasted as it is; with a name where export refuses the folder's own."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", out.resolve().name).lstrip("-._") or "model"
    return shlex.join(["python", "-m", "export", str(out)] + (["--name", name] if name != out.resolve().name else []))
