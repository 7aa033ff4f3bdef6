"""Epoch after epoch: train, evaluate, write down."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import checkpoint
from model.files import write_text
from training import distributed
from training.config import TrainConfig
from training.metrics import score
from training.tensorboard import Board
from training.trainer import Diverged, OutOfMemory, Trainer


def fit(trainer: Trainer, out: Path) -> None:
    """Trains until the schedule, Ctrl-C or `config.patience` ends it; writes last.ckpt after each epoch.

    Ctrl-C leaves the epoch that it cut short out, unless it is the first.

    Raises:
        ValueError: there was no time for a single step.
        Diverged: the loss is no number any more. The message names the last good checkpoint.
        OutOfMemory: of the GPU. The message names a batch size that fits.
    """
    history, config = trainer.history, trainer.config
    board = Board(out / "tensorboard", len(history)) if distributed.rank() == 0 else None
    if history:
        write_history(history, out)  # the kill may have come between the two files
    while not history or not is_over(trainer):
        with progress_bar(len(history), len(trainer.data.train), config) as show:
            train = train_one_epoch(trainer, show, out)
        if history and (trainer.schedule.interrupted or not train["steps"]):
            break
        if not train["steps"] and not trainer.schedule.interrupted:
            raise ValueError(f"--minutes {config.minutes}: over before the first step; give it more")
        distributed.copy_buffers(trainer.averaged)
        val = score(trainer.evaluate(), trainer.data.val.targets, trainer.data.labels)
        if not math.isfinite(val["loss"]):  # the last step's update: no checkpoint may hold it
            raise Diverged(f"the loss on val is {val['loss']} after epoch {len(history) + 1}; {way_back(trainer, out)}")
        row = {
            "epoch": len(history) + 1,
            "lr": trainer.schedule.lr,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "val_loss": val["loss"],
            "val_accuracy": val["accuracy"],
            "seconds": round(trainer.schedule.seconds, 2),
        }
        history.append(row)
        print(
            f"epoch {row['epoch']:3}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2%}  "
            f"val {row['val_accuracy']:.2%}  {row['seconds']:.0f} s",
            flush=True,
        )
        if is_better(val, trainer.best):
            best = {"epoch": row["epoch"], "accuracy": val["accuracy"], "loss": val["loss"]}
            trainer.best = {**best, "network": snapshot(trainer.averaged)}
        state = trainer.state()
        if board:
            checkpoint.save(state, out / "last.ckpt")
            write_history(history, out)
            board.write(row)


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
    """By accuracy; of two that are equal, as they often are on few pictures, by the lower loss."""
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
def progress_bar(epoch: int, pictures: int, config: TrainConfig) -> Iterator[Callable[[float, int], None]]:
    """A bar on a terminal and nothing elsewhere; gives a function of the loss and the pictures seen that moves it."""
    length = f"/{config.epoch_limit:g}" if math.isfinite(config.epoch_limit) else ""
    with tqdm(
        total=pictures,
        desc=f"epoch {epoch + 1}{length}",
        unit="pictures",
        leave=False,
        disable=distributed.rank() > 0 or not sys.stderr.isatty(),
    ) as bar:

        def show(loss: float, seen: int) -> None:
            bar.update(seen - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        yield show
