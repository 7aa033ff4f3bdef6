"""Fine-tuning as a user of fastai writes it: `vision_learner` and `fine_tune`, with its own head and its defaults.

    .venv-peers/bin/python -m benchmarks.photographs.fastai_script --data DIR --minutes 3 --out predictions.npz

The network and its ImageNet weights are those of the other scripts. What is known to help is in: BatchNorm of the body
keeps its statistics (as fastai's `BnFreeze` does for layers that do not learn), bfloat16 and channels-last memory,
images decoded once, no workers that would compete for the same cores. One epoch trains the head; the number of those
that follow is what --minutes has time for, by the measured seconds of a batch, and at least one.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    ChannelsLast,
    DataBlock,
    DataLoaders,
    FlipItem,
    IntToFloatTensor,
    Learner,
    Normalize,
    PILImage,
    RandomResizedCrop,
    TrainEvalCallback,
    TransformBlock,
    parent_label,
    set_seed,
    vision_learner,
)
from torch import nn

from benchmarks.photographs.shared import ARCH, KEPT, Task, autocast, load_pretrained, parse, read_image

SIZE = 160  # px
BATCH = 32  # images
TIMED = 4  # batches, after one to warm up
RESERVE = 0.95  # of the time left, so that an epoch that is a little slower still ends within it


class HoldBatchNorm(Callback):
    """The body's BatchNorm keeps ImageNet's statistics; its scale and shift learn."""

    run_after = TrainEvalCallback

    def before_train(self) -> None:
        for module in self.model[0].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def load_images(task: Task) -> DataLoaders:
    """All training images, none of them held out. Test images, read later, get what `RandomResizedCrop` does to
    validation images: squashed to a square that is 14% larger, of which the centre is taken."""

    kept: dict[Path, PILImage] = {path: PILImage.create(read_image(path, KEPT)) for path in task.images}

    def read(path: Path) -> PILImage:
        return kept[path] if path in kept else PILImage.create(read_image(path))

    block = DataBlock(
        blocks=(TransformBlock(type_tfms=read, batch_tfms=IntToFloatTensor), CategoryBlock(vocab=task.labels)),
        splitter=lambda items: (range(len(items)), []),
        get_y=parent_label,
        item_tfms=[RandomResizedCrop(SIZE, min_scale=0.35), FlipItem()],
        batch_tfms=[Normalize.from_stats([0.5] * 3, [0.5] * 3)],
    )
    return block.dataloaders(task.images, bs=min(BATCH, len(task.images)), num_workers=0, device="cpu")


def seconds_of_batch(learner: Learner) -> float:
    """Of a training step of the whole network, measured on a copy that is thrown away."""
    network = copy.deepcopy(learner.model).train().to(memory_format=torch.channels_last)
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0)
    batches = iter(learner.dls.train)
    for number in range(1 + TIMED):
        if number == 1:
            started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            batches = iter(learner.dls.train)
            batch = next(batches)
        with autocast():
            loss = learner.loss_func(network(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / TIMED


def main(arguments: Sequence[str] | None = None) -> int:
    task = parse(__doc__, arguments)
    set_seed(task.seed)
    warnings.filterwarnings("ignore", category=FutureWarning)  # fastai's own, about torch.cuda.amp
    learner = vision_learner(load_images(task), ARCH, pretrained=False, cbs=[HoldBatchNorm(), ChannelsLast()])
    load_pretrained(learner.model[0].model)
    epoch = len(learner.dls.train) * seconds_of_batch(learner)
    # The epoch of the head costs the forward pass alone, which is about a third of a step; half is on the safe side.
    epochs = max(1, int(RESERVE * (task.budget - task.seconds) / epoch - 0.5))
    with learner.no_bar(), learner.no_logging(), autocast():
        learner.fine_tune(epochs)
    seconds = task.seconds
    test = learner.dls.test_dl(task.test, bs=BATCH, num_workers=0)
    with learner.no_bar():
        probabilities, _ = learner.get_preds(dl=test)
    task.save(probabilities.numpy(), seconds, epochs=1 + epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
