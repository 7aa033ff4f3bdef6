"""The options of a run that goes on: its own, but for the few that may change in the middle of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.config import TrainConfig, read_config

RESUMABLE = ("data", "download_dir", "workers", "epochs", "minutes", "device")


def resumed_config(run: Path, source: str | None, options: dict[str, Any]) -> TrainConfig:
    """The options in the run's config.yaml, with what may be given anew.

    `--epochs` or `--minutes` may be changed, either in the place of both: the learning rate goes on where a run of that
    length would be. `--data` is for data that was moved; its classes must be the same, which `Trainer.restore` checks.

    Args:
        source: "config" or "recipe" where that flag gives options too.

    Raises:
        ValueError: the run has no config.yaml, or an option was given that cannot change.
    """
    if source or (fixed := sorted(set(options) - {*RESUMABLE})):
        name = source or fixed[0].replace("_", "-")
        raise ValueError(f"--resume {run}: goes on with the run's own options; leave --{name} out, or start a new run")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"--resume {run}: has no config.yaml; give a folder that train.py began, or start a new run")
    config = read_config(run / "config.yaml")
    for given, other in (("epochs", "minutes"), ("minutes", "epochs")):
        if given in options:
            config[other] = None
    return TrainConfig(**config | options | {"out": str(run)})
