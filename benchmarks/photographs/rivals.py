"""Who takes part: the script of each, the options of ours that are taken away one by one, and one run of either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OURS = "ours"

# Modules of this package; those of PEERS run in the environment of benchmarks/peers/requirements.lock.
RIVALS = {
    OURS: "ours",
    "logistic regression": "logistic_regression",
    "timm": "timm_script",
    "fastai": "fastai_script",
}
PEERS = {"fastai"}

# One change each, as it is typed after train.py; all run for the same number of epochs.
AS_IT_IS = "as it is"
ABLATIONS: dict[str, tuple[str, ...]] = {
    AS_IT_IS: (),
    "shift in the place of random resized crops": ("--crop-padding", "24"),
    "crops of 0.2 to 1 of the area": ("--crop-scale", "0.2"),
    "trained at 128 px": ("--recipe", "finetune", "--train-size", "128"),
    "trained at 192 px": ("--recipe", "finetune", "--train-size", "192"),
    "statistics of BatchNorm learn": ("--recipe", "finetune", "--no-hold-norms"),
    "first layers learn too": ("--recipe", "finetune", "--freeze-first", "0"),
    "one rate for all layers": ("--recipe", "finetune", "--layer-decay", "1"),
    "no head first": ("--recipe", "finetune", "--no-head-first"),
    "no label smoothing": ("--label-smoothing", "0"),
    "EMA of 0.99": ("--ema", "0.99"),
    "TrivialAugment": ("--trivial",),
    "half the learning rate": ("--lr", "0.0003"),
}


@dataclass(frozen=True)
class Predictions:
    """What a run says about its test images.

    targets, predicted: of each image, by its `names`; indices in the sorted labels.
    facts: "seconds" of training, and what else the script reports.
    """

    names: list[str]
    targets: np.ndarray
    predicted: np.ndarray
    facts: dict[str, Any]


def run(
    module: str,
    data: Path,
    out: Path,
    *,
    python: Path,
    minutes: float,
    seed: int,
    threads: int,
    options: tuple[str, ...] = (),
) -> Predictions:
    """Runs a script, unless its predictions are there already.

    Args:
        options: of train.py, in the place of `minutes`.

    Raises:
        RuntimeError: it failed; the message ends with what it said last.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part.npz")  # what a killed run leaves is not taken for a whole one
        given = {"--data": data, "--minutes": minutes, "--seed": seed, "--threads": threads, "--out": part}
        command = [str(python), "-m", f"benchmarks.photographs.{module}"]
        command += [str(x) for pair in given.items() for x in pair]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        said = subprocess.run(
            [*command, *(["--", *options] if options else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if said.returncode:
            raise RuntimeError(f"{module} failed on {data}:\n{said.stdout[-2000:]}")
        part.rename(out)
    return read_predictions(out)


def read_predictions(path: Path) -> Predictions:
    """Reads a script's .npz file; an image's target is the folder that it lies in."""
    with np.load(path) as file:
        names, labels = file["names"].tolist(), file["labels"].tolist()
        predicted = file["probabilities"].argmax(axis=1)
        facts = json.loads(str(file["facts"]))
    targets = np.array([labels.index(name.split("/")[0]) for name in names])
    return Predictions(names, targets, predicted, facts)


def python_of(rival: str, peers: Path | None) -> Path:
    """The interpreter that a rival runs in."""
    if rival not in PEERS:
        return Path(sys.executable)
    if peers is None:
        raise ValueError(f"{rival}: needs --peers .venv-peers/bin/python (`make .venv-peers/ready`), or leave it out")
    return peers.absolute()
