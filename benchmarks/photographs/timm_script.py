"""Fine-tuning as a user of timm writes it: timm's transforms, optimizer and schedule around a plain loop.

    python -m benchmarks.photographs.timm_script --data DIR --minutes 3 --out predictions.npz

What is known to help is in: a head that begins as a logistic regression on the network's features, BatchNorm that keeps
ImageNet's statistics, lower rates for earlier layers, training at 160 px and testing at 192 px (Touvron et al. 2019,
"Fixing the train-test resolution discrepancy"), bfloat16 where the processor has it, images decoded once, no workers
that would compete for the same cores, and a schedule by elapsed time that ends with --minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.photographs.shared import (
    ARCH,
    KEPT,
    Task,
    Transform,
    autocast,
    fit_head,
    forward_all,
    load_head,
    load_pretrained,
    parse,
    read_image,
)

TRAIN_SIZE, TEST_SIZE = 160, 192  # px
BATCH = 32  # images
LR, LAYER_DECAY, WEIGHT_DECAY = 1e-3, 0.9, 0.01  # LR is the head's; each layer below has LAYER_DECAY of the next one's
TICKS = 10_000  # of the schedule, whatever the number of steps
WARMUP = 0.1  # share of the run


class Photographs(Dataset[tuple[Tensor, int]]):
    """Decoded images, augmented anew each time."""

    def __init__(self, images: Sequence[Image.Image], targets: Sequence[int], transform: Transform) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def fine_tune(network: nn.Module, loader: DataLoader[tuple[Tensor, int]], task: Task) -> int:
    """Trains until `task.budget` is over; returns the number of steps."""
    optimizer = create_optimizer_v2(network, "adamw", lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY)
    schedule = CosineLRScheduler(optimizer, TICKS, warmup_t=round(WARMUP * TICKS), t_in_epochs=False)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # keeps its statistics; scale and shift still learn
    begun, steps = task.seconds, 0
    while True:
        for images, targets in loader:
            if task.seconds >= task.budget:
                return steps
            schedule.step_update(round(TICKS * (task.seconds - begun) / (task.budget - begun)))
            with autocast():
                logits = network(images.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1


def main(arguments: Sequence[str] | None = None) -> int:
    task = parse(__doc__, arguments)
    network: Any = load_pretrained(timm.create_model(ARCH, num_classes=0))
    rule = resolve_data_config(model=network)
    look = create_transform(**rule | {"input_size": (3, TEST_SIZE, TEST_SIZE)})
    augment = create_transform(
        **rule | {"input_size": (3, TRAIN_SIZE, TRAIN_SIZE)}, is_training=True, scale=(0.35, 1), color_jitter=0
    )
    images = [read_image(path, KEPT) for path in task.images]
    regression = fit_head([forward_all(network, images, look).numpy()], task.targets, task.seed)
    network.reset_classifier(len(task.labels))
    load_head(network.get_classifier(), regression)
    photographs = Photographs(images, task.targets, augment)
    steps = fine_tune(network, DataLoader(photographs, BATCH, shuffle=True, drop_last=len(images) > BATCH), task)
    seconds = task.seconds
    probabilities = forward_all(network, task.test, look).softmax(dim=1).numpy()
    task.save(probabilities, seconds, epochs=steps * BATCH / len(images), c=regression.C)
    return 0


if __name__ == "__main__":
    sys.exit(main())
