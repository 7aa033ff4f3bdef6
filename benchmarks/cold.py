"""From images on the disk to a saved state_dict, each time in a new process: what a user waits for.

    python -m benchmarks.cold --data cifar10-jpeg.tar.xz --rounds 3 --epochs 10,40

The clock starts with the process and stops when model.pt is there; the evaluation and the report come after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep

PROJECT = Path(__file__).resolve().parent.parent


def run(arguments: Sequence[str]) -> dict[str, float]:
    """Test accuracy of one view, and seconds: of all until model.pt, of training, of reading the data."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROJECT / "train.py"), *arguments, "--json", "--out", folder]
        started = time.time()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = (Path(folder) / "model.pt").stat().st_mtime - started
    summary = json.loads(done.stdout.splitlines()[-1])
    trained = summary["train"]
    return {
        "test_accuracy": summary["test"]["accuracy"],
        "seconds": seconds,
        "training_seconds": trained["seconds"],
        "data_seconds": trained["data_seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="32 px images, as train.py's --data")
    parser.add_argument("--recipe", default="fast", help="as train.py's (fast)")
    parser.add_argument("--epochs", default="10,40", help="of the runs, separated by commas (10,40)")
    parser.add_argument("--rounds", type=int, default=3, help="seeds (3)")
    parser.add_argument("--device", default="auto", help="as train.py's (auto)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cold.json"))
    options = parser.parse_args(arguments)
    machine = describe("torch", "torchvision", "pillow")
    rows: dict[str, Any] = {}
    for seed in range(options.rounds):
        for epochs in options.epochs.split(","):
            name = f"{options.recipe}, {epochs} epochs"
            given = ["--data", options.data, "--recipe", options.recipe, "--epochs", epochs, "--device", options.device]
            found = run([*given, "--seed", str(seed)])
            rows.setdefault(name, {"runs": []})["runs"].append(found)
            for key in found:
                rows[name][key] = statistics.median(one[key] for one in rows[name]["runs"])
            print(f"seed {seed}  {name:20} {found['test_accuracy']:.2%}, {found['seconds']:.1f} s", flush=True)
            keep(options.json, machine, "results", rows)
    for name, row in rows.items():
        print(
            f"{name:20} test top-1 {row['test_accuracy']:.2%}, {row['seconds']:.1f} s, of which training "
            f"{row['training_seconds']:.1f} s, reading {row['data_seconds']:.1f} s (medians of {options.rounds})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
