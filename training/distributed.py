"""The processes of one training run, as `torchrun` starts them. Where there is only one, everything here is trivial.

Each process holds the network and all images, and works on its own part of every batch. They agree on the numbers that
decide what happens next (the time, Ctrl-C), so that all do the same.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes for the time of the block. Only the first one prints to standard output."""
    if world() == 1:
        yield
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.redirect_stdout(io.StringIO()) if rank() else contextlib.nullcontext():
        yield
    distributed.destroy_process_group()  # after an error the process ends with it, and torchrun ends the others


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others do, which then find what it downloaded."""
    if rank() > 0:
        from_first(0)
    yield
    if rank() == 0:
        from_first(0)


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_world() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of those on this machine this is, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share(count: int) -> slice:
    """This process's part of `count` things in a row."""
    return cut(count, rank(), world())


def cut(count: int, part: int, parts: int) -> slice:
    """One of several parts of `count` things in a row; they differ in length by at most one."""
    return slice(count * part // parts, count * (part + 1) // parts)


def from_first(*values: float) -> list[float]:
    """What the first process says, in every process."""
    if world() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    distributed.broadcast(numbers, src=0)
    return numbers.tolist()


def largest(*values: float) -> list[float]:
    """The largest of each value over the processes, in every process."""
    if world() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers.tolist()


def total(values: Tensor) -> Tensor:
    """The sum over the processes, in every process."""
    if world() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def copy_buffers(network: nn.Module) -> None:
    """Gives every process the first one's BatchNorm statistics; the parameters are the same already."""
    if world() > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)
