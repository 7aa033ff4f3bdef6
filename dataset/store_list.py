"""The stores of decoded images that are on this machine: what they are of, and how they are cleared."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from dataset.sources import DataError, printable
from dataset.store import ABOUT, NAME, read_indices
from dataset.store_files import check_folder, locked, read_own

ABOUT_BYTES = 1 << 16  # of it at the most
CLEARED = re.compile(rf"\.{NAME.pattern}-cleared-[0-9a-f]{{8}}")
FILES = re.compile(r"store\.json|\.store\.json\.\w{8}\.tmp|lock|part-[0-9]+\.(bin|idx)")


@dataclass(frozen=True)
class Found:
    """A store on disk; bytes and when it was last used, in seconds since 1970.

    version: 0 where its store.json is damaged, which says nothing of the data then.
    """

    name: str
    data: str
    version: int
    images: int  # those of images that have changed or gone among them
    bytes: int
    used: float


def list_stores(root: Path) -> list[Found]:
    """This user's stores below a folder, the one that was used last first; what is none is passed over."""
    found = []
    for about in root.glob(f"*/{ABOUT}"):
        folder = about.parent
        with contextlib.suppress(FileNotFoundError, DataError):  # cleared meanwhile, or not ours
            if NAME.fullmatch(folder.name):
                check_folder(folder)
                version, data = _read_about(about)
                images = sum(int((records["height"] > 0).sum()) for _, records in read_indices(folder))
                size = sum(path.lstat().st_size for path in folder.iterdir())
                found.append(Found(folder.name, data, version, images, size, about.lstat().st_mtime))
    return sorted(found, key=lambda store: -store.used)


def _read_about(path: Path) -> tuple[int, str]:
    """The version of a store and what it is of; 0 and nothing where the file is damaged."""
    try:
        values = json.loads(read_own(path, ABOUT_BYTES))
    except (ValueError, RecursionError):
        return 0, ""
    version, data = (values.get("version"), values.get("data")) if isinstance(values, dict) else (0, "")
    return (version, data) if isinstance(version, int) and isinstance(data, str) else (0, "")


def clear(root: Path, name: str) -> list[Found]:
    """Removes a store, or "all" whose store.json is sound; returns what was removed.

    A process that reads from it keeps what it has opened; one that adds to it is waited for. Nothing but the files of a
    store is removed: it is first called by another name, so that a run that starts finds all of it or nothing.

    Raises:
        DataError: there is none of this name, or its folder holds something else.
    """
    for left in root.glob(".*-cleared-*"):  # of a clearing that was killed
        with contextlib.suppress(DataError):  # another user's
            if CLEARED.fullmatch(left.name):
                _remove(left)
    stores = list_stores(root)
    wanted = [store for store in stores if name == store.name or (name == "all" and store.version)]
    if not wanted and name != "all":
        names = ", ".join(store.name for store in stores) or "none"
        raise DataError(f"{root}: has no store {printable(name)}; there are: {names}")
    for store in wanted:
        folder, hidden = root / store.name, root / f".{store.name}-cleared-{secrets.token_hex(4)}"
        with locked(folder):
            if others := sorted(path.name for path in folder.iterdir() if not FILES.fullmatch(path.name)):
                raise DataError(f"{folder}: holds {printable(others[0])}, which is no part of a store; move it out")
            folder.rename(hidden)
            _remove(hidden)
    return wanted


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process clears, too
        check_folder(folder)
        for path in folder.iterdir():
            if FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder.rmdir()
