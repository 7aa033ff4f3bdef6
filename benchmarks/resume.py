"""Kills training runs with SIGKILL at random moments, resumes them, and compares them with a run that was never killed.

    python -m benchmarks.resume --kills 20

Every bit of the weights, the optimizer, the moving average, the best epoch and the history must be the same; only
the seconds may differ. Exits with 1 if anything else does.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, save
from model import checkpoint

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = ["--data", "digits", "--epochs", "30", "--batch-size", "64", "--flip", "--jitter", "0.1", "--mixup", "0.2"]
RECIPE += ["--cutmix", "1", "--ema", "0.99", "--clip-grad-norm", "1", "--accumulate", "2", "--device", "cpu"]
PROGRAM = ["train.py"]
TIMES = {"seconds", "data_seconds", "train_seconds", "features_seconds", "images_per_second"}  # what may differ


@dataclass(frozen=True)
class Round:
    """One run that was killed, and what differs from the one that was not."""

    seed: int
    killed_after: list[int]  # completed epochs at each kill
    differences: list[str]


def train(arguments: Sequence[str], kill_after: float | None = None) -> bool:
    """Runs train.py, killed that many seconds after it has read its data; True if it came to its end."""
    command = [sys.executable, *PROGRAM, *arguments]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=PROJECT, env=quiet, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        if kill_after is not None:
            child.stdout.readline()
            time.sleep(kill_after)
            child.kill()
        child.stdout.read()
    return child.returncode == 0


def kill_and_resume(
    out: Path, arguments: Sequence[str], kills: int, moments: random.Random, latest: float = 1.5
) -> list[int]:
    """Trains in `out` with up to `kills` kills, each at most `latest` seconds after the data is read.

    Returns:
        How many epochs were done at each kill.
    """
    killed_after: list[int] = []
    for kill in range(kills + 1):
        begun = (out / "config.yaml").exists()
        options = ["--resume", str(out)] if begun else [*arguments, "--out", str(out)]
        if train(options, moments.uniform(0, latest) if kill < kills else None):
            break
        killed_after.append(checkpoint.load(out / "last.ckpt")["epoch"] if (out / "last.ckpt").exists() else 0)
    return killed_after


def differences(run: Path, other: Path) -> list[str]:
    """What two run folders do not have in common, but for times and their own path."""
    found = _compare("last.ckpt", checkpoint.load(run / "last.ckpt"), checkpoint.load(other / "last.ckpt"))
    for name in ("spec.json", "metrics.json"):
        found += _compare(name, *(json.loads((folder / name).read_text()) for folder in (run, other)))
    histories = [(folder / "history.csv").read_text().splitlines() for folder in (run, other)]
    found += _compare("history.csv", *(list(csv.DictReader(lines)) for lines in histories))
    if (run / "model.pt").read_bytes() != (other / "model.pt").read_bytes():
        found.append("model.pt")
    return found


def _compare(name: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a.keys() - TIMES for line in _compare(f"{name}/{key}", a[key], b[key])]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in _compare(f"{name}/{i}", *pair)]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if a == b else [name]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs in all (20)")
    parser.add_argument("--per-run", type=int, default=5, help="of which so many in each run (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/resume.json"))
    options = parser.parse_args(arguments)
    moments = random.Random(options.seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in itertools.count():
            left = options.kills - sum(len(done.killed_after) for done in rounds)
            if left <= 0:
                break
            recipe, whole, killed = [*RECIPE, "--seed", str(seed)], Path(folder) / f"{seed}", Path(folder) / f"{seed}k"
            assert train([*recipe, "--out", str(whole)])
            killed_after = kill_and_resume(killed, recipe, min(left, options.per_run), moments)
            rounds.append(Round(seed, killed_after, differences(whole, killed)))
            print(f"seed {seed}: killed after epochs {killed_after}", flush=True)
    print("\n| seed | killed after epochs | differs in |\n|---|---|---|")
    for done in rounds:
        print(
            f"| {done.seed} | {', '.join(map(str, done.killed_after))} | {', '.join(done.differences) or 'nothing'} |"
        )
    kills, wrong = sum(len(done.killed_after) for done in rounds), sum(bool(done.differences) for done in rounds)
    print(f"\n{kills} kills in {len(rounds)} runs of {RECIPE[3]} epochs; {wrong} runs differ from the one never killed")
    machine = describe("torch")
    values = {
        "machine": machine,
        "recipe": " ".join(RECIPE),
        "kills": kills,
        "rounds": [asdict(done) for done in rounds],
    }
    save(options.json, values)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
