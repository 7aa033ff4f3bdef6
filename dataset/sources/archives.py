"""The layouts of a folder inside an archive, which is read where it lies and never unpacked to disk."""

from __future__ import annotations

import contextlib
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO

from dataset.sources.base import DataError, ImageInput, Unreadable, chosen
from dataset.sources.folders import DAMAGE, MAX_FILE_BYTES, TOO_LARGE, file_stamp, read_guarded
from dataset.sources.layout import is_image, read_layout

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
KEPT_BYTES = 128 << 20  # of a .tar's images, which are kept while it is read


class ZipSource:
    """The same layout inside a .zip."""

    flips = True

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name.split(".")[0], path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, UnicodeDecodeError, struct.error) as error:
            raise DataError(f"{path}: damaged ({error}); make or fetch it anew") from None
        if any(member.flag_bits & 1 for member in members):
            raise DataError(f"{path}: is encrypted; unpack it and give the folder")
        files = [m.filename for m in members if not m.is_dir()]
        folders = [m.filename for m in members if m.is_dir()]
        self.entries, self.labels = read_layout(str(path), files, folders, may_be_wrapped=True)

    def read(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, ImageInput]]:
        with zipfile.ZipFile(self._path) as archive:
            for i in chosen(self.entries, wanted):
                name = self.entries[i].name
                yield i, read_guarded(name, archive.getinfo(name).file_size, archive.read)

    def peek(self, indices: Sequence[int]) -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(self._path) as archive:
            for i in indices:
                with contextlib.suppress(OSError, *DAMAGE), archive.open(self.entries[i].name) as file:
                    yield file

    def stamps(self, indices: Sequence[int]) -> list[str]:
        with zipfile.ZipFile(self._path) as archive:
            members = (archive.getinfo(self.entries[i].name) for i in indices)
            return [f"{member.file_size} {member.CRC}" for member in members]


class TarSource:
    """The same layout inside a .tar, compressed or not, read as a stream."""

    flips = True

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name.split(".")[0], path
        files: list[str] = []
        folders: list[str] = []
        self._linked: dict[str, str] = {}  # hard links: name to the name of the member that holds the bytes
        self._kept: dict[str, bytes] = {}  # all images' files, if they have room: so they are unpacked only once
        room = KEPT_BYTES
        for member, body in self._members(lambda one: is_image(one.name) and one.size <= KEPT_BYTES):
            (folders if member.isdir() else files).append(member.name)
            if member.islnk():
                self._linked[member.name] = self._linked.get(member.linkname, member.linkname)
            elif member.isreg() and is_image(member.name):
                room -= member.size
                if room < 0:
                    self._kept.clear()
                else:
                    self._kept.setdefault(member.name, body)
        self.entries, self.labels = read_layout(str(path), files, folders, may_be_wrapped=True)

    def read(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, ImageInput]]:
        holding: dict[str, list[int]] = defaultdict(list)  # indices of the images whose bytes a member holds
        for i in chosen(self.entries, wanted):
            name = self.entries[i].name
            holding[self._linked.get(name, name)].append(i)
        if holding.keys() <= self._kept.keys():
            yield from ((i, self._kept[name]) for name, indices in holding.items() for i in indices)
            return
        for member, body in self._members(lambda one: one.name in holding):
            if member.isreg():
                image = body if member.size <= MAX_FILE_BYTES else Unreadable(TOO_LARGE)
                yield from ((i, image) for i in holding.pop(member.name, []))
        missing = Unreadable("a hard link to what the archive does not hold")
        yield from ((i, missing) for indices in holding.values() for i in indices)

    def peek(self, indices: Sequence[int]) -> Iterator[IO[bytes]]:
        if self._kept:
            kept = (self._kept.get(self._linked.get(name, name)) for name in (self.entries[i].name for i in indices))
            yield from (io.BytesIO(body) for body in kept if body is not None)
            return
        names = {entry.name for entry in self.entries}
        bodies = (body for member, body in self._members(lambda one: one.name in names) if member.name in names)
        yield from (io.BytesIO(body) for body in islice(bodies, len(indices)))

    def stamps(self, indices: Sequence[int]) -> list[str]:
        if self._kept:
            names = (self.entries[i].name for i in indices)
            bodies = (self._kept.get(self._linked.get(name, name), b"") for name in names)
            return [f"{len(body)} {zlib.crc32(body)}" for body in bodies]
        return [file_stamp(self._path)] * len(indices)  # what the archive says of its members is often made up

    def _members(self, wanted: Callable[[tarfile.TarInfo], bool]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        """Files, hard links and folders, one after the other, with the bytes of those files that are wanted; symbolic
        links and devices are passed over."""
        try:
            with tarfile.open(self._path, "r|*") as archive:
                for member in archive:
                    if member.isreg() or member.islnk() or member.isdir():
                        holds = member.isreg() and member.size <= MAX_FILE_BYTES and wanted(member)
                        file = archive.extractfile(member) if holds else None
                        yield member, b"" if file is None else file.read()
        except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            kinds = ", ".join(ARCHIVES)
            raise DataError(f"{self._path}: not an archive, or damaged ({error}); give one of {kinds}") from None
