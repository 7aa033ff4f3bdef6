"""The head of a network with trained weights, fitted before the first epoch: a multinomial logistic regression on what
the weights see of each image.

It takes seconds once the features are there, and is the first result of the run: an epoch is only kept if it is better.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dataset.decoded_images import Data
from training import distributed
from training.balance import class_weights
from training.epoch import history_row
from training.freezing import compute_features
from training.learner import Learner, head_of
from training.metrics import score
from training.resolve import Plan
from training.schedule import Schedule

# L2 penalties of the weights: from a head that hardly tells classes apart to one that knows all images by heart.
PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
ITERATIONS = 100  # of L-BFGS for each penalty, which begins where the one before has ended

log = logging.getLogger(__name__)


def fit_head(
    learner: Learner, data: Data, plan: Plan, schedule: Schedule
) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Fits the head, with the penalty that gives the lowest loss on val.

    With `--balance` every class counts the same.

    Returns:
        The history's row, of epoch 0, and the `score` of val. None for a network that goes on after its last layer, or
        whose features fill the memory: it keeps the head that it has.
    """
    features = compute_features(learner.network, data, learner.scale, flip=False, amp=plan.amp)
    if isinstance(features, str):
        log.info(f"no head is fitted before the first epoch: {features}")
        return None
    seen, targets = features.train[0].to(plan.device), data.train.targets.to(plan.device)
    weights = None if plan.balance == "none" else class_weights(data.train.targets).to(plan.device)
    best: tuple[nn.Linear, dict[str, Any]] | None = None
    has_bias = head_of(learner.network).bias is not None
    for head in regressions(seen, targets, len(data.labels), weights, bias=has_bias):
        with torch.no_grad():
            val = score(head(features.val.to(plan.device)).cpu(), data.val.targets, data.labels)
        if best is None or val["loss"] < best[1]["loss"]:  # of few images, accuracy would be a matter of luck
            best = head, val
    assert best is not None
    head, val = best
    with torch.no_grad():
        logits = head(seen)
    loss, accuracy = float(cross_entropy(logits, targets)), float((logits.argmax(dim=1) == targets).float().mean())
    state = {name: value.cpu() for name, value in head.state_dict().items()}
    # One for all processes, which decide by it when to stop; each of them has fitted it, to the last bit or nearly.
    state, loss, accuracy, val = distributed.gather((state, loss, accuracy, val))[0]
    for network in {learner.network, learner.averaged}:
        head_of(network).load_state_dict(state)
    return history_row(0, 0.0, loss, accuracy, val, schedule.seconds), val


def regressions(
    features: Tensor, targets: Tensor, classes: int, weights: Tensor | None = None, *, bias: bool = True
) -> Iterator[nn.Linear]:
    """A fitted head for each of PENALTIES, all in turn the same growing one, as a copy.

    Args:
        features: float32 (N, D); targets: int64 (N,), on the same device.
        weights: float32 (C,), what an image counts by its class; by default all count the same.
        bias: whether the head has one.
    """
    scale = features.std().clamp(min=1e-6)  # the penalty is for features of about 1
    fitted = nn.Linear(features.shape[1], classes, bias=bias, device=features.device)
    for parameter in fitted.parameters():
        nn.init.zeros_(parameter)
    scaled = features / scale
    for penalty in PENALTIES:
        solver = torch.optim.LBFGS(fitted.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss(penalty: float = penalty, solver: torch.optim.LBFGS = solver) -> Tensor:
            solver.zero_grad()
            value = cross_entropy(fitted(scaled), targets, weights) + penalty / 2 * fitted.weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
        head = copy.deepcopy(fitted)
        with torch.no_grad():
            head.weight.div_(scale)
        yield head
