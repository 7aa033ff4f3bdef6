"""How fast photographs become augmented batches, without a network: ours against torchvision with a DataLoader.

    python -m benchmarks.data_path --data DIR

DIR holds train/CLASS/* and test/CLASS/*. Both sides crop (0.35 to 1 of the area), resize to 224 px and mirror half of
the training images, and give uint8 batches of 32. "cold" is the first epoch of a run with all that comes before it:
decoding, building or opening the store, starting workers; "warm" is the epoch after it. Ours decodes the validation
and test images too, which counts as time and not as images. The ways take turns; the medians are written to
benchmarks/results/data_path.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, keep
from dataset.decoded_images import Split
from dataset.frames import edge_for
from dataset.loading import load
from model import registry
from predictor.spec import PixelRule
from training.ahead import Ahead
from training.epoch import shuffled
from training.learner import Learner, make_learner
from training.options import TrainOptions
from training.randomness import order_generator, step_generator
from training.resolve import Plan, resolve, resolve_reading
from training.step import make_batch

SIZE, BATCH, SCALE = 224, 32, 0.35
WORKERS = 2  # of the DataLoader; as many threads as cores are ours


def epoch(learner: Learner, split: Split, plan: Plan, number: int) -> Iterator[int]:
    """The images of each batch of an epoch, as `training.epoch.train_epoch` makes them."""
    batches = shuffled(order_generator(plan.seed, number), split.targets, plan)
    ahead = Ahead(learner, split, batches, plan, number)
    for step, indices in enumerate(batches):
        random = step_generator(plan.seed, number, step)
        batch = make_batch(learner, split, indices, plan, random, boxes=ahead.boxes(step))
        ahead.prepare(step)
        yield len(batch.targets) - 1


def prepared(data: Path, store: str, arch: str = "simplecnn") -> tuple[Learner, Split, Plan]:
    """A network of random weights, the training images, with their frames where --store says, and the plan."""
    given: dict[str, Any] = {"size": SIZE, "batch_size": BATCH, "crop_scale": SCALE, "device": "cpu"}
    given |= {"amp": "auto", "channels_last": True}  # as for photographs
    options = TrainOptions(data=str(data), out="", arch=arch, **given)
    rule = PixelRule.square(SIZE)
    reading = resolve_reading(options)
    kept: dict[str, Any] = {"edge": edge_for((SIZE, SIZE), rule), "store": store, "workers": reading.workers}
    split = load(str(data), rule=rule, **kept, say=lambda line: None).train
    plan = resolve(options, reading, images=len(split), flips=True, device=torch.device("cpu"))
    scale = torch.zeros(3), torch.ones(3)
    network = registry.build(arch, int(split.targets.max()) + 1, SIZE)
    return make_learner(network, scale, plan, split.targets), split, plan


def ours(data: Path, store: str) -> Iterator[Iterable[int]]:
    """Two epochs, with the frames where --store says."""
    learner, split, plan = prepared(data, store)
    for number in range(2):
        yield epoch(learner, split, plan, number)


def torchvisions(data: Path) -> Iterator[Iterable[int]]:
    """Two epochs of ImageFolder and transforms v2."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(SIZE, scale=(SCALE, 1.0)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    images = ImageFolder(str(data / "train"), v2.Compose(steps))
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    for _ in range(2):
        yield (len(batch) for batch, _ in loader)


def rates(epochs: Iterator[Iterable[int]]) -> dict[str, float]:
    """Images/s of the first epoch and of the second."""
    found = {}
    for name in ("cold", "warm"):
        started = time.perf_counter()
        images = sum(next(epochs))
        found[name] = images / (time.perf_counter() - started)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/data_path.json"))
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as store:
            for name, epochs in (
                ("ours, in memory", ours(options.data, "memory")),
                ("torchvision, DataLoader", torchvisions(options.data)),
                ("ours, store being built", ours(options.data, store)),
                ("ours, store found", ours(options.data, store)),
            ):
                found.setdefault(name, []).append(rates(epochs))
                print(name, {key: round(value) for key, value in found[name][-1].items()}, flush=True)
    rows: dict[str, Any] = {
        name: {kind: statistics.median(row[kind] for row in rounds) for kind in ("cold", "warm")}
        for name, rounds in found.items()
    }
    keep(options.json, describe("torch", "torchvision", "pillow"), "images_per_second", rows)
    for name, row in rows.items():
        print(f"{name:26} {row['cold']:6.0f} cold {row['warm']:6.0f} warm, images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
