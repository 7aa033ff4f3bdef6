"""What a run begins with: the images, the weights to start from, the network before its first step."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from dataset.decoded_images import Data, on_device
from dataset.frames import edge_for
from dataset.loading import load
from dataset.sources import BUILT_IN, Source
from model import registry
from model.registry import Pretrained
from training import distributed
from training.console import image_progress
from training.memory import keep_freed
from training.options import LARGE_SIZE, TrainOptions, flag
from training.resolve import Plan, Reading, size_of

log = logging.getLogger(__name__)


def check_weights(options: TrainOptions) -> None:
    """
    Raises:
        ValueError: an option is about trained weights, and there are none.
    """
    for name in ("freeze", "freeze_first", "head_first", "hold_norms"):
        if getattr(options, name) and not (options.pretrained or options.weights):
            raise ValueError(
                f"{flag(name)}: without trained weights the head would learn from random features; "
                f"pass --pretrained or --weights FILE, or leave {flag(name)} out"
            )


def read_weights(options: TrainOptions) -> Pretrained | None:
    """The weights to start from: those of a file, else the published ones if wanted, else none.

    Raises:
        ValueError: they cannot be had, or do not fit the architecture.
    """
    arch, file = options.arch, Path(options.weights) if options.weights else None
    if not (options.pretrained or file):
        return None
    registry.check_name(arch)
    network = registry.build(arch, 2, *size_of(options, registry.own_rule(arch, file)))
    with nullcontext() if file else distributed.first_alone():  # they may be downloaded
        pretrained = registry.read_pretrained(arch, file)
    registry.load_pretrained(network, arch, pretrained)
    return pretrained


def make_network(
    plan: Plan, data: Data, pretrained: Pretrained | None
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The network on its device, with trained weights where there are some, and the mean and std that its pixels need.

    The seed decides its random weights, and from here on what dropout draws.
    """
    if plan.device.type == "cpu" and max(plan.size) < LARGE_SIZE:  # else memory is dear, and a step long
        keep_freed()
    torch.manual_seed(plan.seed)
    network = registry.build(plan.arch, len(data.labels), *plan.size)
    if pretrained:
        fresh = registry.load_pretrained(network, plan.arch, pretrained)
        log.info(f"weights: {pretrained.source}; from scratch: {', '.join(fresh) or 'nothing'}")
    network.to(plan.device)
    if distributed.rank() > 0:
        torch.manual_seed(plan.seed + distributed.rank())  # dropout draws differently in each process
    return network, plan.mean, plan.std


def read_data(
    options: TrainOptions, reading: Reading, known: dict[str, str] | None = None, source: Source | None = None
) -> Data:
    """The images, decoded; see dataset.loading.load."""
    out = Path(options.out).absolute()
    alone = distributed.first_alone() if options.data in BUILT_IN else nullcontext()  # it may be downloaded
    with alone, image_progress("reading") as progress:
        return load(
            options.data,
            source=source,
            rule=reading.rule,
            val_fraction=options.val_fraction,
            test_fraction=options.test_fraction,
            split_seed=options.split_seed,
            skip_bad=options.skip_bad,
            workers=reading.workers,
            download_dir=options.download_dir,
            edge=edge_for(reading.train_size, reading.rule) if options.crop_scale else None,
            store=options.store,
            scratch=next(folder for folder in (out, *out.parents) if folder.is_dir()),
            processes=distributed.local_world(),
            known=known,
            say=log.info,
            progress=progress,
        )


def near(device: torch.device, data: Data) -> Data:
    """The data with its images on the GPU, if there is room; the training images where it copies from at once, if they
    are whole frames."""
    if device.type == "cuda" and data.train.frames:
        data.train.frames.pin()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return on_device(data, device, free)
