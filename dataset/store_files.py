"""The files of a store, which no other user of the machine can turn into something else.

No link is followed, and nothing is opened, cut or written that is not this user's own: whoever may write into a shared
folder could else have other files overwritten, or images of their own trained on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dataset.sources import DataError

LOCK = "lock"


def check_folder(folder: Path) -> None:
    """
    Raises:
        FileNotFoundError: there is none.
        DataError: it is a link, or another user's, or others can write into it or put something else in its place.
    """
    found, parent = folder.lstat(), folder.parent.stat()
    if not stat.S_ISDIR(found.st_mode):
        reason = "is no folder of its own"
    elif found.st_uid != os.geteuid():
        reason = "belongs to another user"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "can be written by other users"
    elif parent.st_mode & stat.S_IWOTH and not parent.st_mode & stat.S_ISVTX:
        reason = f"can be replaced by all users, who can write {folder.parent}"
    else:
        return
    raise DataError(f"{folder}: {reason}, so images are not kept there; give another --store DIR")


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file of a store, made for its owner alone.

    Args:
        flags: as os.open takes them.

    Raises:
        OSError: it cannot be opened.
        DataError: it is a link, no regular file, or another user's.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a pipe
            raise
        raise _foreign(path) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(descriptor)
        raise _foreign(path)
    return descriptor


def _foreign(path: Path) -> DataError:
    return DataError(f"{path}: is a link, or not this user's own file; remove it, or give another --store DIR")


def read_own(path: Path, most: int = -1) -> bytes:
    """What a file of a store holds, or the first `most` bytes; raises as `open_own`."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read(most)


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """In the block this process alone adds to a store, or clears it; the folder is made where there is none.

    Raises:
        DataError: as `check_folder`, or it cannot be written.
    """
    while True:
        with explained(folder):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                check_folder(folder)
                descriptor = open_own(folder / LOCK, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # cleared meanwhile
                continue
        with os.fdopen(descriptor, "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process adds to {folder}: waiting until it is done")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(descriptor, folder / LOCK):  # else the folder was cleared meanwhile
                yield
                return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns an OSError in the block into a DataError, one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{folder}: the disk is full; make room and start again, which goes on with what is stored, or give "
                "--store DIR on another disk"
            ) from None
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); give another --store DIR") from None
