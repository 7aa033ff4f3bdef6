"""Stores of frames on disk, which all processes and runs of a machine share: what one has decoded no other decodes.

A store is a folder below STORES, of one data set, one short edge and one encoding:

    store.json                what it is of
    lock                      held by the process that adds to it; the others wait, and find what it added
    part-0.bin, part-1.bin    frames one after the other, each file up to PART_BYTES; nothing in them is ever changed
    part-0.idx, part-1.idx    RECORDs of the frames in the part of that number

A frame is found by the digest of its image's name and stamp (its file's size and time, or what an archive says of it):
of an image that has changed no frame is found, and it is decoded anew. Frames are written and flushed to disk in
chunks before their records are, so a kill costs no more than the chunk under way. What it leaves unfinished is passed
over by readers, and cut off by who adds next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.frames import ENCODINGS, MemoryBodies, encode
from dataset.image_store import free_memory
from dataset.sources import DataError, Source
from dataset.sources.archives import TarSource, ZipSource
from dataset.sources.folders import FolderSource
from dataset.sources.tables import TableSource
from predictor.files import sync_folder, write_text

VERSION = 1  # of the files, and of what a frame is
PART_BYTES = 4 << 30
CHUNK_BYTES = 64 << 20  # of frames that are written, and flushed, together
ASPECT = 4 / 3  # of photographs: what space is reckoned with before any is decoded
JPEG_FACTOR = 4  # photographs take a sixth to a tenth of their pixels' bytes; this is to be safe
ABOUT, LOCK = "store.json", "lock"
DIGEST_BYTES = 16

# check: CRC-32 of the bytes before it.
RECORD = np.dtype(
    [("digest", "V16"), ("offset", "<u8"), ("length", "<u4"), ("height", "<u4"), ("width", "<u4"), ("check", "<u4")]
)


def default_root() -> Path:
    """Where stores lie unless the user says otherwise: in the cache folder of the XDG base directories."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "classify-and-serve" / "store"


def store_folder(root: Path, data: str, name: str, edge: int, encoding: str) -> Path:
    """The folder of the frames of a data set.

    Args:
        data: as --data has it; name: the data set's, for people.
        edge: px; encoding: as `dataset.frames` has them.
    """
    path = str(Path(data).resolve()) if Path(data).exists() else data
    digest = hashlib.blake2b(json.dumps([VERSION, path, edge, encoding]).encode(), digest_size=4).hexdigest()
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"
    return root / f"{plain[:40]}-{edge}px-{encoding}-{digest}"


def image_digests(data: str, source: Source, indices: Sequence[int]) -> list[bytes] | None:
    """What identifies each of some images, as it is now; None for a source whose images cannot be told apart so."""
    path = Path(data)
    if isinstance(source, (FolderSource, TableSource)):
        folder = path if path.is_dir() else path.parent
        stamps = [_file_stamp(folder / source.entries[i].name) for i in indices]
    elif isinstance(source, ZipSource):
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: f"{member.file_size} {member.CRC}" for member in archive.infolist()}
        stamps = [members[source.entries[i].name] for i in indices]
    elif isinstance(source, TarSource):
        stamps = [_file_stamp(path)] * len(indices)
    else:
        return None
    texts = (f"{source.entries[i].name}\0{stamp}" for i, stamp in zip(indices, stamps, strict=True))
    return [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest() for text in texts]


def _file_stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "none"  # reading it says why
    return f"{found.st_size} {found.st_mtime_ns}"


