"""BatchNorm's statistics, estimated anew where their running averages cannot keep up with a short training.

torchvision gives some networks a small momentum (MobileNetV3, MaxViT and some EfficientNets 0.01, MNASNet 0.0003): made
for hundreds of thousands of steps, their averages are still near their first values after the few thousand of a run
here, and the network then gives one label to every image outside of training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dataset.decoded_images import Split
from model.tensor_preprocessing import normalise

USUAL_MOMENTUM = 0.1  # PyTorch's default: such averages follow within tens of steps, and are left alone
IMAGES = 1024  # of the training split, the same ones each time


def slow_norms(network: nn.Module) -> list[str]:
    """The names of the BatchNorm layers that learn and whose running averages are slow."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.momentum is not None
        and module.momentum < USUAL_MOMENTUM
        and all(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


@torch.no_grad()
def estimate_statistics(
    network: nn.Module, names: list[str], split: Split, scale: tuple[Tensor, Tensor], batch: int
) -> None:
    """Gives the named layers the mean statistics of some images, not augmented, as `torch.optim.swa_utils.update_bn`.

    Everything else is in evaluation mode meanwhile, so that nothing random is drawn: the same weights and images give
    the same statistics.

    Args:
        scale: mean and std, each (3,), on the network's device.
        batch: images at a time, at least 2.
    """
    norms = [network.get_submodule(name) for name in names]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]  # the plain mean over the batches
        norm.train()
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:IMAGES]
    for indices in chosen.split(batch):
        if len(indices) > 1 or len(chosen) == 1:  # one image may have no variance
            network(normalise(split.crops(indices).to(scale[0].device), *scale))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
