"""Training images as whole frames: decoded once, made smaller, and kept; random crops are cut out of them.

A crop is cut out and resized by torch, several times as fast as Pillow and within a grey level of it. Threads do that
for the next batches while the network is at work on this one (`Frames.prepare`).
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import threadpoolctl
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from predictor.pillow_preprocessing import FILTERS, crop, decode
from predictor.spec import PixelRule

ENCODINGS = ("raw", "jpeg")
JPEG_QUALITY = 95  # without chroma subsampling: beside it, the noise of the photographs' own JPEG is large
MARGIN = 1.6  # of a frame's short edge to the size that is trained at: crops of two fifths of the area are not enlarged
BATCHES_AHEAD = 2  # that are kept ready, or in the making
CUT_TOGETHER = 8  # crops that a thread makes before it asks for more


class Bodies(Protocol):
    """Frames as bytes, by row.

    encoding: one of ENCODINGS: the pixels themselves, uint8 (height, width, 3) RGB, or a JPEG file.
    shapes: int32 (N, 2), height and width of each frame, px; 0 of a row that holds none.
    """

    encoding: str
    shapes: np.ndarray

    def __getitem__(self, row: int) -> bytes: ...


class MemoryBodies:
    """`Bodies` in memory, to be filled by several threads."""

    def __init__(self, count: int, encoding: str) -> None:
        self.encoding, self.shapes = encoding, np.zeros((count, 2), np.int32)
        self._bodies = [b""] * count

    def __setitem__(self, row: int, frame: Image.Image) -> None:
        self._bodies[row] = encode(frame, self.encoding)
        self.shapes[row] = frame.height, frame.width

    def __getitem__(self, row: int) -> bytes:
        return self._bodies[row]

    @property
    def missing(self) -> list[int]:
        """The rows that hold no frame."""
        return np.flatnonzero(self.shapes[:, 0] == 0).tolist()

    def leave_out(self, rows: Sequence[int]) -> None:
        """As `dataset.store.StoredBodies` has it; here nobody asks again."""

    @contextmanager
    def filling(self, say: Callable[[str], None]) -> Iterator[None]:
        """As `dataset.store.StoredBodies` has it; here frames may be added at any time."""
        yield


@dataclass(frozen=True)
class _Crops:
    """Crops in the making: `images` is complete when the work is."""

    rows: Tensor
    boxes: Tensor
    images: Tensor
    work: list[Future[None]]

    def are_of(self, rows: Tensor, boxes: Tensor, size: tuple[int, int]) -> bool:
        wanted = (len(rows), *size, 3)
        return self.images.shape == wanted and torch.equal(self.rows, rows) and torch.equal(self.boxes, boxes)

    def done(self) -> Tensor:
        for future in self.work:
            future.result()
        return self.images


class Frames:
    """N frames, and the crops that are cut out of them by a pool of threads.

    Args:
        workers: threads.
        interpolation: of the crops, as the pixel rule has it, so that training sees images as sharp as serving does.
    """

    def __init__(self, bodies: Bodies, workers: int, interpolation: str = "bilinear") -> None:
        self._bodies, self._interpolation = bodies, interpolation
        self._pool = ThreadPoolExecutor(workers, "crops", _compute_alone)
        self._coming = deque[_Crops]()
        self._pinned = False

    def __len__(self) -> int:
        return len(self._bodies.shapes)

    def pin(self) -> None:
        """From now on crops lie in memory that a CUDA device copies from while the program goes on."""
        self._pinned = True

    def shapes(self, rows: Tensor) -> Tensor:
        """int64 (n, 2): height and width of these frames, px."""
        return torch.from_numpy(self._bodies.shapes[rows.numpy()].astype(np.int64))

    def crops(self, rows: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """A box of each frame, resized with an antialiased filter.

        Args:
            rows: int64 (n,).
            boxes: float32 (n, 4): left, top, right, bottom, as shares 0..1 of the frame's width and height; rounded to
                whole pixels.
            size: height and width of the crops, px.

        Returns:
            uint8 (n, height, width, 3), RGB, on the CPU.
        """
        while self._coming:
            crops = self._coming.popleft()
            if crops.are_of(rows, boxes, size):
                return crops.done()
        return self._begin(rows, boxes, size).done()

    def prepare(self, rows: Tensor, boxes: Tensor, size: tuple[int, int]) -> None:
        """Begins to make what `crops` will be asked for, in this order; of more than BATCHES_AHEAD the oldest is
        dropped."""
        if any(crops.are_of(rows, boxes, size) for crops in self._coming):
            return
        if len(self._coming) == BATCHES_AHEAD:
            self._coming.popleft()
        self._coming.append(self._begin(rows, boxes, size))

    def squares(self, rows: Tensor, rule: PixelRule) -> Tensor:
        """uint8 (n, height, width, 3): what the pixel rule makes of the frames.

        That is what it makes of the image itself where the frame is as large as the image; else close to it, since
        the image was resized twice.
        """
        images = torch.empty((len(rows), rule.height, rule.width, 3), dtype=torch.uint8)
        views = images.numpy()

        def cut(i: int, row: int) -> None:
            views[i] = crop(self.frame(row), rule)

        list(self._pool.map(cut, range(len(rows)), rows.tolist()))
        return images

    def frame(self, row: int) -> Image.Image:
        """A frame, RGB."""
        height, width = self._bodies.shapes[row].tolist()
        return view(self._bodies[row], height, width, self._bodies.encoding)

    def _begin(self, rows: Tensor, boxes: Tensor, size: tuple[int, int]) -> _Crops:
        images = torch.empty((len(rows), *size, 3), dtype=torch.uint8, pin_memory=self._pinned)
        wanted = list(zip(images.numpy(), rows.tolist(), boxes.double().tolist(), strict=True))
        parts = (wanted[start : start + CUT_TOGETHER] for start in range(0, len(wanted), CUT_TOGETHER))
        return _Crops(rows, boxes, images, [self._pool.submit(self._cut, part) for part in parts])

    def _cut(self, wanted: Sequence[tuple[np.ndarray, int, Sequence[float]]]) -> None:
        for image, row, box in wanted:
            height, width, _ = image.shape
            image[:] = resized_box(self._pixels(row), box, (height, width), self._interpolation)

    def _pixels(self, row: int) -> np.ndarray:
        """A frame, uint8 (height, width, 3), read-only."""
        if self._bodies.encoding == "raw":
            return np.frombuffer(self._bodies[row], np.uint8).reshape(*self._bodies.shapes[row], 3)
        return np.asarray(self.frame(row))


class FrameSquares:
    """Frames where a `Split` has its pixels: uint8 (N, height, width, 3), made by the pixel rule when asked for."""

    def __init__(self, frames: Frames, rule: PixelRule) -> None:
        self.frames, self._rule = frames, rule
        self.shape = (len(frames), rule.height, rule.width, 3)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.frames.squares(rows, self._rule)


def resized_box(frame: np.ndarray, box: Sequence[float], size: tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8 (*size, 3): a box of a frame, resized with an antialiased filter.

    Args:
        frame: uint8 (height, width, 3).
        size: height and width, px.
        box: left, top, right, bottom, as shares 0..1 of the frame; rounded to whole pixels.
        interpolation: one of Pillow's filters, as the pixel rule has it. Torch has no Lanczos: that is Pillow's work.
    """
    height, width, _ = frame.shape
    left, right = _rounded(box[0] * width, box[2] * width, width)
    top, bottom = _rounded(box[1] * height, box[3] * height, height)
    part = frame[top:bottom, left:right].copy()
    if interpolation == "lanczos":
        return np.asarray(Image.fromarray(part).resize(size[::-1], FILTERS[interpolation]))
    images = torch.from_numpy(part).permute(2, 0, 1)[None]
    resized = functional.interpolate(images, size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _rounded(start: float, stop: float, length: int) -> tuple[int, int]:
    """Whole pixels, at least one, within 0..length."""
    first = min(round(start), length - 1)
    return first, max(first + 1, min(round(stop), length))


def _compute_alone() -> None:
    """From now on torch computes in this thread alone: the pool has one for each core."""
    torch.get_num_threads()  # sets up this thread, which would undo the next line later
    threadpoolctl.threadpool_limits(1, user_api="openmp")


def edge_for(size: tuple[int, int], rule: PixelRule) -> int:
    """px: how long the short edge of frames need be for random crops of `size`, height and width in px, and for the
    rule's own, which is never enlarged then unless the image is small."""
    sides = rule.height, rule.width
    return max(math.ceil(MARGIN * max(size)), -(-rule.resize * max(sides) // min(sides)))


def make_frame(image: bytes | Image.Image, edge: int, colour: str = "srgb") -> Image.Image:
    """The upright image in RGB; where its short edge is longer than `edge` px, reduced to that.

    A JPEG file is decoded at a half, a quarter or an eighth of its size where that is no less than needed.

    Args:
        colour: as the pixel rule has it.

    Raises:
        ImageError, MemoryError: the image cannot be decoded, as `predictor.pillow_preprocessing.decode`.
    """
    image = decode(image, at_least=edge, colour=colour) if isinstance(image, bytes) else image
    short = min(image.size)
    if short <= edge:
        return image
    width, height = (max(edge, round(side * edge / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode(frame: Image.Image, encoding: str) -> bytes:
    """A frame as bytes; `encoding` is one of ENCODINGS."""
    if encoding == "raw":
        return frame.tobytes()
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def view(body: bytes, height: int, width: int, encoding: str) -> Image.Image:
    """The frame that `encode` made into bytes."""
    if encoding == "raw":
        return Image.frombuffer("RGB", (width, height), body, "raw", "RGB", 0, 1)
    return Image.open(io.BytesIO(body), formats=["JPEG"])
