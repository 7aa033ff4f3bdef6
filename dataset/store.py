"""Stores of frames on disk, which all processes and runs of a machine share: what one has decoded no other decodes.

A store is a folder below STORES, of one data set, one short edge and one encoding:

    store.json                what it is of
    lock                      held by the process that adds to it; the others wait, and find what it added
    part-0.bin, part-1.bin    frames one after the other, each file up to PART_BYTES; nothing in them is ever changed
    part-0.idx, part-1.idx    RECORDs of the frames in the part of that number

A frame is found by the digest of its image's name and stamp (its file's size and time, or what an archive says of it):
of an image that has changed no frame is found, and it is decoded anew. The frame that it had stays until the store is
cleared. A record without a frame says that the image could not be read: it is tried again, but nobody waits for it.

Frames are written and flushed to disk in chunks before their records are, so a kill costs no more than the chunk under
way. What it leaves unfinished is passed over by readers, and cut off by who adds next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.frames import ENCODINGS, MemoryBodies, encode
from dataset.image_store import free_memory
from dataset.sources import DataError, Source
from dataset.store_files import check_folder, explained, locked, open_own, read_own
from predictor.files import sync_folder, write_text

VERSION = 2  # of the files, and of what a frame is
PART_BYTES = 4 << 30
CHUNK_BYTES = 64 << 20  # of frames that are written, and flushed, together
ASPECT = 4 / 3  # of photographs: what space is reckoned with before any is decoded
JPEG_FACTOR = 4  # photographs take a sixth to a tenth of their pixels' bytes; this is to be safe
ABOUT = "store.json"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*-[0-9]+px-(raw|jpeg)-[0-9a-f]{8}")  # as `store_folder` makes them
DIGEST_BYTES = 16

# check: CRC-32 of the bytes before it.
RECORD = np.dtype(
    [("digest", "V16"), ("offset", "<u8"), ("length", "<u4"), ("height", "<u4"), ("width", "<u4"), ("check", "<u4")]
)


def default_root() -> Path:
    """Where stores lie unless the user says otherwise: in the cache folder of the XDG base directories."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "classify-and-serve" / "store"


def store_folder(root: Path, data: str, name: str, edge: int, encoding: str, colour: str) -> Path:
    """The folder of the frames of a data set.

    Args:
        data: as --data has it; name: the data set's, for people.
        edge: px; encoding: as `dataset.frames` has them.
        colour: as the pixel rule has it.
    """
    path = str(Path(data).resolve()) if Path(data).exists() else data
    key = json.dumps([VERSION, path, edge, encoding, colour])
    digest = hashlib.blake2b(key.encode(), digest_size=4).hexdigest()
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"
    return root / f"{plain[:40]}-{edge}px-{encoding}-{digest}"


def image_digests(source: Source, indices: Sequence[int]) -> list[bytes] | None:
    """What identifies each of some images, as it is now; None for a source whose images cannot be told apart so."""
    stamps = source.stamps(indices)
    if stamps is None:
        return None
    texts = (f"{source.entries[i].name}\0{stamp}" for i, stamp in zip(indices, stamps, strict=True))
    return [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest() for text in texts]


