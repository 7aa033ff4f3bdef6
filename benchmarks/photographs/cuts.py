"""The images as files, and the folders that a trainer gets: train/CLASS/* and test/CLASS/*."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataset.decoding import as_file
from dataset.sources import DataError, Entry, open_source
from dataset.splits import position


def cut_folds(entries: Sequence[Entry], folds: int, seed: int) -> list[int]:
    """The fold of each entry, 0..folds-1: stratified, and by a hash of seed, label and name within each class.

    No two folds differ by more than one image, in a class or in total.
    """
    order = sorted(range(len(entries)), key=lambda i: (entries[i].label, _position(entries[i], seed)))
    found = [0] * len(entries)
    for rank, index in enumerate(order):  # counting on from class to class keeps the totals level too
        found[index] = rank % folds
    return found


def _position(entry: Entry, seed: int) -> float:
    return position(seed, entry.label, entry.key)


def own_split(entries: Sequence[Entry]) -> list[int]:
    """0 for the images of the data's own test split, -1 for the others.

    Raises:
        DataError: the data has no test split.
    """
    if all(entry.split != "test" for entry in entries):
        raise DataError("--split own: the data has no test/ folder; pass --split folds")
    return [0 if entry.split == "test" else -1 for entry in entries]


def write_images(data: str, folder: Path) -> tuple[list[Entry], list[Path]]:
    """Writes each image that is not there yet to folder/CLASS/NAME; returns the entries and their files.

    NAME is the entry's key with `-` for `/`, so that train/a/1.jpg and test/a/1.jpg stay two images.
    """
    source = open_source(data)
    files = [folder / entry.label / entry.key.replace("/", "-") for entry in source.entries]
    if not all(file.exists() for file in files):
        for index, image in source.read():
            files[index].parent.mkdir(parents=True, exist_ok=True)
            files[index].write_bytes(as_file(image))
    return source.entries, files


def link_fold(files: Sequence[Path], folds: Sequence[int], fold: int, folder: Path) -> Path:
    """Makes folder/train and folder/test out of links, unless they are there; returns the folder."""
    for file, own in zip(files, folds, strict=True):
        link = folder / ("test" if own == fold else "train") / file.parent.name / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(file.absolute())
    return folder
