"""last.ckpt: all that changes while a network learns, so that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.decoded_images import Data
from model import checkpoint
from model.checkpoint import CheckpointError, load_into
from training.epoch import PartialEpoch
from training.learner import Learner
from training.schedule import Schedule
from training.selection import Best

FILE = "last.ckpt"
VERSION = 4  # of the file, and of what the options mean

COUNTS = ("images", "train_seconds", "features_seconds")  # of Progress

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come.

    history: a row for each epoch, as in history.csv; the first is of epoch 0 where the head was fitted before.
    images: of the epochs that were completed, trained on in `train_seconds`, which evaluation is no part of.
    features_seconds: that the features of a frozen backbone took, which is no part of the schedule's time.
    begun: what the next epoch has come to already, where the state was saved within it.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    images: int = 0
    train_seconds: float = 0.0
    features_seconds: float = 0.0
    begun: PartialEpoch | None = None

    @property
    def epochs(self) -> int:
        """How many epochs were begun and are in the history."""
        return sum(row["epoch"] > 0 for row in self.history)

    @property
    def head_seconds(self) -> float:
        """How long the fitting of the head took, before the first epoch; 0 where there was none."""
        return self.history[0]["seconds"] if self.history and not self.history[0]["epoch"] else 0.0

    def add(self, row: dict[str, float], images: int, seconds: float) -> None:
        """Counts an epoch that trained on so many images in so many seconds."""
        self.history.append(row)
        self.images += images
        self.train_seconds += seconds


def collect(
    learner: Learner, schedule: Schedule, progress: Progress, data: Data, begun: PartialEpoch | None = None
) -> dict[str, Any]:
    """What last.ckpt holds. `begun`: the epoch that the run is in, unless it is between two."""
    average = learner.average
    return {
        "version": VERSION,
        "epoch": progress.epochs,
        "seconds": schedule.seconds,
        "network": learner.network.state_dict(),
        "ema": {"network": average.module.state_dict(), "steps": int(average.n_averaged) - 1} if average else None,
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "best": dict(vars(progress.best)),
        "counts": {name: getattr(progress, name) for name in COUNTS},
        "history": progress.history,
        "begun": dict(vars(begun)) if begun else None,
        "labels": data.labels,
        "images": _fingerprint(data),
    }


def restore(path: Path, learner: Learner, schedule: Schedule, data: Data) -> Progress:
    """Goes on from last.ckpt.

    Raises:
        CheckpointError: the file cannot be used, or is of other classes.
    """
    state = checkpoint.load(path)
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path}: written by another version of train.py; start the run anew")
    if state["labels"] != data.labels:
        raise CheckpointError(f"{path}: {_differences(state['labels'], data.labels)}; give the run's own --data")
    if state["images"] != _fingerprint(data):
        log.info("the images are not those that the run began with: it goes on with the new ones")
        state["begun"] = None  # the order of its images is another now: the epoch begins anew
    load_into(learner.network, state["network"])
    if learner.average:
        load_into(learner.average.module, state["ema"]["network"])
        learner.average.n_averaged.fill_(state["ema"]["steps"] + 1)
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])
    schedule.go_on_from(state["seconds"])
    history, begun = state["history"], PartialEpoch(**state["begun"]) if state["begun"] else None
    inside = f" and {len(begun.rates):,} steps of the next" if begun else ""
    log.info(f"going on after epoch {history[-1]['epoch'] if history else 0:g}{inside}, {state['seconds']:.0f} s")
    return Progress(history, Best(**state["best"]), begun=begun, **state["counts"])


def _fingerprint(data: Data) -> str:
    names = "\n".join((*data.train.names, "", *data.val.names))
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def _differences(before: Sequence[str], now: Sequence[str]) -> str:
    """How two lists of classes differ, class by class."""
    parts = []
    if gone := [label for label in before if label not in now]:
        parts.append(f"the run has {', '.join(map(repr, gone))}, which the data has not")
    if new := [label for label in now if label not in before]:
        parts.append(f"the data has {', '.join(map(repr, new))}, which the run has not")
    return "; ".join(parts) or f"the run's classes are in the order {', '.join(before)}, the data's in another"
