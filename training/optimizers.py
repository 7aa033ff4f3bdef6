"""The optimizer of a run, with the rates and decays of each group of weights; and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from model.fastnet import FastNorm
from model.registry import layer_numbers
from training.muon import Muon
from training.resolve import Plan

BACKBONE_RATE = 0.1  # of the learning rate, where the backbone was frozen at first


def make_optimizer(network: nn.Module, plan: Plan, backbone: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The optimizer over what is trainable; weight decay on matrices only, not on biases and norms.

    Args:
        backbone: parameters that are frozen now and will learn later, at BACKBONE_RATE.
    """
    lr = plan.lr
    trainable = [p for p in network.parameters() if p.requires_grad]
    if plan.optimizer == "muon":
        norms = [module for module in network.modules() if isinstance(module, FastNorm)]
        return Muon(trainable, lr, plan.momentum, plan.weight_decay, [norm.bias for norm in norms])
    groups = [
        {"params": [p for p in some if (p.ndim > 1) == matrices], "lr": rate, "weight_decay": decay}
        for some, rate in (*_by_rate(network, plan), (backbone, BACKBONE_RATE * lr))
        for matrices, decay in ((True, plan.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=plan.momentum, nesterov=plan.momentum > 0)
    kind = torch.optim.Adam if plan.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr)


def _by_rate(network: nn.Module, plan: Plan) -> list[tuple[list[nn.Parameter], float]]:
    """What is trainable, with its learning rate: the head has `plan.lr`, and the first layer `plan.layer_decay` of it
    (discriminative fine-tuning, Howard and Ruder 2018)."""
    if plan.layer_decay == 1:
        return [([p for p in network.parameters() if p.requires_grad], plan.lr)]
    numbers = layer_numbers(network)
    last, layers = max(1, *numbers.values()), dict[int, list[nn.Parameter]]()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(numbers[name], []).append(parameter)
    return [(layers[n], plan.lr * plan.layer_decay ** (1 - n / last)) for n in sorted(layers, reverse=True)]


def make_average(network: nn.Module, decay: float) -> AveragedModel:
    """A second network that follows the first, and often classifies better: after each step, its weights and BatchNorm
    statistics become decay · old + (1 - decay) · new.

    In the first steps the decay is smaller, n / (n + 9) at the n-th of them, so that the random weights of the
    beginning are soon forgotten. `n_averaged` is one more than the steps: the first weights count as one of them.
    """

    def follow(own: Sequence[Tensor], new: Sequence[Tensor], _: Tensor | int) -> None:
        count = int(average.n_averaged)  # on the CPU, where reading it waits for nothing
        weight = 1 - min(decay, count / (count + 9))
        for old, value in zip(own, new, strict=True):
            if old.is_floating_point():
                old.lerp_(value, weight)
            else:
                old.copy_(value)

    average = AveragedModel(network, multi_avg_fn=follow, use_buffers=True).requires_grad_(False)
    average.n_averaged.fill_(1)  # at 0, the next step would be copied whole
    return average
