"""The server's model store, a folder of archives: whole files only, and one rollout at a time."""

from __future__ import annotations

import fcntl
import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.rollout.archive import Archive
from deploy.rollout.errors import Mistake


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """One rollout at a time in a store. The lock goes with the process that holds it, however that ends."""
    folder = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Mistake(f"{store}: another rollout is under way") from None
    finally:
        os.close(folder)


def is_version(path: Path, version: str) -> bool:
    try:
        return float(Archive.read(path).version) == float(version)
    except Mistake:  # it is not there, or not whole
        return False


def copy_archive(source: Path, target: Path) -> None:
    """Whole or not at all; nobody reads half of an archive."""
    try:
        shutil.copyfile(source, _part(target))
        _part(target).replace(target)
    finally:
        _part(target).unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Hidden, so that no server that loads all archives of a folder takes it for one."""
    return path.with_name(f".{path.name.removeprefix('.')}.part")


def is_same(a: Path, b: Path) -> bool:
    return a.samefile(b) or filecmp.cmp(a, b, shallow=False)
