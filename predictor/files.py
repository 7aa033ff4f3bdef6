"""Files that are whole or absent: written beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` and renames it over `path` when the block ends without an error.

    A kill at any moment leaves the old file or the new one. The rename is atomic on POSIX and on Windows; the data is
    flushed to disk before it, and the folder after it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600; these are ordinary files
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(path: Path | str) -> None:
    """Removes what `atomic_write(path)` left beside it when it was killed. Nobody may be writing `path` meanwhile."""
    path = Path(path)
    _remove_leftovers(path.parent, glob.escape(path.name))


def remove_all_leftovers(folder: Path | str) -> None:
    """The same for every file of a folder."""
    _remove_leftovers(Path(folder), "*")


def _remove_leftovers(folder: Path, names: str) -> None:
    for leftover in folder.glob(f".{names}.{'?' * 8}.tmp"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def sha256(path: Path | str) -> str:
    """The file's SHA-256, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk."""
    if os.name == "nt":  # folders cannot be opened there, and need not be
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
