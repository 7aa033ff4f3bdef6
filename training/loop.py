"""Epoch after epoch: train, evaluate, write down."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import checkpoint
from predictor.files import write_text
from training import distributed
from training.metrics import one_label_for_all, score
from training.tensorboard import Board
from training.trainer import Diverged, OutOfMemory, Trainer

SECONDS_A_LINE = 30  # of progress inside an epoch, where there is no terminal


class Interrupted(KeyboardInterrupt):
    """Ctrl-C before there was anything to keep."""


def fit(trainer: Trainer, out: Path) -> None:
    """Trains until the schedule, Ctrl-C or `config.patience` ends it; writes last.ckpt after each epoch.

    Ctrl-C leaves the epoch that it cut short out. The end of `config.minutes` does not: what there is of its last epoch
    is evaluated, and stands in the history as a part of one.

    Raises:
        ValueError: there was no time for a single step.
        Interrupted: by Ctrl-C in the first epoch.
        Diverged: the loss is no number any more. The message names the last good checkpoint.
        OutOfMemory: of the GPU. The message names a batch size that fits.
    """
    history, config = trainer.history, trainer.config
    board = Board(out / "tensorboard", len(history)) if distributed.rank() == 0 else None
    stuck = ""  # on this label
    if history:
        write_history(history, out)  # the kill may have come between the two files
    while not history or not is_over(trainer):
        with progress(trainer) as show:
            train = train_one_epoch(trainer, show, out)
        if trainer.schedule.interrupted and not history:
            raise Interrupted("interrupted before the first epoch was over: there are no weights to keep")
        if history and (trainer.schedule.interrupted or not train["steps"]):
            break
        if not train["steps"]:
            raise ValueError(f"--minutes {config.minutes}: over before the first step; give it more")
        trainer.estimate_statistics()
        distributed.copy_buffers(trainer.averaged)
        val = score(trainer.evaluate(), trainer.data.val.targets, trainer.data.labels)
        row = make_row(trainer, train, val)
        if not math.isfinite(val["loss"]):  # the last step's update: no checkpoint may hold it
            raise Diverged(f"the loss on val is {val['loss']} after epoch {row['epoch']}; {way_back(trainer, out)}")
        history.append(row)
        print(
            f"epoch {row['epoch']:3}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2%}  "
            f"val {row['val_accuracy']:.2%}  {row['seconds']:.0f} s",
            flush=True,
        )
        before, stuck = stuck, one_label_for_all(val)
        if stuck and not before:
            print(f"the network gives '{stuck}' to nearly all val images; if it stays so, pass a smaller --lr")
        if is_better(val, trainer.best):
            best = {"epoch": row["epoch"], "accuracy": val["accuracy"], "loss": val["loss"]}
            trainer.best = {**best, "network": snapshot(trainer.averaged)}
        state = trainer.state()
        if board:
            checkpoint.save(state, out / "last.ckpt")
            write_history(history, out)
            board.write(row)


def make_row(trainer: Trainer, train: dict[str, float], val: dict[str, Any]) -> dict[str, float]:
    """The history's row for the epoch that has just ended. A part of one counts as such: after 6 epochs and a half the
    "epoch" is 6.5."""
    before = trainer.history[-1]["epoch"] if trainer.history else 0
    share = train["share"]
    return {
        "epoch": before + 1 if share == 1 else round(before + min(max(share, 0.01), 0.99), 2),
        "lr": trainer.schedule.lr,
        "train_loss": train["loss"],
        "train_accuracy": train["accuracy"],
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "seconds": round(trainer.schedule.seconds, 2),
    }


def train_one_epoch(trainer: Trainer, show: Callable[[float, int], None], out: Path) -> dict[str, float]:
    """As `Trainer.train_one_epoch`; its errors say what there is to go back to, and what to do."""
    try:
        return trainer.train_one_epoch(show)
    except Diverged as error:
        raise Diverged(f"{error}; {way_back(trainer, out)}") from None
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--compile: torch.compile cannot do it ({reason}); leave --compile out") from None
    except torch.OutOfMemoryError:
        pass  # its traceback holds the batch; here it is gone, and there is room to try a smaller one
    raise OutOfMemory(trainer.out_of_memory())


def way_back(trainer: Trainer, out: Path) -> str:
    """What a run that diverged leaves, and what to do about it."""
    done = len(trainer.history)
    kept = f"the last good checkpoint is {out / 'last.ckpt'}, epoch {done}" if done else "there is no checkpoint yet"
    return f"{kept}; pass a smaller --lr, or --clip-grad-norm 1"


def is_better(val: dict[str, Any], best: dict[str, Any]) -> bool:
    """By accuracy; of two that are equal, as they often are on few images, by the lower loss."""
    return (val["accuracy"], -val["loss"]) > (best["accuracy"], -best["loss"])


def is_over(trainer: Trainer) -> bool:
    """Whether the run ends with the epochs that it has."""
    epoch, config = len(trainer.history), trainer.config
    if trainer.schedule.is_over(epoch):
        return True
    if not config.patience or trainer.schedule.progress < config.low_res:
        return False
    accuracies = [row["val_accuracy"] for row in trainer.history]
    gain = accuracies.index(max(accuracies)) + 1  # the last epoch with one
    if epoch - max(gain, config.unfreeze_at) < config.patience:
        return False
    print(f"no better val accuracy for {config.patience} epochs: stopping early")
    return True


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on the CPU, in the plain memory layout."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }


def write_history(history: list[dict[str, float]], out: Path) -> None:
    if distributed.rank() > 0:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    write_text(out / "history.csv", text.getvalue())


@contextmanager
def progress(trainer: Trainer) -> Iterator[Callable[[float, int], None]]:
    """Gives a function of the loss and the images seen in this epoch: it moves a bar on a terminal, and prints a line
    now and then elsewhere."""
    config, images, schedule = trainer.config, len(trainer.data.train), trainer.schedule
    length = f"/{config.epoch_limit:g}" if math.isfinite(config.epoch_limit) else ""
    name = f"epoch {len(trainer.history) + 1}{length}"
    started = printed = time.perf_counter()
    if sys.stderr.isatty() and distributed.rank() == 0:
        with tqdm(total=images, desc=name, unit=" images", leave=False) as bar:

            def move(loss: float, seen: int) -> None:
                bar.update(seen - bar.n)
                bar.set_postfix_str(f"loss {loss:.3f}, run {tqdm.format_interval(schedule.left)} left", refresh=False)

            yield move
        return

    def tell(loss: float, seen: int) -> None:
        nonlocal printed
        now = time.perf_counter()
        if now - printed < SECONDS_A_LINE:
            return
        printed, rate = now, seen / (now - started)
        left, run = (tqdm.format_interval(seconds) for seconds in ((images - seen) / rate, schedule.left))
        print(
            f"{name}: {seen:,} of {images:,} images, loss {loss:.3f}, {rate:,.1f} images/s, "
            f"{left} left of the epoch, {run} of the run",
            flush=True,
        )

    yield tell