def bodies_for(
    data: str,
    source: Source,
    indices: Sequence[int],
    edge: int,
    where: str,
    *,
    colour: str,
    processes: int,
    say: Callable[[str], None],
) -> MemoryBodies | StoredBodies:
    """Where the frames of some images are kept: in memory, or in a store on disk; it is said before it is written.

    Args:
        data: as --data has it.
        indices: of the images, one for each row.
        edge: px, of the frames' short edges.
        where: "memory"; the folder of the stores; or "auto", for memory where half of what is free is enough, else the
            default folder.
        colour: as the pixel rule has it.
        processes: how many on this machine keep the same frames in memory; on disk they share them.

    Raises:
        DataError: they have no room, or a store of such images cannot be had.
    """
    raw, free = len(indices) * 3 * edge * round(edge * ASPECT), free_memory(processes)
    sizes = {"raw": raw, "jpeg": raw // JPEG_FACTOR}
    can_be_stored = source.stamps([]) is not None
    if where == "memory" or (where == "auto" and (raw <= free // 2 or not can_be_stored)):
        return _in_memory(len(indices), sizes, free, say, can_be_stored)
    digests = image_digests(source, indices)
    if digests is None:
        raise DataError(f"--store {where}: is for folders, archives and tables of images; leave it out for {data}")
    root = default_root() if where == "auto" else Path(where)
    folders = {encoding: store_folder(root, data, source.name, edge, encoding, colour) for encoding in ENCODINGS}
    known = next((encoding for encoding, folder in folders.items() if (folder / ABOUT).exists()), None)
    encoding = known or ("raw" if sizes["raw"] <= _free_disk(root) // 2 else "jpeg")
    bodies = StoredBodies(folders[encoding], digests, encoding, data)
    _say_what_is_added(bodies, root, sizes[encoding], say)
    return bodies


def _say_what_is_added(bodies: StoredBodies, root: Path, size: int, say: Callable[[str], None]) -> None:
    """
    Args:
        size: bytes that all frames take.

    Raises:
        DataError: the disk has no room for what is missing.
    """
    space, count, added = _free_disk(root), len(bodies.shapes), len(bodies.fresh)
    needed = size * added // max(1, count)
    if needed > space:
        raise DataError(
            f"{root}: has room for {space / 1e9:.1f} GB, and {added:,} training images take about "
            f"{needed / 1e9:.1f} GB as whole frames; give --store DIR on another disk, or a smaller --size"
        )
    kind = {"raw": "as pixels", "jpeg": "as JPEG"}[bodies.encoding]
    rest = f"; {added:,} are added {kind}, about {needed / 1e9:.1f} GB of the {space / 1e9:.1f} GB that are free"
    say(
        f"whole frames of {count - len(bodies.missing):,} training images lie in {bodies.folder}{rest if added else ''}"
    )


def _in_memory(
    count: int, sizes: dict[str, int], free: int, say: Callable[[str], None], can_be_stored: bool
) -> MemoryBodies:
    encoding = "raw" if sizes["raw"] <= free // 2 else "jpeg"
    if sizes[encoding] > free // 2:
        way_out = "pass --store DIR" if can_be_stored else "save the images as a folder of class folders, for --store"
        raise DataError(
            f"the training images take about {sizes[encoding] / 1e9:.1f} GB as JPEG, over half of the free memory "
            f"({free / 1e9:.1f} GB); {way_out}, or pass a smaller --size"
        )
    if encoding == "jpeg":
        say(
            f"the training images would take about {sizes['raw'] / 1e9:.1f} GB as pixels, over half of the free memory "
            f"({free / 1e9:.1f} GB): they are kept in memory as JPEG, about {sizes['jpeg'] / 1e9:.1f} GB"
        )
    return MemoryBodies(count, encoding)


def _free_disk(folder: Path) -> int:
    """Bytes on the disk that a folder is on, or will be."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


class StoredBodies:
    """`dataset.frames.Bodies` in a store, read when they are asked for; in a `filling` block frames may be added.

    They are read, and not mapped into memory: see `FilePixels`.

    Args:
        digests: of the image of each row, as `image_digests` gives them.
        data: for people, what the images are of.
    """

    def __init__(self, folder: Path, digests: Sequence[bytes], encoding: str, data: str = "") -> None:
        self.folder, self.encoding, self._data = folder, encoding, data
        self.shapes = np.zeros((len(digests), 2), np.int32)
        self._row_of = {digest: row for row, digest in enumerate(digests)}
        self._digests = digests
        self._offsets, self._lengths = np.zeros(len(digests), np.int64), np.zeros(len(digests), np.int64)
        self._parts, self._bad = np.zeros(len(digests), np.int32), np.zeros(len(digests), bool)
        self._files: dict[int, int] = {}  # descriptors, by part
        self._mutex, self._held = threading.Lock(), contextlib.ExitStack()  # the latter with the lock of the store
        self._writer: _Writer | None = None
        self._say: Callable[[str], None] = lambda line: None
        weakref.finalize(self, _close, self._files)
        self._look()

    @property
    def missing(self) -> list[int]:
        """The rows of which there is no frame."""
        return np.flatnonzero(self.shapes[:, 0] == 0).tolist()

    @property
    def fresh(self) -> list[int]:
        """The missing rows of which the store does not say either that their image could not be read."""
        return np.flatnonzero((self.shapes[:, 0] == 0) & ~self._bad).tolist()

    def __getitem__(self, row: int) -> bytes:
        length = int(self._lengths[row])
        body = os.pread(self._files[int(self._parts[row])], length, int(self._offsets[row]))
        if len(body) != length:
            raise OSError(f"{self.folder}: is cut short; clear it: python -m dataset store --clear {self.folder.name}")
        return body

    def __setitem__(self, row: int, frame: Image.Image) -> None:
        body = encode(frame, self.encoding)
        self._writing().add(self._digests[row], body, frame.height, frame.width)

    def leave_out(self, rows: Sequence[int]) -> None:
        """Keeps in mind that the images of these rows cannot be read, in a `filling` block."""
        for row in set(rows).intersection(self.fresh):
            self._writing().add(self._digests[row], b"", 0, 0)

    @contextmanager
    def filling(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lets frames be added in the block; `missing` is up to date from its beginning on.

        By this process alone if there are fresh rows; else the others need not wait, unless one is added.

        Args:
            say: is told if another process has to be waited for.

        Raises:
            DataError: the disk is full, or the folder cannot be written. What was added before stays.
        """
        self._say = say
        try:
            if self.fresh:
                self._writing()
                if not self.fresh:  # another process has added them
                    self._finish()
            else:
                with contextlib.suppress(OSError):
                    os.utime(self.folder / ABOUT, follow_symlinks=False)
            yield
        finally:
            self._finish()

    def _writing(self) -> _Writer:
        """Takes the lock, unless this process has it, and looks at what others have added meanwhile."""
        with self._mutex:
            if self._writer is None:
                self._held.enter_context(locked(self.folder, self._say))
                with explained(self.folder):
                    write_text(self.folder / ABOUT, json.dumps({"version": VERSION, "data": self._data}) + "\n")
                    self._writer = _Writer(self.folder)
                self._look()
            return self._writer

    def _finish(self) -> None:
        """Writes what is left, and gives the lock back."""
        writer, self._writer = self._writer, None
        with self._held:
            if writer is not None:
                try:
                    writer.close()
                finally:
                    self._look()

    def _look(self) -> None:
        """Finds the frames of all rows in the indices."""
        _close(self._files)  # the store may have been cleared, and another be in its place
        self.shapes[:], self._bad[:] = 0, False
        for part, records in read_indices(self.folder):
            digests = records["digest"].tobytes()
            found = [
                self._row_of.get(digests[start : start + DIGEST_BYTES], -1)
                for start in range(0, len(digests), DIGEST_BYTES)
            ]
            rows = np.array(found, np.int64)
            records, rows = records[rows >= 0], rows[rows >= 0]
            if not len(rows):
                continue
            try:
                self._files[part] = open_own(_part(self.folder, part), os.O_RDONLY)
            except FileNotFoundError:  # cleared meanwhile
                continue
            self.shapes[rows] = np.stack([records["height"], records["width"]], axis=1)
            self._offsets[rows], self._lengths[rows] = records["offset"], records["length"]
            self._parts[rows], self._bad[rows] = part, records["height"] == 0


class _Writer:
    """Adds frames at the end of a store; for a process that holds its lock, and for several threads of it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mutex = folder, threading.Lock()
        self._failed = False
        self._bodies: list[bytes] = []
        self._rows: list[tuple[bytes, int, int, int]] = []  # digest, length, height, width
        self._pending = 0
        sound = dict(read_indices(folder))
        self._part = max(sound, default=0)
        records = sound.get(self._part, np.zeros(0, RECORD))
        self._records = len(records)
        self._end = int((records["offset"] + records["length"]).max(initial=0))
        self._cut()

    def add(self, digest: bytes, body: bytes, height: int, width: int) -> None:
        with self._mutex:
            if self._failed:  # in another thread: it is said once
                return
            self._bodies.append(body)
            self._rows.append((digest, len(body), height, width))
            self._pending += len(body)
            if self._pending >= CHUNK_BYTES:
                self._flush()

    def close(self) -> None:
        """Writes what is left, unless `add` has failed."""
        with self._mutex:
            if self._rows and not self._failed:
                self._flush()

    def _flush(self) -> None:
        try:
            with explained(self._folder):
                self._write()
        except DataError:
            self._failed = True
            self._cut()
            raise
        self._bodies, self._rows, self._pending = [], [], 0

    def _write(self) -> None:
        if self._end >= PART_BYTES:
            self._part, self._end, self._records = self._part + 1, 0, 0
            self._cut()
        records = np.zeros(len(self._rows), RECORD)
        lengths = np.array([length for _, length, _, _ in self._rows], np.int64)
        records["digest"] = np.frombuffer(b"".join(digest for digest, *_ in self._rows), "V16")
        records["offset"] = self._end + np.cumsum(lengths) - lengths
        records["length"] = lengths
        records["height"] = [height for _, _, height, _ in self._rows]
        records["width"] = [width for _, _, _, width in self._rows]
        records["check"] = _checks(records)
        _append(_part(self._folder, self._part), self._bodies)
        _append(_index(self._folder, self._part), [records.tobytes()])
        sync_folder(self._folder)
        self._end += int(lengths.sum())
        self._records += len(records)

    def _cut(self) -> None:
        """Cuts off what was not finished, by this process or one that was killed."""
        for path, length in (
            (_part(self._folder, self._part), self._end),
            (_index(self._folder, self._part), self._records * RECORD.itemsize),
        ):
            with contextlib.suppress(FileNotFoundError), os.fdopen(open_own(path, os.O_RDWR), "r+b") as file:
                if file.seek(0, os.SEEK_END) > length:
                    file.truncate(length)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.bin"


def _index(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.idx"


def read_indices(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The sound records of each part: those before the first that was not finished.

    Raises:
        DataError: the folder, or a file in it, is another user's or a link.
    """
    try:
        check_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    found = (re.fullmatch(r"part-([0-9]{1,9})\.idx", path.name) for path in folder.glob("part-*.idx"))
    for number in sorted(int(one[1]) for one in found if one):
        try:
            body, size = read_own(_index(folder, number)), _part(folder, number).lstat().st_size
        except FileNotFoundError:  # cleared meanwhile
            continue
        records = np.frombuffer(body[: len(body) // RECORD.itemsize * RECORD.itemsize], RECORD)
        sound = (records["check"] == _checks(records)) & (records["offset"] + records["length"] <= size)
        yield number, records if sound.all() else records[: int(sound.argmin())]


def _checks(records: np.ndarray) -> np.ndarray:
    """uint32: the CRC-32 of each record without its last field."""
    body, step = records.tobytes(), RECORD.itemsize
    return np.array([zlib.crc32(body[at : at + step - 4]) for at in range(0, len(body), step)], np.uint32)


def _append(path: Path, bodies: Sequence[bytes]) -> None:
    """Writes at the end of a file, and waits until the disk has it."""
    with os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.writelines(bodies)
        file.flush()
        os.fsync(file.fileno())


def _close(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
