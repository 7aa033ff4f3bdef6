"""A folder of images with a folder for each class, and how image files are read."""

from __future__ import annotations

import contextlib
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dataset.sources.base import DataError, ImageInput, Unreadable, chosen, printable
from dataset.sources.layout import is_hidden, read_layout

MAX_FILE_BYTES = 256 << 20  # of one image file: what is larger is a mistake, or a bomb
TOO_LARGE = f"the file is larger than {MAX_FILE_BYTES >> 20} MiB"

# What reading a member of an archive raises; the second line for methods that are not known, and lengths that lie.
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError),
    *(NotImplementedError, RuntimeError, ValueError, MemoryError),
)


class FolderSource:
    """DIR/CLASS/* or DIR/{train,val,test}/CLASS/*."""

    flips = True

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.resolve().name, path
        files, folders = _walk(path)
        self.entries, self.labels = read_layout(str(path), files, folders)

    def read(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, ImageInput]]:
        for i in chosen(self.entries, wanted):
            yield i, read_file(self._path / self.entries[i].name)

    def peek(self, indices: Sequence[int]) -> Iterator[IO[bytes]]:
        return open_files(self._path / self.entries[i].name for i in indices)

    def stamps(self, indices: Sequence[int]) -> list[str]:
        return [file_stamp(self._path / self.entries[i].name) for i in indices]


def read_file(path: Path) -> bytes | Unreadable:
    try:
        if path.is_file():
            return read_guarded(path, path.stat().st_size, Path.read_bytes)
        if path.exists():  # a pipe, which holds its reader, or a folder
            return Unreadable("not a regular file")
        return Unreadable("a link to nothing" if path.is_symlink() else "there is no such file")
    except OSError as error:  # a folder that may be listed and not entered
        return Unreadable(f"the file cannot be read ({error.strerror or error})")


def file_stamp(path: Path) -> str:
    """Size and time, or "none" of what cannot be looked at; reading it says why."""
    try:
        found = path.stat()
    except OSError:
        return "none"
    return f"{found.st_size} {found.st_mtime_ns}"


def open_files(paths: Iterable[Path]) -> Iterator[IO[bytes]]:
    """One after the other, those that can be opened; each is closed as the next is asked for."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            if path.is_file():
                with path.open("rb") as file:
                    yield file


def read_guarded(name: Any, size: int, read: Callable[[Any], bytes]) -> bytes | Unreadable:
    """The file's bytes, or why it has none: it cannot be opened, is damaged in its archive, or far too large."""
    if size > MAX_FILE_BYTES:
        return Unreadable(TOO_LARGE)
    try:
        return read(name)
    except OSError as error:
        return Unreadable(f"the file cannot be read ({error.strerror or error})")
    except DAMAGE as error:
        return Unreadable(f"damaged in its archive ({error or type(error).__name__})")


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Paths of files and folders below `root`, relative and sorted; linked folders are followed, once each.

    Raises:
        DataError: a folder cannot be listed.
    """

    def stop(error: OSError) -> None:
        folder = printable(str(error.filename))
        raise DataError(f"{folder}: the folder cannot be listed ({error.strerror}); make it readable, or move it out")

    files, folders, seen = [], [], set()
    for folder, children, names in os.walk(root, followlinks=True, onerror=stop):
        real = os.path.realpath(folder)
        if real in seen:
            children.clear()
            continue
        seen.add(real)
        children[:] = sorted(child for child in children if not is_hidden((child,)))
        base = Path(folder).relative_to(root)
        folders += [(base / child).as_posix() for child in children]
        files += [(base / name).as_posix() for name in sorted(names)]
    return files, folders
