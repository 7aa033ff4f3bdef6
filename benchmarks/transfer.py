"""What a backbone that was trained on eight classes is worth for two others, of which there are few images.

    python -m benchmarks.transfer --data cifar10-jpeg.tar.xz

The quick recipe trains on the other eight classes of the data for --minutes. Then each way of RUNS gets the same 100
images of each of the two classes (others for each seed), of which a tenth are for validation, and is scored on the
whole test split of the two. Seconds are those of training. Writes benchmarks/results/transfer.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, keep
from benchmarks.training import medians, run
from dataset.loading import read_split

ARCH = "fastnet_small"
IMAGES = 100  # of each of the two classes

WEIGHTS = {"weights": "backbone/model.pt"}
RUNS: dict[str, dict[str, Any]] = {
    "from scratch": {"epochs": 100},
    "from scratch, quick recipe": {"recipe": "quick", "val_fraction": 0.1, "batch_size": 64, "epochs": 100},
    "all of it, from the weights": {**WEIGHTS, "lr": 1e-3, "epochs": 30},
    "head, images augmented anew": {**WEIGHTS, "freeze": True, "cache_features": False, "lr": 0.03, "epochs": 60},
    "head, features cached": {**WEIGHTS, "freeze": True, "lr": 0.03, "epochs": 60},
    "head, unfrozen after 10 of 30": {**WEIGHTS, "freeze": True, "unfreeze_at": 10, "lr": 0.01, "epochs": 30},
}


def write_images(images: Iterable[tuple[str, bytes]], folder: Path) -> None:
    """`images`: label and file."""
    for number, (label, body) in enumerate(images):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number:05}.jpg").write_bytes(body)


def split_classes(data: str, two: list[str], folder: Path) -> dict[str, list[bytes]]:
    """Writes the images of all classes but `two` into FOLDER/eight, and the test images of `two` into FOLDER/two.

    Returns:
        The training images of `two`, by class.
    """
    few: dict[str, list[bytes]] = defaultdict(list)
    for split in ("train", "test"):
        found = [(label, body) for _, label, body in read_split(data, split, val_fraction=0.001)]
        write_images((item for item in found if item[0] not in two), folder / "eight" / split)
        if split == "test":
            write_images((item for item in found if item[0] in two), folder / "two" / split)
            continue
        for label, body in found:
            if label in two:
                few[label].append(body)
    return few


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="32 px images, as train.py's --data (cifar10)")
    parser.add_argument("--classes", default="automobile,truck", help="the two (automobile,truck)")
    parser.add_argument("--minutes", type=float, default=3, help="training of the backbone (3)")
    parser.add_argument("--rounds", type=int, default=3, help="seeds, each with other images (3)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/transfer.json"))
    options = parser.parse_args(arguments)
    two = options.classes.split(",")
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few = split_classes(options.data, two, folder)
        recipe = {"recipe": "quick", "arch": ARCH, "minutes": options.minutes}
        backbone = run({"data": str(folder / "eight"), "out": str(folder / "backbone"), **recipe})
        print(f"{ARCH} on eight classes: {backbone[0]:.2%}, {backbone[1]:.0f} s", flush=True)
        for seed in range(options.rounds):
            data = folder / f"seed{seed}"
            chosen = ((label, b) for label, all_ in few.items() for b in random.Random(seed).sample(all_, IMAGES))
            write_images(chosen, data / "train")
            (data / "test").symlink_to(folder / "two" / "test")
            for name, given in RUNS.items():
                given = {"data": str(data), "out": str(folder / "run"), "arch": ARCH, "seed": seed, **given}
                if "weights" in given:
                    given["weights"] = str(folder / given["weights"])
                results[name].append(run(given))
                print(f"seed {seed}  {name:30} {results[name][-1][0]:.2%}, {results[name][-1][1]:.1f} s", flush=True)
    rows = {name: medians(found) for name, found in results.items()}
    machine = describe("torch", "torchvision", "pillow")
    summary = {"arch": ARCH, "backbone": backbone, "images_of_each": IMAGES, "ways": rows}
    keep(options.json, machine, "results", {options.classes: summary})
    print(json.dumps(machine))
    for name, row in rows.items():
        print(f"{name:30} test top-1 {row['test_accuracy']:.2%}, {row['seconds']:.1f} s (medians of {options.rounds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
