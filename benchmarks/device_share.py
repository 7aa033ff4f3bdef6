"""How much of training is the network's own time: the training loop against the same steps on batches that are ready.

    python -m benchmarks.device_share --data DIR

DIR is as for benchmarks.data_path: photographs, of which both networks get random crops of 224 px, in batches of 32,
with random weights, on the CPU, in bfloat16 where it can. The loop cuts its crops out of frames in memory, ahead of
each step, as train.py does; its share is the time that the same steps take without that, divided by its own. Both take
turns, and the medians are written to benchmarks/results/device_share.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.data_path import BATCH, prepared
from benchmarks.machine import describe, keep
from dataset.decoded_images import Split
from model.registry import train_mode
from training.ahead import Ahead
from training.epoch import shuffled
from training.learner import Learner
from training.randomness import order_generator, step_generator
from training.resolve import Plan
from training.step import Batch, make_batch, train_step

ARCHS = ("timm/tf_efficientnet_lite0", "resnet18")


def loop(learner: Learner, split: Split, plan: Plan, batches: Sequence[Tensor], number: int) -> list[Batch]:
    """The steps of `training.epoch.train_epoch`; returns the batches."""
    ahead, made = Ahead(learner, split, batches, plan, number), []
    for step, indices in enumerate(batches):
        random = step_generator(plan.seed, number, step)
        made.append(make_batch(learner, split, indices, plan, random, boxes=ahead.boxes(step)))
        ahead.prepare(step)
        train_step(learner, made[-1], plan)
    return made


def compare(data: Path, arch: str, rounds: int, steps: int) -> dict[str, float]:
    """Medians: images/s of the loop and of ready batches, and the loop's share."""
    learner, split, plan = prepared(data, "memory", arch)
    train_mode(learner.network, hold_norms=plan.hold_norms)
    loop(learner, split, plan, shuffled(order_generator(plan.seed, 0), split.targets, plan)[:2], 0)  # to warm up
    rows = []
    for number in range(1, rounds + 1):
        batches = shuffled(order_generator(plan.seed, number), split.targets, plan)[:steps]
        started = time.perf_counter()
        ready = loop(learner, split, plan, batches, number)
        between = time.perf_counter()
        for batch in ready:
            train_step(learner, batch, plan)
        seconds, alone = between - started, time.perf_counter() - between
        images = BATCH * len(batches)
        rows.append({"loop": images / seconds, "ready": images / alone, "share": alone / seconds})
        print(arch, {key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--steps", type=int, default=20, help="of a round (20)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/device_share.json"))
    options = parser.parse_args(arguments)
    rows = {arch: compare(options.data, arch, options.rounds, options.steps) for arch in ARCHS}
    keep(options.json, describe("torch", "torchvision", "timm", "pillow"), "images_per_second", rows)
    for arch, row in rows.items():
        print(f"{arch:28} {row['loop']:.1f} images/s, {row['ready']:.1f} on ready batches: share {row['share']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
