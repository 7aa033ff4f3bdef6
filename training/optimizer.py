"""The optimizer of a run, with the rates and decays of each group of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.fastnet import ShiftNorm
from training.config import TrainConfig
from training.muon import Muon

BACKBONE_RATE = 0.1  # of the learning rate, where the backbone was frozen at first


def default_lr(config: TrainConfig) -> float:
    """The peak learning rate where none is given: a tenth for trained weights that are not frozen."""
    fine_tuned = (config.pretrained or config.weights) and not config.freeze
    return {"adam": 3e-3, "adamw": 3e-3, "sgd": 0.05, "muon": 0.24}[config.optimizer] * (0.1 if fine_tuned else 1.0)


def make_optimizer(
    network: nn.Module, config: TrainConfig, backbone: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer over what is trainable; weight decay on matrices only, not on biases and norms.

    Args:
        backbone: parameters that are frozen now and will learn later, at BACKBONE_RATE.
    """
    lr = config.lr or default_lr(config)
    trainable = [p for p in network.parameters() if p.requires_grad]
    if config.optimizer == "muon":
        shifts = [module.bias for module in network.modules() if isinstance(module, ShiftNorm)]
        return Muon(trainable, lr, config.momentum, config.weight_decay, shifts)
    groups = [
        {"params": [p for p in some if (p.ndim > 1) == matrices], "lr": rate, "weight_decay": decay}
        for some, rate in ((trainable, lr), (backbone, BACKBONE_RATE * lr))
        for matrices, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr)
