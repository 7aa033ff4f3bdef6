"""Where labelled images come from: bundled and downloaded data sets, folders, and archives read in where.

A source lists its images first (`entries`) and reads them afterwards, once, in its own order (`read`), so that a
compressed archive is never unpacked to disk.
"""

from __future__ import annotations

import difflib
import lzma
import os
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from predictor.pillow_preprocessing import SUFFIXES

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
KEPT_BYTES = 128 << 20  # of a .tar's images, which are kept while it is read
MAX_FILE_BYTES = 256 << 20  # of one image file: what is larger is a mistake, or a bomb
TOO_LARGE = f"the file is larger than {MAX_FILE_BYTES >> 20} MiB"

# Suffixes of images that are not read here: listed as unreadable, not passed over in silence.
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".psd", ".svg", ".jp2", ".jxl", ".cr2", ".nef", ".dng")


@dataclass(frozen=True)
class Unreadable:
    """Stands for the image of a file that could not be read."""

    reason: str


ImageInput = bytes | Image.Image | Unreadable


class DataError(ValueError):
    """Data that cannot be trained on. The message names the data, the rule and the way out."""


@dataclass(frozen=True)
class Entry:
    """One labelled image.

    name: where the source finds it.
    split: "train", "val", "test", or "" where the data does not say.
    key: what it is called wherever the data lies and however it is packed: its path below the data's root or an
        archive's wrapping folder, with `/`, in Unicode's composed form (NFC). By default the name.
    """

    name: str
    label: str
    split: str
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.name)


class Source(Protocol):
    name: str
    labels: list[str]
    entries: list[Entry]
    flips: bool  # whether a mirrored image keeps its label

    def read(self) -> Iterator[tuple[int, ImageInput]]:
        """Every image once, as its index in `entries` and its file's bytes, its pixels, or why it has none."""


def open_source(data: str, download_dir: str = "data") -> Source:
    """The source that `--data` names.

    Raises:
        DataError: there is none, or its layout breaks a rule.
    """
    if data in BUILT_IN:
        return BUILT_IN[data](data, download_dir)
    path = Path(data)
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        if zipfile.is_zipfile(path):
            return ZipSource(path)
        return TarSource(path)
    close = difflib.get_close_matches(data, BUILT_IN, n=1)
    hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(BUILT_IN)}, a folder, or an archive"
    raise DataError(f"--data {data}: no such data set, folder or archive; {hint}")


class ArraySource:
    """Images that lie in memory as uint8 arrays (H, W) or (H, W, 3)."""

    def __init__(self, name: str, labels: list[str], splits: dict[str, tuple[np.ndarray, np.ndarray]], flips: bool):
        self.name, self.labels, self.flips = name, labels, flips
        self._images = [image for images, _ in splits.values() for image in images]
        self.entries = [
            Entry(f"{split}/{i:05}.png", labels[target], split, key=f"{split}/{labels[target]}/{i:05}.png")
            for split, (_, targets) in splits.items()
            for i, target in enumerate(targets)
        ]

    def read(self) -> Iterator[tuple[int, ImageInput]]:
        for i, pixels in enumerate(self._images):
            yield i, Image.fromarray(pixels).convert("RGB")


def _digits(name: str, _: str) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8×8 px, 17 grey levels; a fifth of each class is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    pixels = np.round(bundle.images * (255 / 16)).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, bundle.target, test_size=0.2, random_state=0, stratify=bundle.target
    )
    labels = [str(digit) for digit in range(10)]
    return ArraySource(name, labels, {"train": (train_x, train_y), "test": (test_x, test_y)}, flips=False)


def _torchvision(name: str, download_dir: str) -> Source:
    from torchvision import datasets

    kind = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
    }[name]
    splits = {}
    try:
        for split in ("train", "test"):
            part = kind(download_dir, train=split == "train", download=True)
            splits[split] = (np.asarray(part.data), np.asarray(part.targets))
    except (OSError, RuntimeError) as error:  # URLError, or "not found or corrupted"
        raise DataError(
            f"--data {name}: cannot be downloaded ({error}); fetch it where there is a network and copy it to "
            f"{download_dir}/, or give your own folder or archive of images"
        ) from None
    return ArraySource(name, list(part.classes), splits, flips=name != "mnist")


