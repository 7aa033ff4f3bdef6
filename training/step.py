"""One step: a batch is augmented, goes through the network, and moves its weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dataset.decoded_images import Split
from model.tensor_preprocessing import normalise
from training import distributed
from training.augmentation import Draws, Mix, draw_mix, erase, flip_and_shift, jitter, rotate
from training.learner import Learner
from training.resolve import Plan
from training.trivial_augment import trivial_augment


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch: n images and, in front of them, the first one's neighbour in the batch.

    inputs: uint8 (n + 1, H, W, 3), augmented; or what the head sees of them, float32 (n + 1, D).
    targets: int64 (n + 1,).
    mix: how each image is mixed with the one in front of it; None for not at all.
    whole: how many images the shares of all processes are together.
    """

    inputs: Tensor
    targets: Tensor
    mix: Mix | None
    whole: int


def make_batch(
    learner: Learner,
    split: Split,
    indices: Tensor,
    plan: Plan,
    generator: torch.Generator,
    rows: Tensor | None = None,
    boxes: Tensor | None = None,
) -> Batch:
    """Draws the augmentation of a batch, and applies it to this process's share.

    Args:
        indices: int64 (B,), of the images in `split`; the same in every process.
        generator: of the step (training/randomness.py); in the same state in every process.
        rows: of the batch, in the place of this process's share.
        boxes: of the random crops of these rows, as `training.ahead` draws them; None for the squares.
    """
    rows = share_of(len(indices)) if rows is None else rows
    chosen = indices[rows]
    draws = Draws(generator, len(indices), rows)
    targets = split.targets[chosen].to(plan.device)
    if learner.features:
        return Batch(learner.features.choose(chosen, draws).to(plan.device), targets, None, len(indices))
    if boxes is not None and split.frames:
        crops = split.frames.crops(split.rows[chosen], boxes, plan.train_size).to(plan.device, non_blocking=True)
    else:
        crops = split.crops(chosen).to(plan.device)
    crops = flip_and_shift(crops, plan.flip, plan.crop_padding, draws)
    crops = rotate(crops, plan.rotate, draws)
    crops = trivial_augment(crops, draws) if plan.trivial else crops
    crops = jitter(crops, plan.jitter, draws)
    crops = erase(crops, plan.erase, draws)
    _, height, width, _ = crops.shape
    mix = draw_mix(plan.mixup, plan.cutmix, height, width, generator)
    return Batch(crops, targets, mix, len(indices))


def train_step(learner: Learner, batch: Batch, plan: Plan) -> tuple[Tensor, Tensor]:
    """One step of the optimizer on a batch; this process takes its share of it, in `plan.accumulate` micro-batches.

    The gradient is that of the mean loss over the whole batch, however it is cut. With `--balance loss` each image's
    loss has the weight of its class. These weights have the mean 1 over the training images, not over each batch, so
    that a batch with more images of rare classes counts more.

    Returns:
        Loss and correct predictions of the share, on the device; the losses of all shares add up to the batch's mean
        loss.
    """
    losses = torch.zeros((), device=plan.device)
    correct = torch.zeros((), device=plan.device)
    for i in range(plan.accumulate):
        part = distributed.cut(len(batch.targets) - 1, i, plan.accumulate)
        part = slice(part.start, part.stop + 1)  # with the neighbour in front
        waits = learner.ddp is not None and i < plan.accumulate - 1  # only the last part sums over the processes
        with learner.ddp.no_sync() if learner.ddp and waits else contextlib.nullcontext():
            loss, hits = summed_loss(learner, batch.inputs[part], batch.targets[part], batch.mix, plan)
            loss = loss / batch.whole
            # DistributedDataParallel takes the mean of the gradients, where the sum is wanted.
            learner.scaler.scale(loss * distributed.world()).backward()
        losses += loss.detach()
        correct += hits
    if plan.clip_grad_norm:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.network.parameters(), plan.clip_grad_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.average:
        learner.average.update_parameters(learner.network)
    return losses, correct


def summed_loss(
    learner: Learner, inputs: Tensor, targets: Tensor, mix: Mix | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Summed loss and correct predictions of n images, given n + 1: the first is only the second's neighbour."""
    own, wanted = inputs[1:], [(1.0, targets[1:])]
    if not learner.features:
        own = normalise(own, *learner.scale)
    if mix:
        own = mix(own, normalise(inputs[:-1], *learner.scale))
        wanted = [(mix.kept, targets[1:]), (1 - mix.kept, targets[:-1])]
    if plan.channels_last and not learner.features:
        own = own.contiguous(memory_format=torch.channels_last)
    with torch.autocast(plan.device.type, plan.amp, enabled=plan.amp is not torch.float32):
        logits = learner.forward(own)
    predicted = logits.detach().argmax(dim=1)
    loss, correct = torch.zeros((), device=plan.device), torch.zeros((), device=plan.device)
    for weight, labels in wanted:
        loss = loss + weight * balanced_loss(logits.float(), labels, learner.class_weights, plan.label_smoothing)
        correct = correct + weight * (predicted == labels).sum()
    return loss, correct


def balanced_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """The sum of the images' cross-entropies, each times the weight of its class, if there are weights, (C,)."""
    if weights is None:
        return cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    # cross_entropy's own weights would apply, with label smoothing, to the classes that share an image's label.
    return (weights[labels] * cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")).sum()


def share_of(batch: int) -> Tensor:
    """This process's rows of a batch, int64, and one more in front: the first one's neighbour."""
    share = distributed.share(batch)
    return torch.arange(share.start - 1, share.stop) % batch
