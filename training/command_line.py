"""The command line of train.py: what is to be done, and one flag for each option of training/options.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.evaluation import SPLITS
from training.options import (
    TrainOptions,
    add_options,
    flag,
    make_options,
    option_names,
    resumable,
    resumed_options,
)


def parse(arguments: Sequence[str] | None, description: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What is to be done, and the options that are given."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list-archs",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="print the names that --arch takes, and stop; 'timm/*' or 'timm/*vit*': those of timm's 1,200",
    )
    parser.add_argument("--list-recipes", action="store_true", help="print what --recipe takes, and stop")
    parser.add_argument("--recipe", metavar="NAME", help="a set of options (--list-recipes); flags override it")
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    changeable = ", ".join(map(flag, resumable()))
    parser.add_argument("--resume", metavar="RUN", type=Path, help=f"go on with a run; only {changeable} may be new")
    parser.add_argument(
        "--evaluate", metavar="RUN", type=Path, help="score a run on --data; --out FILE.json keeps the result"
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="what to evaluate (default: unseen, all but what the run was trained and validated on)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON, in the last line")
    add_options(parser)
    parsed = vars(parser.parse_args(arguments))
    given = {name: parsed.pop(name) for name in option_names() if name in parsed}
    return argparse.Namespace(**parsed), given


def check_flags(command: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: flags that do not go together.
    """
    if command.evaluate:
        if other := [name for name in ("resume", "config", "recipe", "overwrite") if getattr(command, name)]:
            raise ValueError(f"--evaluate {command.evaluate}: trains nothing; leave --{other[0]} out")
    elif command.split:
        raise ValueError("--split: belongs to --evaluate RUN; --val-fraction and --test-fraction cut the data")
    elif command.resume and command.overwrite:
        raise ValueError(f"--resume {command.resume}: goes on with the run that is there; leave --overwrite out")


def training_options(command: argparse.Namespace, given: dict[str, Any]) -> TrainOptions:
    """The options of the training that is asked for: of a run that goes on, or of a new one.

    Raises:
        ValueError: as `resumed_options` and `make_options`.
    """
    if command.resume:
        source = "config" if command.config else "recipe" if command.recipe else None
        return resumed_options(command.resume, source, given)
    return make_options(command.config, given, command.recipe)