BUILT_IN = {
    "digits": _digits,
    "cifar10": _torchvision,
    "cifar100": _torchvision,
    "mnist": _torchvision,
    "fashion-mnist": _torchvision,
}


class FolderSource:
    """DIR/CLASS/* or DIR/{train,val,test}/CLASS/*."""

    flips = True

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.resolve().name, path
        files, folders = _walk(path)
        self.entries, self.labels = _layout(str(path), files, folders)

    def read(self) -> Iterator[tuple[int, ImageInput]]:
        for i, entry in enumerate(self.entries):
            yield i, _read_file(self._path / entry.name)


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
        self.entries, self.labels = _layout(str(path), files, folders, may_be_wrapped=True)

    def read(self) -> Iterator[tuple[int, ImageInput]]:
        with zipfile.ZipFile(self._path) as archive:
            for i, entry in enumerate(self.entries):
                yield i, _read(entry.name, archive.getinfo(entry.name).file_size, archive.read)


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
        for member, body in self._members(lambda one: _is_image(one.name) and one.size <= KEPT_BYTES):
            (folders if member.isdir() else files).append(member.name)
            if member.islnk():
                self._linked[member.name] = self._linked.get(member.linkname, member.linkname)
            elif member.isreg() and _is_image(member.name):
                room -= member.size
                if room < 0:
                    self._kept.clear()
                else:
                    self._kept.setdefault(member.name, body)
        self.entries, self.labels = _layout(str(path), files, folders, may_be_wrapped=True)

    def read(self) -> Iterator[tuple[int, ImageInput]]:
        wanted: dict[str, list[int]] = defaultdict(list)  # indices of the images whose bytes a member holds
        for i, entry in enumerate(self.entries):
            wanted[self._linked.get(entry.name, entry.name)].append(i)
        if wanted.keys() <= self._kept.keys():
            yield from ((i, self._kept[name]) for name, indices in wanted.items() for i in indices)
            return
        for member, body in self._members(lambda one: one.name in wanted):
            if member.isreg():
                image = body if member.size <= MAX_FILE_BYTES else Unreadable(TOO_LARGE)
                yield from ((i, image) for i in wanted.pop(member.name, []))
        missing = Unreadable("a hard link to what the archive does not hold")
        yield from ((i, missing) for indices in wanted.values() for i in indices)

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


def _read_file(path: Path) -> bytes | Unreadable:
    try:
        if path.is_file():
            return _read(path, path.stat().st_size, Path.read_bytes)
        return Unreadable("a link to nothing" if path.is_symlink() else "not a regular file")  # a pipe holds its reader
    except OSError as error:  # a folder that may be listed and not entered
        return Unreadable(f"the file cannot be read ({error.strerror or error})")


def _read(name: Any, size: int, read: Callable[[Any], bytes]) -> bytes | Unreadable:
    """The file's bytes, or why it has none: it cannot be opened, is damaged in its archive, or far too large."""
    if size > MAX_FILE_BYTES:
        return Unreadable(TOO_LARGE)
    try:
        return read(name)
    except OSError as error:
        return Unreadable(f"the file cannot be read ({error.strerror or error})")
    except (
        *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError),
        *(NotImplementedError, RuntimeError, ValueError, MemoryError),  # other methods, lengths and names that lie
    ) as error:
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
        children[:] = sorted(child for child in children if not _is_hidden((child,)))
        base = Path(folder).relative_to(root)
        folders += [(base / child).as_posix() for child in children]
        files += [(base / name).as_posix() for name in sorted(names)]
    return files, folders