def bodies_for(
    data: str,
    source: Source,
    indices: Sequence[int],
    edge: int,
    where: str,
    *,
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
        processes: how many on this machine keep the same frames in memory; on disk they share them.

    Raises:
        DataError: they have no room, or a store of such images cannot be had.
    """
    raw, free = len(indices) * 3 * edge * round(edge * ASPECT), free_memory(processes)
    sizes = {"raw": raw, "jpeg": raw // JPEG_FACTOR}
    if where == "memory" or (where == "auto" and raw <= free // 2):
        return _in_memory(len(indices), sizes, free, say)
    digests = image_digests(data, source, indices)
    if digests is None and where == "auto":
        return _in_memory(len(indices), sizes, free, say)
    if digests is None:
        raise DataError(f"--store {where}: is for folders and archives of images; pass --store memory for {data}")
    root = default_root() if where == "auto" else Path(where)
    folders = {encoding: store_folder(root, data, source.name, edge, encoding) for encoding in ENCODINGS}
    known = next((encoding for encoding, folder in folders.items() if (folder / ABOUT).exists()), None)
    space = _free_disk(root)
    encoding = known or ("raw" if sizes["raw"] <= space // 2 else "jpeg")
    bodies = StoredBodies(folders[encoding], digests, encoding, data)
    missing = len(bodies.missing)
    needed = sizes[encoding] * missing // max(1, len(indices))
    if needed > space:
        raise DataError(
            f"{root}: has room for {space / 1e9:.1f} GB, and {missing:,} training images take about "
            f"{needed / 1e9:.1f} GB as whole frames; give --store DIR on another disk, or a smaller --size"
        )
    kind = {"raw": "as pixels", "jpeg": "as JPEG"}[encoding]
    rest = f"; {missing:,} are added {kind}, about {needed / 1e9:.1f} GB of the {space / 1e9:.1f} GB that are free"
    say(f"whole frames of {len(indices) - missing:,} training images lie in {bodies.folder}{rest if missing else ''}")
    return bodies


def _in_memory(count: int, sizes: dict[str, int], free: int, say: Callable[[str], None]) -> MemoryBodies:
    encoding = "raw" if sizes["raw"] <= free // 2 else "jpeg"
    if sizes[encoding] > free // 2:
        raise DataError(
            f"the training images take about {sizes[encoding] / 1e9:.1f} GB as JPEG, over half of the free memory "
            f"({free / 1e9:.1f} GB); pass --store DIR, or a smaller --size"
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
        self._parts = np.zeros(len(digests), np.int32)
        self._files: dict[int, int] = {}  # descriptors, by part
        self._writer: _Writer | None = None
        weakref.finalize(self, _close, self._files)
        self._look()

    @property
    def missing(self) -> list[int]:
        """The rows of which there is no frame."""
        return np.flatnonzero(self.shapes[:, 0] == 0).tolist()

    def __getitem__(self, row: int) -> bytes:
        length = int(self._lengths[row])
        body = os.pread(self._files[int(self._parts[row])], length, int(self._offsets[row]))
        if len(body) != length:
            raise OSError(f"{self.folder}: is cut short; clear it: python -m dataset store --clear {self.folder.name}")
        return body

    def __setitem__(self, row: int, frame: Image.Image) -> None:
        assert self._writer is not None, "frames are added in a `filling` block"
        self._writer.add(self._digests[row], encode(frame, self.encoding), frame.height, frame.width)

    @contextmanager
    def filling(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lets frames be added in the block, by this process alone; `missing` is up to date from its beginning on.

        Args:
            say: is told if another process has to be waited for.

        Raises:
            DataError: the disk is full, or the folder cannot be written. What was added before stays.
        """
        if not self.missing:
            with contextlib.suppress(OSError):  # of another user, who shares it
                os.utime(self.folder / ABOUT)
            yield
            return
        with _locked(self.folder, say):
            with _explained(self.folder):
                write_text(self.folder / ABOUT, json.dumps({"version": VERSION, "data": self._data}) + "\n")
                writer = self._writer = _Writer(self.folder)
            _close(self._files)  # they may have been cleared, and others be in their place
            self.shapes[:] = 0
            self._look()
            try:
                yield
            finally:
                self._writer = None
                try:
                    writer.close()
                finally:
                    self._look()

    def _look(self) -> None:
        """Finds the frames of all rows in the indices."""
        for part, records in _read_indices(self.folder):
            digests = records["digest"].tobytes()
            found = [
                self._row_of.get(digests[start : start + DIGEST_BYTES], -1)
                for start in range(0, len(digests), DIGEST_BYTES)
            ]
            rows = np.array(found, np.int64)
            records, rows = records[rows >= 0], rows[rows >= 0]
            if len(rows) and part not in self._files:
                self._files[part] = os.open(_part(self.folder, part), os.O_RDONLY)
            self.shapes[rows] = np.stack([records["height"], records["width"]], axis=1)
            self._offsets[rows], self._lengths[rows] = records["offset"], records["length"]
            self._parts[rows] = part


class _Writer:
    """Adds frames at the end of a store; for a process that holds its lock, and for several threads of it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mutex = folder, threading.Lock()
        self._failed = False
        self._bodies: list[bytes] = []
        self._rows: list[tuple[bytes, int, int, int]] = []  # digest, length, height, width
        self._pending = 0
        sound = dict(_read_indices(folder))
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
            with _explained(self._folder):
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
            if path.exists() and path.stat().st_size > length:
                os.truncate(path, length)


@dataclass(frozen=True)
class Found:
    """A store on disk; bytes and when it was last used, in seconds since 1970."""

    name: str
    data: str
    images: int
    bytes: int
    used: float


def list_stores(root: Path) -> list[Found]:
    """The stores below a folder, the one that was used last first."""
    found = []
    for about in root.glob(f"*/{ABOUT}"):
        folder = about.parent
        try:
            data = json.loads(about.read_text(encoding="utf-8")).get("data", "")
        except (OSError, ValueError):
            data = ""
        images = sum(len(records) for _, records in _read_indices(folder))
        size = sum(path.stat().st_size for path in folder.iterdir())
        found.append(Found(folder.name, data, images, size, about.stat().st_mtime))
    return sorted(found, key=lambda store: -store.used)


def clear(root: Path, name: str) -> list[Found]:
    """Removes a store, or "all" of them; returns what was removed.

    A process that reads from it keeps what it has opened; one that adds to it is waited for.

    Raises:
        DataError: there is none of this name.
    """
    stores = list_stores(root)
    wanted = [store for store in stores if name in ("all", store.name)]
    if not wanted and name != "all":
        names = ", ".join(store.name for store in stores) or "none"
        raise DataError(f"{root}: has no store {name}; there are: {names}")
    for store in wanted:
        with _locked(root / store.name):
            shutil.rmtree(root / store.name)
    return wanted


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.bin"


def _index(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.idx"


def _read_indices(folder: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The sound records of each part: those before the first that was not finished."""
    numbers = sorted(int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.idx"))
    for number in numbers:
        try:
            body, size = _index(folder, number).read_bytes(), _part(folder, number).stat().st_size
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
    with path.open("ab") as file:
        file.writelines(bodies)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """In the block this process alone adds to a store, or clears it."""
    while True:
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process adds to {folder}: waiting until it is done")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else it was cleared meanwhile
                yield
                return


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{folder}: the disk is full; make room and start again, which goes on with what is stored, or give "
                "--store DIR on another disk"
            ) from None
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); give another --store DIR") from None


def _close(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
