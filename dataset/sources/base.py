"""What a source of labelled images is, and what one image of it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from PIL import Image


@dataclass(frozen=True)
class Unreadable:
    """Stands for the image of a file that could not be read."""

    reason: str


ImageInput = bytes | Image.Image | Unreadable


class DataError(ValueError):
    """Data that cannot be trained on. The message names the data, the rule and the way out."""


@dataclass(frozen=True)
class Entry:
    """One labelled image.

    name: where the source finds it.
    split: "train", "val", "test", or "" where the data does not say.
    key: what it is called wherever the data lies and however it is packed: its path below the data's root or an
        archive's wrapping folder, with `/`, in Unicode's composed form (NFC). By default the name.
    """

    name: str
    label: str
    split: str
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.name)


class Source(Protocol):
    name: str
    labels: list[str]
    entries: list[Entry]
    flips: bool  # whether a mirrored image keeps its label

    def read(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, ImageInput]]:
        """Every image once, or those of the indices `wanted`, as its index in `entries` and its file's bytes, its
        pixels, or why it has none."""

    def peek(self, indices: Sequence[int]) -> Iterator[IO[bytes] | Image.Image]:
        """The opened files of some images, or their pixels, for a look at their headers. Those that cannot be opened
        are left out, and a stream gives as many from its beginning instead. Each file is closed as the next is asked
        for."""

    def stamps(self, indices: Sequence[int]) -> list[str] | None:
        """Of each of some images a text that changes when the image does, without reading it; None where the source
        has nothing of the kind."""


def chosen(entries: Sequence[Entry], wanted: Collection[int] | None) -> Sequence[int]:
    """The indices that `Source.read` is asked for, in order."""
    return range(len(entries)) if wanted is None else sorted(wanted)


def printable(name: str) -> str:
    """A file's name as it can be printed anywhere: escapes for what is not UTF-8, ends a line or steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
