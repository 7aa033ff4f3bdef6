"""Decoded images and where they lie: in memory, on disk, from where they stream, or on a GPU."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from dataset.frames import Frames, FrameSquares
from dataset.sources import DataError

READERS = 8  # threads that read rows of a file
logger = logging.getLogger(__name__)


class StreamedPixels(ABC):
    """uint8 (N, H, W, 3) on disk, of which rows are read when they are asked for.

    They are read, and not mapped into memory: what is mapped counts as the program's own memory until it is needed for
    something else, and a container's limit does not wait for that.
    """

    def __init__(self, count: int, height: int, width: int) -> None:
        self.shape = (count, height, width, 3)
        self._readers = ThreadPoolExecutor(READERS)
        self._ahead = ThreadPoolExecutor(1)
        self._coming: tuple[Tensor, Future[Tensor]] | None = None

    @abstractmethod
    def __setitem__(self, row: int, crop: Tensor) -> None:
        """Writes a row, uint8 (H, W, 3)."""

    @abstractmethod
    def _read_row(self, row: int, view: np.ndarray) -> None:
        """Reads a row into `view`, uint8 (H, W, 3)."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        coming, self._coming = self._coming, None
        if coming and torch.equal(coming[0], rows):
            return coming[1].result()
        return self._read(rows)

    def read_ahead(self, rows: Tensor) -> None:
        """Begins to read what is likely to be asked for next."""
        self._coming = rows, self._ahead.submit(self._read, rows)

    def _read(self, rows: Tensor) -> Tensor:
        images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        views = images.numpy()

        list(self._readers.map(lambda i, row: self._read_row(row, views[i]), range(len(rows)), rows.tolist()))
        return images


class FilePixels(StreamedPixels):
    """`StreamedPixels` in a file without a name, which ends with the program."""

    def __init__(self, count: int, height: int, width: int, folder: Path | None) -> None:
        super().__init__(count, height, width)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._row_bytes = height * width * 3
        self._file.truncate(count * self._row_bytes)

    def __setitem__(self, row: int, crop: Tensor) -> None:
        written = os.pwrite(self._file.fileno(), crop.contiguous().numpy().data, row * self._row_bytes)
        if written != self._row_bytes:
            raise OSError("no space is left for the temporary file of the images")

    def _read_row(self, row: int, view: np.ndarray) -> None:
        if os.preadv(self._file.fileno(), [view.data], row * self._row_bytes) != self._row_bytes:
            raise OSError("the temporary file of the images is cut short; is the disk full?")


@dataclass(frozen=True)
class Split:
    """N labelled images, as rows of a tensor that the splits share.

    pixels: uint8 (all, H, W, 3), RGB; rows: int64 (N,), indices into it; targets: int64 (N,), indices of labels.
    Of a training split that random crops are cut out of, they are whole frames; the rule's crops are made of these.
    """

    pixels: Tensor | StreamedPixels | FrameSquares
    rows: Tensor
    targets: Tensor
    names: list[str]  # as Entry.key

    def crops(self, chosen: Tensor | slice) -> Tensor:
        """uint8 (n, H, W, 3) of the chosen images."""
        return self.pixels[self.rows[chosen]]

    @property
    def frames(self) -> Frames | None:
        """The whole images, by `rows`; None where there are only the rule's crops."""
        return self.pixels.frames if isinstance(self.pixels, FrameSquares) else None

    def read_ahead(self, chosen: Tensor | slice) -> None:
        """Says that these are wanted next: where images stream from disk, they are read meanwhile."""
        if isinstance(self.pixels, StreamedPixels):
            self.pixels.read_ahead(self.rows[chosen])

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Data:
    """The images of a data set, decoded, by split."""

    name: str
    labels: list[str]
    flips: bool  # whether a mirrored image keeps its label
    train: Split
    val: Split
    test: Split
    samples: dict[str, bytes]  # file name to image file, of the val split
    skipped: list[str]  # unreadable files that were left out, with the reason


def allocate(
    count: int,
    height: int,
    width: int,
    scratch: Path | None,
    *,
    processes: int = 1,
    say: Callable[[str], None] = logger.warning,
) -> Tensor | FilePixels:
    """uint8 (count, height, width, 3): in memory, or in a file where that would take over half of it.

    Args:
        scratch: folder for that file; without it the system's own for temporary files.
        processes: how many on this machine allocate as much.
        say: is told where the images stream from a file.

    Raises:
        DataError: the disk has no room for that file.
    """
    needed, free = count * height * width * 3, free_memory(processes)
    if needed <= free // 2:
        return torch.empty((count, height, width, 3), dtype=torch.uint8)
    where = scratch or tempfile.gettempdir()
    space = shutil.disk_usage(where).free
    if needed * processes > space:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise DataError(
            f"the images take {needed / 1e9:.1f} GB{each}, over half of the free memory ({free / 1e9:.1f} GB), and "
            f"{where} has room for {space / 1e9:.1f} GB; choose another disk ({'--out' if scratch else 'TMPDIR'}), or "
            "a smaller --size"
        )
    say(
        f"the images take {needed / 1e9:.1f} GB, over half of the free memory ({free / 1e9:.1f} GB): "
        f"they stream from a temporary file in {where}"
    )
    return FilePixels(count, height, width, scratch)


def free_memory(processes: int = 1) -> int:
    """Bytes: the machine's, or the container's where that has a limit of its own; of several processes one's share.

    Args:
        processes: how many on this machine share its memory.
    """
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroups of version 2, or no limit ("max")
        return free // processes
    return min(free, limit - used) // processes


def on_device(data: Data, device: torch.device, free: int) -> Data:
    """`data` with its images on the device, so that no batch is copied there, if a quarter of its memory holds them.

    Args:
        free: bytes of the device's memory.
    """
    pixels = data.val.pixels
    if not isinstance(pixels, Tensor) or pixels.nbytes > free // 4:
        return data
    copied = pixels.to(device)
    names = ("train", "val", "test") if data.train.pixels is pixels else ("val", "test")
    return replace(data, **{name: replace(getattr(data, name), pixels=copied) for name in names})
