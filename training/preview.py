"""The first batch of a run as the network sees it, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from dataset.decoded_images import Split
from training.ahead import draw_boxes
from training.epoch import shuffled
from training.learner import Learner
from training.randomness import order_generator, step_generator
from training.resolve import Plan
from training.step import make_batch

SHOWN = 32  # images at the most


def first_batch(learner: Learner, split: Split, plan: Plan, labels: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The first images of the run's first batch, augmented and mixed, and a caption for each.

    Where features of a frozen backbone are cached, these are the images that they stand for; with `--unfreeze-at`, as
    they are augmented afterwards.

    Returns:
        uint8 (n, H, W, 3), on the CPU; the captions are labels, two with their shares where images are mixed.
    """
    fresh = replace(learner, features=None)
    indices = shuffled(order_generator(plan.seed, 0), split.targets, plan)[0]
    rows = torch.arange(-1, min(SHOWN, len(indices))) % len(indices)  # with the neighbour in front
    boxes = draw_boxes(split, indices, rows, plan, 0, 0)
    batch = make_batch(fresh, split, indices, plan, step_generator(plan.seed, 0, 0), rows, boxes)
    names = [labels[target] for target in batch.targets.tolist()]
    if not batch.mix:
        return batch.inputs[1:].cpu(), names[1:]
    pixels = batch.inputs.permute(0, 3, 1, 2).float()
    mixed = batch.mix(pixels[1:], pixels[:-1]).round().to(torch.uint8).permute(0, 2, 3, 1)
    kept = batch.mix.kept
    captions = [own if own == other else f"{own} {kept:.0%}, {other} {1 - kept:.0%}" for other, own in pairwise(names)]
    return mixed.cpu(), captions
