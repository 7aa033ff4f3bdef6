"""Random numbers of a run, each derived from the seed and from where in the run it is drawn.

Nothing carries over from one step to the next. A run that goes on needs to know only its epoch and step, batches may be
prepared ahead of time and in any order, and every process draws the same.
"""

from __future__ import annotations

import hashlib

import torch


def order_generator(seed: int, epoch: int) -> torch.Generator:
    """For the order of the images in an epoch; epochs count from 0."""
    return torch.Generator().manual_seed(derive(seed, epoch))


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """For the augmentation of a batch; epochs and their steps count from 0."""
    return torch.Generator().manual_seed(derive(seed, epoch, step))


def crop_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """For the random crops of a batch, which are drawn some steps ahead."""
    return torch.Generator().manual_seed(derive(seed, epoch, step, "crops"))


def seed_dropout(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seeds what a network draws in a forward pass, such as dropout: differently in each process."""
    torch.manual_seed(derive(seed, epoch, step, rank))


def derive(*numbers: int | str) -> int:
    """A seed, 0 to 2^63 - 1; hashed, since a Mersenne Twister gets similar states from similar seeds."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