def _layout(
    where: str, files: list[str], folders: list[str], may_be_wrapped: bool = False
) -> tuple[list[Entry], list[str]]:
    """Splits and classes from paths.

    Raises:
        DataError: no images, images outside any class, one class only, an empty class, two spellings of a class,
            or a class that only val or test has.
    """
    images = [name for name in files if _is_image(name)]
    if not images:
        raise DataError(f"{where}: no images found; the layout is CLASS/*.jpg or {{train,val,test}}/CLASS/*.jpg")
    parts = {name: _parts(name) for name in images}
    skip = _wrapping(parts.values()) if may_be_wrapped else 0
    split_depth = _split_depth(where, list(parts.values()), skip)
    entries, outside, classes = [], [], set[str]()
    for name, path in parts.items():
        if len(path) < skip + split_depth + 2:
            outside.append(name)
            continue
        split = SPLIT_FOLDERS[path[skip].lower()] if split_depth else ""
        classes.add(path[skip + split_depth])
        key, label = (unicodedata.normalize("NFC", text) for text in ("/".join(path[skip:]), path[skip + split_depth]))
        entries.append(Entry(name, label, split, key))
    if outside:
        example = printable(outside[0])
        raise DataError(f"{where}: {len(outside)} images lie in no class folder, such as {example}; move them")
    depth = skip + split_depth + 1
    classes |= {p[-1] for p in map(_parts, folders) if len(p) == depth and not _is_hidden(p)}
    labels = sorted({entry.label for entry in entries if entry.split in ("", "train")})
    _check_classes(where, labels, classes)
    entries.sort(key=lambda entry: entry.key)  # not as they happen to be listed
    return entries, labels


def _check_classes(where: str, labels: list[str], spelled: set[str]) -> None:
    """`labels`: of the training images, in NFC; `spelled`: the names of all class folders, as they are."""
    spellings: dict[str, str] = {}
    for name in sorted(spelled):
        if not name.isprintable() or not name.strip():
            raise DataError(f"{where}: class {name!r} holds what cannot be printed; rename its folder")
        plain = " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").replace("-", " ").split())
        if other := spellings.get(plain):
            same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
            codes = f" ({other!a} and {name!a})" if same else ""  # NFC and NFD look the same
            raise DataError(f"{where}: '{other}' and '{name}' are two spellings of a class{codes}; rename one")
        spellings[plain] = name
    if without := sorted({unicodedata.normalize("NFC", name) for name in spelled} - set(labels)):
        raise DataError(f"{where}: class '{without[0]}' has no training images; add some or remove its folder")
    if len(labels) < 2:
        raise DataError(f"{where}: one class only ('{labels[0]}'); a classifier needs at least 2 class folders")


def _split_depth(where: str, paths: list[tuple[str, ...]], skip: int) -> int:
    """1 where the first folders are splits, else 0: a folder `train` that holds images itself is a class."""
    tops = {path[skip].lower() for path in paths if len(path) > skip + 1}
    flat = {path[skip].lower() for path in paths if len(path) == skip + 2}
    splits = tops & SPLIT_FOLDERS.keys() - flat
    if not splits:
        return 0
    if "train" not in splits:
        raise DataError(f"{where}: has {sorted(splits)[0]}/ but no train/; add train/CLASS/*.jpg")
    if others := sorted(tops - SPLIT_FOLDERS.keys()):
        raise DataError(f"{where}: has {others[0]}/ beside train/; only train/, val/ and test/ may stand there")
    return 1


def _wrapping(paths: Iterable[tuple[str, ...]]) -> int:
    """How many folders an archive is wrapped in, as `cifar10/` in `cifar10/train/cat/1.jpg`."""
    paths, depth = list(paths), 0
    while all(len(path) >= depth + 3 for path in paths) and len({path[depth] for path in paths}) == 1:
        if paths[0][depth].lower() in SPLIT_FOLDERS:
            break
        depth += 1
    return depth


def printable(name: str) -> str:
    """A file's name as it can be printed anywhere: escapes for what is not UTF-8, ends a line or steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in (".", "/"))


def _is_image(name: str) -> bool:
    path = _parts(name)
    return bool(path) and not _is_hidden(path) and path[-1].lower().endswith(SUFFIXES + FOREIGN_SUFFIXES)


def _is_hidden(path: tuple[str, ...]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path)
