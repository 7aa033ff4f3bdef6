"""What the paths of image files say: classes and splits; and which classes can be trained on.

DIR/CLASS/*
DIR/{train,val,test}/CLASS/*
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from dataset.sources.base import DataError, Entry, printable
from predictor.pillow_preprocessing import SUFFIXES

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

# Suffixes of images that are not read here: listed as unreadable, not passed over in silence.
_KNOWN = (".heic", ".heif", ".hif", ".avif", ".psd", ".svg", ".jp2", ".jxl", ".cr2", ".nef", ".dng")
FOREIGN_SUFFIXES = tuple(suffix for suffix in _KNOWN if suffix not in SUFFIXES)


def read_layout(
    where: str, files: list[str], folders: list[str], may_be_wrapped: bool = False
) -> tuple[list[Entry], list[str]]:
    """Splits and classes from paths.

    Raises:
        DataError: no images, images outside any class, one class only, an empty class, two spellings of a class,
            or a class that only val or test has.
    """
    images = [name for name in files if is_image(name)]
    if not images:
        raise DataError(f"{where}: no images found; the layout is CLASS/*.jpg or {{train,val,test}}/CLASS/*.jpg")
    parts = {name: path_parts(name) for name in images}
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
    classes |= {p[-1] for p in map(path_parts, folders) if len(p) == depth and not is_hidden(p)}
    labels = find_labels(where, entries, classes)
    entries.sort(key=lambda entry: entry.key)  # not as they happen to be listed
    return entries, labels


def find_labels(where: str, entries: Sequence[Entry], spelled: set[str]) -> list[str]:
    """The classes of the training images, sorted.

    Args:
        spelled: the classes of all images, and of empty class folders, as they are written (labels are in NFC).

    Raises:
        DataError: one class only, a class without training images, two spellings of one, or characters that cannot be
            printed.
    """
    labels = sorted({entry.label for entry in entries if entry.split in ("", "train")})
    spellings: dict[str, str] = {}
    for name in sorted(spelled):
        if not name.isprintable() or not name.strip():
            raise DataError(f"{where}: class {name!r} holds what cannot be printed; rename it")
        plain = " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").replace("-", " ").split())
        if other := spellings.get(plain):
            same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
            codes = f" ({other!a} and {name!a})" if same else ""  # NFC and NFD look the same
            raise DataError(f"{where}: '{other}' and '{name}' are two spellings of a class{codes}; rename one")
        spellings[plain] = name
    if without := sorted({unicodedata.normalize("NFC", name) for name in spelled} - set(labels)):
        raise DataError(f"{where}: class '{without[0]}' has no training images; add some or remove it")
    if len(labels) < 2:
        raise DataError(f"{where}: one class only ('{labels[0]}'); a classifier needs at least 2 classes")
    return labels


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


def path_parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in (".", "/"))


def is_image(name: str) -> bool:
    path = path_parts(name)
    return bool(path) and not is_hidden(path) and path[-1].lower().endswith(SUFFIXES + FOREIGN_SUFFIXES)


def is_hidden(path: tuple[str, ...]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path)
