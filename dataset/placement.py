"""Where decoded images are kept: in memory while they have room there, else in a store on disk; which is said before
anything is written."""

from __future__ import annotations

import os
import shutil
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.decoded_images import free_memory
from dataset.frames import ENCODINGS, MemoryBodies
from dataset.sources import DataError, Source
from dataset.store import ABOUT, StoredBodies, default_root, image_digests, store_folder
from predictor.spec import PixelRule

ASPECT = 4 / 3  # of photographs: what space is reckoned with before any is decoded
JPEG_FACTOR = 4  # photographs take a sixth to a tenth of their pixels' bytes; this is to be safe


@dataclass(frozen=True)
class Wanted:
    """The images of a data set, by their indices, and what is kept of them.

    frames: as whole frames with a short edge of at most `edge` px; 0 where there are none.
    crops: as crops by `rule`.
    """

    frames: Sequence[int]
    crops: Sequence[int]
    edge: int
    rule: PixelRule

    def __len__(self) -> int:
        return len(self.frames) + len(self.crops)

    def bytes(self, encoding: str, rows: Sequence[int] | None = None) -> int:
        """What all take, about; or those of some `rows`, in order, where frames come first."""
        rows = range(len(self)) if rows is None else rows
        frames = bisect_left(rows, len(self.frames))
        crops = len(rows) - frames
        frame = 3 * self.edge * round(self.edge * ASPECT) // (1 if encoding == "raw" else JPEG_FACTOR)
        return frames * frame + crops * 3 * self.rule.height * self.rule.width


def bodies_for(
    data: str, source: Source, wanted: Wanted, where: str, *, processes: int, say: Callable[[str], None]
) -> MemoryBodies | StoredBodies:
    """Where frames and crops are kept: the frames alone, for memory; or both, those first, in a store.

    Args:
        data: as --data has it.
        where: "memory"; the folder of the stores; or "auto", for memory where half of what is free is enough, else the
            default folder. Several processes share frames in a store rather than that each decodes them all.
        processes: how many on this machine keep the same images.

    Raises:
        DataError: they have no room, or a store of such images cannot be had.
    """
    free, can_be_stored = free_memory(processes), source.stamps([]) is not None
    have_room = wanted.bytes("raw") <= free // 2 and (processes == 1 or not wanted.frames)
    if where == "memory" or (where == "auto" and (have_room or not can_be_stored)):
        return _in_memory(wanted, free, say, can_be_stored)
    try:
        return _stored(data, source, wanted, where, say)
    except DataError as error:
        if where != "auto":
            raise
        say(f"no store: {error}")
        return _in_memory(wanted, free, say, can_be_stored)


def _stored(data: str, source: Source, wanted: Wanted, where: str, say: Callable[[str], None]) -> StoredBodies:
    frames, crops = image_digests(source, wanted.frames), image_digests(source, wanted.crops, wanted.rule)
    if frames is None or crops is None:
        raise DataError(f"--store {where}: is for folders, archives and tables of images; leave it out for {data}")
    root = default_root() if where == "auto" else Path(where)
    _check_writable(root)
    edge, colour = wanted.edge, wanted.rule.colour
    folders = {encoding: store_folder(root, data, source.name, edge, encoding, colour) for encoding in ENCODINGS}
    known = next((encoding for encoding, folder in folders.items() if (folder / ABOUT).exists()), None)
    has_room = not wanted.frames or wanted.bytes("raw") <= free_disk(root) // 2
    encoding = known or ("raw" if has_room else "jpeg")
    bodies = StoredBodies(folders[encoding], [*frames, *crops], encoding, data)
    _say_what_is_added(bodies, root, wanted, say)
    return bodies


def free_disk(folder: Path) -> int:
    """Bytes on the disk that a folder is on, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _check_writable(root: Path) -> None:
    """
    Raises:
        DataError: the folder cannot be written, or made.
    """
    try:
        there = _existing(root)
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return
    except OSError:  # a folder on the way may not be entered
        pass
    raise DataError(f"{root}: cannot be written; give another --store DIR")


def _say_what_is_added(bodies: StoredBodies, root: Path, wanted: Wanted, say: Callable[[str], None]) -> None:
    """
    Raises:
        DataError: the disk has no room for what is missing.
    """
    space, fresh = free_disk(root), bodies.fresh
    added, needed = len(fresh), wanted.bytes(bodies.encoding, fresh)
    if needed > space:
        raise DataError(
            f"{root}: has room for {space / 1e9:.1f} GB, and {added:,} images take about {needed / 1e9:.1f} GB "
            "decoded; give --store DIR on another disk, or a smaller --size"
        )
    kind = "as JPEG" if bodies.encoding == "jpeg" and fresh and fresh[0] < len(wanted.frames) else "as pixels"
    rest = f"; {added:,} are added {kind}, about {needed / 1e9:.1f} GB of the {space / 1e9:.1f} GB that are free"
    say(f"{len(wanted) - len(bodies.missing):,} images lie decoded in {bodies.folder}{rest if added else ''}")


def _in_memory(wanted: Wanted, free: int, say: Callable[[str], None], can_be_stored: bool) -> MemoryBodies:
    """The frames; crops that have no room stream from a temporary file (`decoded_images.allocate`)."""
    raw, jpeg = (wanted.bytes(encoding) for encoding in ("raw", "jpeg"))
    encoding = "raw" if raw <= free // 2 else "jpeg"
    if wanted.frames and encoding == "jpeg":
        if jpeg > free // 2:
            way_out = (
                "pass --store DIR" if can_be_stored else "save the images as a folder of class folders, for --store"
            )
            raise DataError(
                f"the images take about {jpeg / 1e9:.1f} GB, the training images as JPEG, over half of the free memory "
                f"({free / 1e9:.1f} GB); {way_out}, or pass a smaller --size"
            )
        say(
            f"the images would take about {raw / 1e9:.1f} GB as pixels, over half of the free memory "
            f"({free / 1e9:.1f} GB): the training images are kept in memory as JPEG, about {jpeg / 1e9:.1f} GB"
        )
    return MemoryBodies(len(wanted.frames), encoding)
