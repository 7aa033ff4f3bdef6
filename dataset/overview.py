"""What a data set holds, for the first lines of a run: images, classes, and the sizes that some files' headers say."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from statistics import median_low
from typing import IO

from PIL import Image

from dataset.sources import Source
from predictor.pillow_preprocessing import upright_size

LOOKED_AT = 200  # files at the most whose headers are read
SECONDS = 0.5  # after which no other file is opened, as of a slow disk
HEAD_BYTES = 1 << 20  # of a JPEG or PNG file, whose headers are at its beginning
WHOLE_BYTES = 32 << 20  # of another: TIFF's directory may be at the end, and the readers of WebP and HEIC want it whole
HEADED = (b"\xff\xd8\xff", b"\x89PNG")  # how the former begin
FORMATS = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF", "webp": "WebP", "heif": "HEIC"}

Size = tuple[int, int]  # width, height in px, upright


@dataclass(frozen=True)
class Overview:
    """Counts are of all images, sizes of those whose headers were read: none where no header could be."""

    images: int
    classes: int
    smallest: tuple[str, int]  # label and number of images, of the class that has the fewest
    largest: tuple[str, int]
    formats: dict[str, int]  # files by the format that their names say, most frequent first
    looked_at: int  # headers
    median_size: Size | None  # of the widths, and of the heights
    size_range: tuple[Size, Size] | None  # the images of the fewest and the most pixels

    @property
    def ratio(self) -> float:
        """How many times the smallest class's images the largest has."""
        return self.largest[1] / self.smallest[1]

    def lines(self) -> list[str]:
        """One or two lines to print."""
        files = ", ".join(
            self.formats if len(self.formats) < 2 else (f"{n:,} {kind}" for kind, n in self.formats.items())
        )
        return [self._classes(), *filter(None, [", ".join(filter(None, [self._sizes(), files]))])]

    def _classes(self) -> str:
        (small, fewest), (large, most) = self.smallest, self.largest
        counted = f"{self.images:,} images in {self.classes:,} classes"
        if fewest == most:
            return f"{counted}, {most:,} each"
        times = f"{self.ratio:.0f}" if self.ratio >= 10 else f"{self.ratio:.1f}".removesuffix(".0")
        return (
            f'{counted}, {fewest:,} ("{small}") to {most:,} ("{large}") each'
            + f"; the largest class has {times} times the smallest's images" * (self.ratio >= 1.5)
        )

    def _sizes(self) -> str:
        if self.median_size is None or self.size_range is None:
            return ""
        smallest, largest = map(_shown, self.size_range)
        if smallest == largest:
            return f"{largest} px"
        return f"median {_shown(self.median_size)} px, from {smallest} to {largest}"


def look(source: Source, *, count: int = LOOKED_AT, seconds: float = SECONDS) -> Overview:
    """Reads the headers of up to `count` images, evenly spread over all, or from the beginning of a stream.

    Args:
        seconds: no further file is opened after so long.
    """
    counts = Counter(entry.label for entry in source.entries).most_common()
    total = len(source.entries)
    indices = [i * total // min(count, total) for i in range(min(count, total))]
    sizes = list(_sizes(source, indices, seconds))
    by_pixels = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    widths, heights = zip(*sizes, strict=True) if sizes else ((), ())
    return Overview(
        images=total,
        classes=len(counts),
        smallest=counts[-1],
        largest=counts[0],
        formats=dict(Counter(filter(None, (_format(entry.name) for entry in source.entries))).most_common()),
        looked_at=len(sizes),
        median_size=(median_low(widths), median_low(heights)) if sizes else None,
        size_range=(by_pixels[0], by_pixels[-1]) if sizes else None,
    )


def _sizes(source: Source, indices: Sequence[int], seconds: float) -> Iterator[Size]:
    end = time.monotonic() + seconds
    for file in source.peek(indices):
        if size := file.size if isinstance(file, Image.Image) else _size(file):
            yield size
        if time.monotonic() >= end:
            return


def _size(file: IO[bytes]) -> Size | None:
    """Of an image file, by its header; None where that cannot be read, or says that decoding will refuse the file."""
    try:
        head = file.read(HEAD_BYTES)
        if not head.startswith(HEADED):
            head += file.read(WHOLE_BYTES - len(head))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage, which decoding will name
            return upright_size(head)
    except Exception:  # the readers of archives, and Pillow's, raise whatever the damage leads them into
        return None


def _format(name: str) -> str:
    """As the suffix says; "" without one."""
    suffix = PurePosixPath(name).suffix[1:].lower()
    return FORMATS.get(suffix, suffix.upper())


def _shown(size: Size) -> str:
    return "{:,}×{:,}".format(*size)
