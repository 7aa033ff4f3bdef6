"""A network, and what changes with it while it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from model import registry
from training import distributed
from training.augmentation import Draws
from training.balance import class_weights
from training.batchnorm import slow_norms
from training.optimizers import make_average, make_optimizer
from training.resolve import Plan


@dataclass(frozen=True)
class Features:
    """What the head of a frozen network sees: float32, D for each image, in the order of the splits; on the CPU.

    train: (V, N, D); V is 2 where images are mirrored, their mirror images being the second view, else 1.
    val: (M, D).
    """

    train: Tensor
    val: Tensor

    def choose(self, indices: Tensor, draws: Draws) -> Tensor:
        """float32 (n, D) of the train split; each image or its mirror image, as `flip_and_shift` would decide."""
        if len(self.train) == 1:
            return self.train[0, indices]
        return self.train[(draws.uniform(indices.device) < 0.5).long(), indices]


@dataclass
class Learner:
    """What a step changes, and what it needs for that.

    network: the weights that are trained; `averaged` is what is evaluated and kept: their EMA if there is one.
    scale: mean and std of the pixels, each (3,), on the network's device.
    frozen: parameters of the backbone that do not learn now.
    features: what the head sees of the images, while that is all that learns; else None. `features_tried`: whether
        they were to be computed already.
    class_weights: float32 (C,), what an image counts in the loss by its class; None where all count the same.
    forward: what a batch goes through: the network or, given features, its head; wrapped and compiled as wanted.
    ddp: what the processes share their gradients by; None where there is only one.
    """

    network: nn.Module
    scale: tuple[Tensor, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    frozen: list[nn.Parameter]
    slow_norms: list[str]
    features: Features | None = None
    features_tried: bool = False
    class_weights: Tensor | None = None
    forward: Callable[[Tensor], Tensor] = field(init=False)
    ddp: DistributedDataParallel | None = field(init=False)

    @property
    def device(self) -> torch.device:
        return self.scale[0].device

    @property
    def averaged(self) -> nn.Module:
        return self.average.module if self.average else self.network

    def learn_through(self, module: nn.Module, *, compiled: bool = False) -> None:
        """From now on a batch goes through `module`, which is the network or its head."""
        self.ddp = None
        if distributed.world() > 1:
            gpus = [self.device.index] if self.device.index is not None else None
            self.ddp = DistributedDataParallel(module, gpus)
        self.forward = self.ddp or module
        if compiled:
            self.forward = torch.compile(self.forward)


def head_of(network: nn.Module) -> nn.Module:
    return network.get_submodule(registry.head_name(network))


def make_learner(network: nn.Module, scale: tuple[Tensor, Tensor], plan: Plan, targets: Tensor) -> Learner:
    """A network that is ready for its first step.

    Args:
        network: on `plan.device`.
        scale: mean and std of the pixels, each (3,), there too.
        targets: int64 (N,), of the training images.
    """
    if plan.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = registry.freeze_backbone(network) if plan.freeze else []
    if plan.freeze_first:
        registry.freeze_first(network, plan.freeze_first)
    learner = Learner(
        network=network,
        scale=scale,
        average=make_average(network, plan.ema) if plan.ema else None,
        optimizer=make_optimizer(network, plan, frozen if plan.unfreeze_at else ()),
        scaler=torch.amp.GradScaler(plan.device.type, enabled=plan.amp is torch.float16),
        frozen=frozen,
        slow_norms=[] if plan.hold_norms else slow_norms(network),
        class_weights=class_weights(targets).to(plan.device) if plan.balance == "loss" else None,
    )
    learner.learn_through(network, compiled=plan.compile)
    return learner
