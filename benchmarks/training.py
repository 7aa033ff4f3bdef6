"""Trains with our trainer and with the classic recipe, in turns, on the same images and the same machine.

    python -m benchmarks.training --data cifar10-jpeg.tar.xz
    python -m benchmarks.training --data cifar10-jpeg.tar.xz --rounds 2 --ablate

The classic recipe is the one of the tutorials: simplecnn, images augmented one by one (flip, padded crop) in a
DataLoader, Adam at 1e-3, batches of 32, 10 epochs, the last weights. The CIFAR ResNet-18 is torchvision's with a first
layer for 32 px, trained as such networks mostly are: SGD, warm-up, cosine. All are scored on the test split, one view
of each image; seconds are those of training, without reading the data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import describe, keep
from dataset.decoded_images import Data, Split
from dataset.loading import load
from model import registry
from predictor.spec import PixelRule
from train import train
from training.evaluation import evaluate
from training.memory import keep_freed
from training.options import make_options
from training.resolve import pick_device

MEAN, STD = registry.IMAGENET_MEAN, registry.IMAGENET_STD


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Images as PIL images, augmented when they are asked for."""

    def __init__(self, split: Split) -> None:
        self.images = [Image.fromarray(crop.numpy()) for crop in split.crops(slice(None))]
        self.targets = split.targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def classic(data: Data | None, seed: int, epochs: int, device: torch.device) -> tuple[float, float]:
    """Test accuracy and seconds of the classic recipe."""
    assert data
    torch.manual_seed(seed)
    dataset = OneByOne(data.train)
    network = registry.build("simplecnn", len(data.labels), 32).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    started = time.perf_counter()
    loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=os.cpu_count() or 1, persistent_workers=True)
    for _ in range(epochs):
        for images, targets in loader:
            loss = nn.functional.cross_entropy(network(images.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    logits = evaluate(network, data.test, torch.tensor(MEAN, device=device), torch.tensor(STD, device=device))
    return float((logits.argmax(dim=1) == data.test.targets).float().mean()), seconds


def ours(source: str, seed: int, options: dict[str, Any]) -> tuple[float, float]:
    """As `run`, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as out:
        return run({"data": source, "out": out, "seed": seed, **options})


def run(options: dict[str, Any]) -> tuple[float, float]:
    """Test accuracy and seconds of `train.py`, with its defaults but for `options`; `recipe` and `without` are some."""
    options = dict(options)
    recipe, without = options.pop("recipe", None), options.pop("without", {})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as changed:
        for part, other in without.items():
            changed.enter_context(patch(part, other))
        metrics = train(make_options(None, options, recipe), overwrite=True)
    return metrics["test"]["accuracy"], metrics["train"]["seconds"]


def cifar_resnet18(arch: str, classes: int, size: int, width: int | None) -> nn.Module:
    """In the place of `registry._build`: ResNet-18 with a first layer for 32 px, 3×3 without stride or pooling."""
    network = torchvision.models.resnet18(num_classes=classes)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


RESNET: dict[str, Any] = {
    "arch": "resnet18",
    "size": 32,
    "val_fraction": 0.02,
    "without": {"model.registry._build": cifar_resnet18},
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "warmup": 0.2,
    "batch_size": 128,
    "amp": "auto",
    "channels_last": True,
}

RUNS: dict[str, dict[str, Any]] = {
    "train.py": {},
    "quick 3 minutes": {"recipe": "quick", "minutes": 3.0},
    "fast 10 minutes": {"recipe": "fast", "minutes": 10.0},
    "resnet18 10 minutes": {"arch": "resnet18", "size": 32, "minutes": 10.0},
    "CIFAR ResNet-18 3 minutes": RESNET | {"minutes": 3.0},
    "CIFAR ResNet-18 10 minutes": RESNET | {"minutes": 10.0},
}
ON_A_GPU = {"CIFAR ResNet-18 30 seconds": RESNET | {"minutes": 0.5}}  # only if it is named

# One change each, of the quick recipe.
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "AdamW instead of Muon": {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01, "warmup": 0.05},
    "SGD instead of Muon": {"optimizer": "sgd", "lr": 0.4, "momentum": 0.85, "weight_decay": 5e-4, "warmup": 0.2},
    "float32 instead of bfloat16": {"amp": "off"},
    "channels first": {"channels_last": False},
    "no label smoothing": {"label_smoothing": 0.0},
    "batches of 256": {"batch_size": 256, "lr": 0.085},
    "shifts of 4 px": {"crop_padding": 4},
    "cosine schedule": {"schedule": "cosine"},
    "EMA of 0.99": {"ema": 0.99},
    "the wide network": {"arch": "fastnet"},
}


def medians(runs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of test accuracy and seconds, and what they are of."""
    accuracy, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
    return {"test_accuracy": accuracy, "seconds": seconds, "runs": runs}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="32 px images, as train.py's --data (cifar10)")
    parser.add_argument("--rounds", type=int, default=3, help="seeds; all take turns in each (3)")
    parser.add_argument("--only", help=f"of {', '.join(('classic', *RUNS, *ON_A_GPU))}; separated by commas")
    parser.add_argument("--ablate", action="store_true", help="what each part of the recipe is worth")
    parser.add_argument("--minutes", type=float, default=1.5, help="of each of these (1.5)")
    parser.add_argument("--epochs", type=int, help="of each of these instead, however long they take")
    parser.add_argument("--device", default="auto", help="as train.py's (auto)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/training.json"))
    options = parser.parse_args(arguments)
    keep_freed()  # as train.py does, so that the classic recipe has it too
    device, runs, part = pick_device(options.device), RUNS | ON_A_GPU, "results"
    if options.ablate:
        unit = "epochs" if options.epochs else "minutes"
        length = getattr(options, unit)
        runs = {name: {"recipe": "quick", unit: length} | change for name, change in ABLATIONS.items()}
        part = f"ablations, {length:g} {unit}"
    wanted = options.only.split(",") if options.only else [*runs] if options.ablate else ["classic", *RUNS]
    if unknown := sorted(set(wanted) - {"classic", *runs}):
        parser.error(f"--only: nothing is called {unknown[0]!r}; there are {', '.join(('classic', *runs))}")
    data = load(options.data, rule=PixelRule.square(32), workers=os.cpu_count() or 1) if "classic" in wanted else None
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted}
    machine = describe("torch", "torchvision", "pillow")
    for seed in range(options.rounds):
        for name in wanted:
            if name == "classic":
                found = classic(data, seed, 10, device)
            else:
                found = ours(options.data, seed, {**runs[name], "device": str(device)})
            results[name].append(found)
            print(f"seed {seed}  {name:28} {found[0]:.2%}, {found[1]:.0f} s", flush=True)
            rows = {name: medians(found) for name, found in results.items() if found}
            keep(options.json, machine, part, rows)  # now: all takes hours
    print(json.dumps(machine))
    for name, shown in rows.items():
        accuracy, seconds = shown["test_accuracy"], shown["seconds"]
        print(f"{name:28} test top-1 {accuracy:.2%}, {seconds:.0f} s (medians of {options.rounds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
