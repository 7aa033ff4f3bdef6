"""What --balance is worth where the classes are of very unequal size.

    python -m benchmarks.balance --data cifar10-jpeg.tar.xz

Thins the training images of the data, class after class, so that the last has a --ratio th of the first's, in equal
factors (Cui et al. 2019, arXiv:1901.05555); which images stay is drawn anew for each seed. The quick recipe trains on
them for --epochs, in turns with each --balance. All are scored on the whole test split: if its classes are of equal
size, as CIFAR-10's are, accuracy is macro recall. Writes benchmarks/results/balance.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe, keep
from benchmarks.training import medians, run
from benchmarks.transfer import write_images
from dataset.loading import read_split

BALANCES = ("none", "loss", "sampler")


def thin(images: dict[str, list[bytes]], ratio: float, seed: int) -> list[tuple[str, bytes]]:
    """Some of the images of each class, in equal factors from all of the first to a `ratio`th of the last's."""
    chance, kept = random.Random(seed), []
    for number, (label, bodies) in enumerate(sorted(images.items())):
        share = ratio ** (-number / (len(images) - 1))
        kept += [(label, body) for body in chance.sample(bodies, max(1, round(len(bodies) * share)))]
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="32 px images, as train.py's --data (cifar10)")
    parser.add_argument("--ratio", type=float, default=50, help="of the largest class to the smallest (50)")
    parser.add_argument("--epochs", type=int, default=10, help="of each training (10)")
    parser.add_argument("--rounds", type=int, default=3, help="seeds; all take turns in each (3)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/balance.json"))
    options = parser.parse_args(arguments)
    results: dict[str, list[tuple[float, float]]] = {balance: [] for balance in BALANCES}
    images: dict[str, list[bytes]] = defaultdict(list)
    for _, label, body in read_split(options.data, "train", val_fraction=0.001):
        images[label].append(body)
    with tempfile.TemporaryDirectory() as temporary:
        test = [(label, body) for _, label, body in read_split(options.data, "test")]
        write_images(test, Path(temporary) / "test")
        for seed in range(options.rounds):
            data = Path(temporary) / f"seed{seed}"
            write_images(thin(images, options.ratio, seed), data / "train")
            (data / "test").symlink_to(Path(temporary) / "test")
            given = {"data": str(data), "out": f"{temporary}/run", "seed": seed, "recipe": "quick", "val_fraction": 0.1}
            for balance in BALANCES:
                results[balance].append(run({**given, "balance": balance, "epochs": options.epochs}))
                recall, seconds = results[balance][-1]
                print(f"seed {seed}  --balance {balance:8} macro recall {recall:.2%}, {seconds:.0f} s", flush=True)
    rows = {f"--balance {balance}": medians(found) for balance, found in results.items()}
    machine = describe("torch", "torchvision", "pillow")
    keep(options.json, machine, f"1:{options.ratio:g}, {options.epochs} epochs, seeds: {options.rounds}", rows)
    print(json.dumps(machine))
    for name, row in rows.items():
        print(f"{name:20} macro recall {row['test_accuracy']:.2%}, {row['seconds']:.0f} s (medians)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
