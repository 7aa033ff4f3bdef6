"""Stores on disk, which all processes and runs of a machine share: what one has decoded no other decodes.

A store is a folder of one data set: of whole frames of one short edge and one encoding, and of the crops that pixel
rules make of other images, as pixels.

    store.json                what it is of
    lock                      held by the process that adds to it; the others wait, and find what it added
    part-0.bin, part-1.bin    images one after the other, each file up to PART_BYTES; nothing in them is ever changed
    part-0.idx, part-1.idx    RECORDs of the images in the part of that number

An image is found by the digest of its name and stamp (its file's size and time, or what an archive says of it), and of
the rule if it is a crop: of one that has changed nothing is found, and it is decoded anew. What there was of it stays
until the store is cleared. A record without pixels says that the image could not be read: it is tried again, but
nobody waits for it.

Images are written and flushed to disk in chunks before their records are, so a kill costs no more than the chunk under
way. What it leaves unfinished is passed over by readers, and cut off by who adds next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from torch import Tensor

from dataset.decoded_images import StreamedPixels
from dataset.frames import encode
from dataset.sources import DataError, Source
from dataset.store_files import check_folder, explained, locked, open_own, read_own
from predictor.files import sync_folder, write_text
from predictor.spec import PixelRule

VERSION = 2  # of the files, and of what a frame is
PART_BYTES = 4 << 30
CHUNK_BYTES = 64 << 20  # of images that are written, and flushed, together
ABOUT = "store.json"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*-[0-9]+px-(raw|jpeg)-[0-9a-f]{8}")  # as `store_folder` makes them
DIGEST_BYTES = 16

# check: CRC-32 of the bytes before it.
RECORD = np.dtype(
    [("digest", "V16"), ("offset", "<u8"), ("length", "<u4"), ("height", "<u4"), ("width", "<u4"), ("check", "<u4")]
)


def default_root() -> Path:
    """Where stores lie unless the user says otherwise: in the cache folder of the XDG base directories.

    Raises:
        DataError: the user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(cache).expanduser() / "classify-and-serve" / "store"
    except RuntimeError as error:
        raise DataError(f"{cache}: {error}; set HOME or XDG_CACHE_HOME, or give --store DIR") from None


def store_folder(root: Path, data: str, name: str, edge: int, encoding: str, colour: str) -> Path:
    """The folder of the store of a data set.

    Args:
        data: as --data has it; name: the data set's, for people.
        edge: px, 0 where it holds crops alone; encoding: of its frames, as `dataset.frames` has them.
        colour: as the pixel rule has it.
    """
    path = str(Path(data).resolve()) if Path(data).exists() else data
    key = json.dumps([VERSION, path, edge, encoding, colour])
    digest = hashlib.blake2b(key.encode(), digest_size=4).hexdigest()
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"
    return root / f"{plain[:40]}-{edge}px-{encoding}-{digest}"


def image_digests(source: Source, indices: Sequence[int], rule: PixelRule | None = None) -> list[bytes] | None:
    """What identifies each of some images, as it is now; None for a source whose images cannot be told apart so.

    Args:
        rule: of their crops; without it they are whole frames.
    """
    stamps = source.stamps(indices)
    if stamps is None:
        return None
    # Crops are those of the endpoint to the bit; and a decoder's next version may round otherwise.
    kind = f"\0{rule!r} Pillow {PIL.__version__}" if rule else ""
    texts = (f"{source.entries[i].name}\0{stamp}{kind}" for i, stamp in zip(indices, stamps, strict=True))
    return [hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest() for text in texts]


class StoredBodies:
    """`dataset.frames.Bodies` in a store, read when they are asked for; in a `filling` block some may be added.

    They are read, and not mapped into memory: see `StreamedPixels`.

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
        """The rows of which the store holds nothing."""
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
        self.add(row, encode(frame, self.encoding), frame.height, frame.width)

    def add(self, row: int, body: bytes, height: int, width: int) -> None:
        """
        Args:
            body: as `__getitem__` will return it.
        """
        self._writing().add(self._digests[row], body, height, width)

    def leave_out(self, rows: Sequence[int]) -> None:
        """Keeps in mind that the images of these rows cannot be read, in a `filling` block."""
        for row in set(rows).intersection(self.fresh):
            self._writing().add(self._digests[row], b"", 0, 0)

    @contextmanager
    def filling(self, say: Callable[[str], None]) -> Iterator[None]:
        """Lets images be added in the block; `missing` is up to date from its beginning on.

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
        """Finds all rows in the indices."""
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


class StoredCrops(StreamedPixels):
    """`StreamedPixels` among the images of a store: what the pixel rule makes of those from row `first` on."""

    def __init__(self, bodies: StoredBodies, first: int, rule: PixelRule) -> None:
        super().__init__(len(bodies.shapes) - first, rule.height, rule.width)
        self._bodies, self._first = bodies, first

    def __setitem__(self, row: int, crop: Tensor) -> None:
        height, width, _ = crop.shape
        if not self._bodies.shapes[self._first + row].any():  # else it is there
            self._bodies.add(self._first + row, crop.contiguous().numpy().tobytes(), height, width)

    def _read_row(self, row: int, view: np.ndarray) -> None:
        view[:] = np.frombuffer(self._bodies[self._first + row], np.uint8).reshape(view.shape)


class _Writer:
    """Adds images at the end of a store; for a process that holds its lock, and for several threads of it."""

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
