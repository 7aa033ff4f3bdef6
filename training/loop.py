"""One pass over the training pictures, and one over any others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from model.architectures import train_mode
from model.preprocessing import normalise
from training.augmentation import flip_and_shift, jitter
from training.config import TrainConfig
from training.data import Split

EVALUATION_BATCH = 256


class Diverged(RuntimeError):
    """The loss is no number any more."""


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over what is trainable; weight decay on matrices only, not on biases and norms."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fine_tuned = (config.pretrained or config.weights) and not config.freeze
    lr = config.lr or {"adam": 3e-3, "adamw": 3e-3, "sgd": 0.05}[config.optimizer] * (0.1 if fine_tuned else 1.0)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr)


def train_one_epoch(
    network: nn.Module,
    split: Split,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    mean: Tensor,
    std: Tensor,
    *,
    generator: Generator,
    before_step: Callable[[float], bool],
    on_step: Callable[[float, int], None] = lambda loss, seen: None,
) -> tuple[float, float]:
    """Trains on every picture once, in a new order.

    Args:
        before_step: called with the share of the epoch that is done, 0..1, before each step; False ends it there.
        on_step: called now and then with the loss and the pictures seen, for the progress bar.

    Returns:
        Mean loss (nats) and accuracy (0..1) over the pictures seen, augmented as they were.

    Raises:
        Diverged: the loss became infinite or no number.
    """
    train_mode(network)
    order = torch.randperm(len(split), generator=generator)
    batches = order.split(config.batch_size or 64)
    if len(batches) > 1 and len(batches[-1]) == 1:  # BatchNorm has no variance of one picture
        batches = batches[:-1]
    device = mean.device
    loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for step, places in enumerate(batches):
        if not before_step(step / len(batches)):
            break
        crops = split.crops(places).to(device, non_blocking=True)
        targets = split.targets[places].to(device, non_blocking=True)
        crops = flip_and_shift(crops, bool(config.flip), config.crop_padding or 0, generator)
        logits = network(normalise(jitter(crops, config.jitter, generator), mean, std))
        loss = cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(places)
        correct += (logits.detach().argmax(dim=1) == targets).sum()
        seen += len(places)
        if step % 50 == 0 or step == len(batches) - 1:  # reading the loss waits for the device
            value = float(loss.detach())
            if not torch.isfinite(loss_sum):
                raise Diverged(f"the loss is {value} at step {step + 1} of {len(batches)}")
            on_step(value, seen)
    return float(loss_sum) / max(seen, 1), float(correct) / max(seen, 1)


def evaluate(network: nn.Module, split: Split, mean: Tensor, std: Tensor) -> Tensor:
    """Logits of every picture, in order: float32 (N, C), on the CPU."""
    network.eval()
    logits = []
    with torch.inference_mode():
        for start in range(0, len(split), EVALUATION_BATCH):
            crops = split.crops(slice(start, start + EVALUATION_BATCH)).to(mean.device)
            logits.append(network(normalise(crops, mean, std)).cpu())
    return torch.cat(logits)
