"""Trains simplecnn with our trainer and with the classic recipe, in turns, on the same pictures and the same machine.

    python -m benchmarks.training --data ../shared/data/cifar10-jpeg.tar.xz --rounds 3

The classic recipe is the one of the tutorials: pictures augmented one by one (flip, padded crop) in a DataLoader, Adam
at 1e-3, batches of 32, 10 epochs, the last weights. Both are scored on the test split; seconds are those of training,
without reading the data, which both share.
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

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import describe
from model import architectures
from model.files import write_text
from train import train
from training import data as training_data
from training.config import TrainConfig
from training.loop import evaluate

MEAN, STD = architectures.IMAGENET_MEAN, architectures.IMAGENET_STD


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Pictures as PIL images, augmented when they are asked for."""

    def __init__(self, split: training_data.Split) -> None:
        self.pictures = [Image.fromarray(crop.numpy()) for crop in split.crops(slice(None))]
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

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[place]), self.targets[place]


def classic(data: training_data.Data, seed: int, epochs: int) -> tuple[float, float]:
    """Test accuracy and seconds of the classic recipe."""
    torch.manual_seed(seed)
    dataset = OneByOne(data.train)
    network = architectures.build("simplecnn", len(data.labels), 32)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    started = time.perf_counter()
    loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=os.cpu_count() or 1, persistent_workers=True)
    for _ in range(epochs):
        for pictures, targets in loader:
            loss = nn.functional.cross_entropy(network(pictures), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    logits = evaluate(network, data.test, torch.tensor(MEAN), torch.tensor(STD))
    return float((logits.argmax(dim=1) == data.test.targets).float().mean()), seconds


def ours(source: str, seed: int, epochs: int) -> tuple[float, float]:
    """Test accuracy and seconds of `train.py` with its defaults."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        metrics = train(TrainConfig(data=source, out=out, epochs=epochs, seed=seed))
    return metrics["test"]["accuracy"], metrics["train"]["seconds"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="32 px pictures, as train.py's --data (cifar10)")
    parser.add_argument("--rounds", type=int, default=3, help="seeds; the two take turns (3)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/training.json"))
    options = parser.parse_args(arguments)
    data = training_data.load(options.data, size=32, resize=32)
    results: dict[str, list[tuple[float, float]]] = {"classic": [], "train.py": []}
    for seed in range(options.rounds):
        results["classic"].append(classic(data, seed, options.epochs))
        results["train.py"].append(ours(options.data, seed, options.epochs))
        print(f"seed {seed}:", {name: runs[-1] for name, runs in results.items()}, flush=True)
    rows: dict[str, Any] = {
        name: {
            "test_accuracy": statistics.median(accuracy for accuracy, _ in runs),
            "seconds": statistics.median(seconds for _, seconds in runs),
            "runs": runs,
        }
        for name, runs in results.items()
    }
    machine = describe("torch", "torchvision", "pillow")
    write_text(options.json, json.dumps({"machine": machine, "results": rows}, indent=2) + "\n")
    print(json.dumps(machine))
    for name, row in rows.items():
        print(f"{name:9} test top-1 {row['test_accuracy']:.2%}, {row['seconds']:.0f} s (medians of {options.rounds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
