"""What the head of a frozen network sees of each image, computed once: training it then takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset.image_store import Data, free_memory
from model.registry import head_name
from model.tensor_preprocessing import normalise
from training import distributed
from training.augmentation import Draws
from training.evaluation import evaluate


@dataclass(frozen=True)
class Features:
    """float32, D for each image, in the order of the splits; on the CPU.

    train: (V, N, D); V is 2 where images are mirrored, their mirror images being the second view, else 1.
    val: (M, D).
    """

    train: Tensor
    val: Tensor

    def choose(self, places: Tensor, draws: Draws) -> Tensor:
        """float32 (n, D) of the train split; each image or its mirror image, as `flip_and_shift` would decide."""
        if len(self.train) == 1:
            return self.train[0, places]
        return self.train[(draws.uniform(places.device) < 0.5).long(), places]


def compute_features(network: nn.Module, data: Data, scale: tuple[Tensor, Tensor], flip: bool) -> Features | str:
    """The features of the train and val splits; or the reason why there are none to be kept.

    Args:
        scale: mean and std, each (3,), on the network's device.
        flip: whether mirror images are wanted.
    """
    if reason := _obstacle(network, data, scale, views=1 + flip):
        return reason
    with headless(network):
        views = [evaluate(network, data.train, *scale, mirrored=m, shown="features") for m in (False, True)[: 1 + flip]]
        return Features(torch.stack(views), evaluate(network, data.val, *scale))


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
    images = normalise(data.train.crops(slice(0, 2)).to(scale[0].device), *scale)
    logits = network.eval()(images)
    with headless(network):
        seen = network(images)
    head = network.get_submodule(head_name(network))
    if (
        not isinstance(head, nn.Linear)
        or seen.ndim != 2
        or not torch.allclose(head(seen), logits, rtol=1e-4, atol=1e-5)
    ):
        return "the network goes on after its last layer"
    needed = 4 * seen.shape[1] * (views * len(data.train) + len(data.val))
    # One answer for all processes, which compute the features together.
    (free,) = distributed.from_first(free_memory(distributed.local_world()))
    if needed > free / 2:
        return f"they would take {needed / 1e9:.1f} GB, over half of the free memory"
    return ""
