"""Image files become what the network sees; what a corrupt image gets: a reason, never pixels.

A corrupt image stops a run, with all such files named, or is left out where the user says so (`--skip-bad`).
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from dataset.decoded_images import FilePixels
from dataset.sources import DataError, Entry, ImageInput, Source, Unreadable, printable
from predictor.pillow_preprocessing import ImageError, crop, read
from predictor.spec import PixelRule

DECODED_TOGETHER = 16  # images that a thread decodes before it asks for more, which costs as much as a tiny one
TOGETHER_BYTES = 1 << 20  # of their files at the most, but for the last: large ones are decoded one by one
LISTED = 50  # unreadable files named one by one before the rest is counted


def decode_all(
    source: Source,
    rows: Mapping[int, int],
    crops: Tensor | FilePixels,
    rule: PixelRule,
    *,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, str]:
    """Decodes some images of a source into rows of `crops`.

    Args:
        rows: of each image that is wanted its row, by its index in `source.entries`.
        workers: threads.
        progress: told how many images are done, of how many.

    Returns:
        The reason for each image that cannot be read, by its index.
    """

    def decode(index: int, image: bytes | Image.Image) -> None:
        crops[rows[index]] = square(image, rule)

    return decode_each(source, rows.keys(), decode, workers=workers, progress=progress)


def square(image: bytes | Image.Image, rule: PixelRule) -> Tensor:
    """uint8 (height, width, 3): what the pixel rule makes of an image."""
    return torch.from_numpy((read(image, rule) if isinstance(image, bytes) else crop(image, rule)).copy())


def decode_each(
    source: Source,
    wanted: Collection[int],
    decode: Callable[[int, bytes | Image.Image], None],
    *,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, str]:
    """Has each of some images of a source decoded by one of the threads.

    Args:
        wanted: indices in `source.entries`.
        decode: takes an index and its image; an ImageError or MemoryError from it is the reason that is returned.
        workers, progress: as in `decode_all`.

    Returns:
        The reason for each image that cannot be read, by its index.
    """
    unreadable: dict[int, str] = {}

    def decode_some(items: list[tuple[int, ImageInput]]) -> None:
        for index, image in items:
            if isinstance(image, Unreadable):
                unreadable[index] = image.reason
                continue
            try:
                decode(index, image)
            except (ImageError, MemoryError) as error:
                unreadable[index] = _reason(error)

    done = 0
    for count in _in_threads(decode_some, _batches(source.read(wanted)), workers):
        done += count
        progress(done, len(wanted))
    return unreadable


def name_unreadable(entries: Sequence[Entry], unreadable: Mapping[int, str]) -> list[str]:
    """`NAME: REASON` for each, in the order of the entries.

    Args:
        unreadable: reasons by index, as `decode_all` returns them.
    """
    return [f"{printable(entries[index].name)}: {reason}" for index, reason in sorted(unreadable.items())]


def unreadable_images(data: str, named: list[str], total: int) -> DataError:
    """The error that stops a run, with the names of the files.

    Args:
        named: as `name_unreadable` returns it.
        total: images of the data.
    """
    rest = f"\n  … and {len(named) - LISTED} more" if len(named) > LISTED else ""
    names = "".join(f"\n  {line}" for line in named[:LISTED]) + rest
    return DataError(f"{data}: {len(named)} of {total} images cannot be read; mend them or pass --skip-bad{names}")


def as_file(image: ImageInput) -> bytes:
    """An image file: as it is, or a PNG of what has none; nothing of what cannot be read."""
    if isinstance(image, Unreadable):
        return b""
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    Image.Image.save(image, buffer, "PNG")
    return buffer.getvalue()


def _reason(error: ImageError | MemoryError) -> str:
    """Why a file has no usable image, without the bodies and the sending that the endpoint's clients are told of."""
    if isinstance(error, MemoryError):  # Pillow's word for a side that it cannot count, too
        return "the image is too long or too large to be decoded"
    return str(error).partition("; send")[0].replace("the body", "the file")


def _batches(items: Iterable[tuple[int, ImageInput]]) -> Iterator[list[tuple[int, ImageInput]]]:
    batch: list[tuple[int, ImageInput]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1]) if isinstance(item[1], bytes) else 0
        if len(batch) == DECODED_TOGETHER or size >= TOGETHER_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_threads(
    work: Callable[[list[tuple[int, ImageInput]]], None], batches: Iterable[list[tuple[int, ImageInput]]], threads: int
) -> Iterator[int]:
    """The size of each batch, in order, when the work on it is done."""
    waiting = deque[tuple[int, Future[None]]]()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            waiting.append((len(batch), pool.submit(work, batch)))
            if len(waiting) > 2 * threads:  # enough to do while more is read, and not all in memory
                yield _finished(waiting)
        while waiting:
            yield _finished(waiting)


def _finished(waiting: deque[tuple[int, Future[None]]]) -> int:
    count, future = waiting.popleft()
    future.result()
    return count
