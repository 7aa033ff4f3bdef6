"""A frozen backbone: what its head sees of each image is computed once, so that training the head takes seconds; and
the backbone's return to learning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dataset.decoded_images import Data, free_memory
from model.registry import head_name
from model.tensor_preprocessing import normalise
from training import distributed
from training.batchnorm import slow_norms
from training.console import image_progress
from training.evaluation import evaluate
from training.learner import Features, Learner, head_of
from training.optimizers import BACKBONE_RATE
from training.resolve import Plan
from training.schedule import Schedule

log = logging.getLogger(__name__)


def prepare_backbone(learner: Learner, data: Data, plan: Plan, schedule: Schedule, epoch: int) -> float:
    """Sees to it, before an epoch, that a frozen backbone's features are there, or that it learns again.

    Args:
        epoch: how many are done.

    Returns:
        The seconds that the features took, which the schedule leaves out; 0 where none were computed.
    """
    if not learner.frozen:
        return 0.0
    if plan.unfreeze_at and epoch >= plan.unfreeze_at:
        log.info(f"the backbone learns too from here, at {BACKBONE_RATE:g} times the learning rate")
        for parameter in learner.frozen:
            parameter.requires_grad_(True)
        learner.frozen, learner.features = [], None
        learner.slow_norms = [] if plan.hold_norms else slow_norms(learner.network)
        learner.learn_through(learner.network, compiled=plan.compile)
        return 0.0
    if learner.features_tried or not plan.cache_features:
        return 0.0
    learner.features_tried, started = True, time.perf_counter()
    found = compute_features(learner.network, data, learner.scale, plan.flip, amp=plan.amp)
    if isinstance(found, str):
        log.info(f"the backbone sees all images in each epoch: {found}")
        return 0.0
    learner.features, seconds = found, time.perf_counter() - started
    views = "images and mirror images" if plan.flip else "images"
    log.info(f"features of the {views} computed in {seconds:.1f} s")
    schedule.leave_out(seconds)
    learner.learn_through(head_of(learner.network))
    return seconds


def compute_features(
    network: nn.Module,
    data: Data,
    scale: tuple[Tensor, Tensor],
    flip: bool,
    *,
    amp: torch.dtype = torch.float32,
) -> Features | str:
    """The features of the train and val splits; or the reason why there are none to be kept.

    Args:
        scale: mean and std, each (3,), on the network's device.
        flip: whether mirror images are wanted.
        amp: as `evaluate`.
    """
    if reason := _obstacle(network, data, scale, views=1 + flip):
        return reason
    wanted = [(data.train, mirrored) for mirrored in (False, True)[: 1 + flip]] + [(data.val, False)]
    found, total, before = [], sum(len(split) for split, _ in wanted), 0
    with headless(network), image_progress("features") as show:
        for split, mirrored in wanted:

            def progress(done: int, _: int, before: int = before) -> None:
                show(before + done, total)

            found.append(evaluate(network, split, *scale, mirrored=mirrored, progress=progress, amp=amp))
            before += len(split)
    return Features(torch.stack(found[:-1]), found[-1])


@contextmanager
def headless(network: nn.Module) -> Iterator[None]:
    """In the block the network gives what its head would see."""
    name = head_name(network)
    head = network.get_submodule(name)
    network.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        network.set_submodule(name, head)


@torch.no_grad()
def _obstacle(network: nn.Module, data: Data, scale: tuple[Tensor, Tensor], views: int) -> str:
    try:
        head = network.get_submodule(head_name(network))
    except ValueError as error:
        return str(error)
    if not isinstance(head, nn.Linear):
        return "its head is more than a linear layer"
    images = normalise(data.train.crops(slice(0, 2)).to(scale[0].device), *scale)
    logits = network.eval()(images)
    with headless(network):
        seen = network(images)
    if seen.ndim != 2 or not torch.allclose(head(seen), logits, rtol=1e-4, atol=1e-5):
        return "the network goes on after its last layer"
    needed = 4 * seen.shape[1] * (views * len(data.train) + len(data.val))
    # One answer for all processes, which compute the features together.
    (free,) = distributed.from_first(free_memory(distributed.local_world()))
    if needed > free / 2:
        return f"they would take {needed / 1e9:.1f} GB, over half of the free memory"
    return ""
