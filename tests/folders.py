"""Small folders and archives of labelled images, made for a test."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def image(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A noisy image of one colour."""
    noise = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 220)}


def make_folder(root: Path, count: int = 6, splits: tuple[str, ...] = ("",), kind: str = "jpg") -> Path:
    """ROOT/[SPLIT/]{red,green,blue}/N.jpg"""
    for s, split in enumerate(splits):
        for label, colour in COLOURS.items():
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image(colour, 100 * s + i).save(folder / f"{i}.{kind}")
    return root


def as_tar(folder: Path, target: Path, mode: str, wrapped: bool) -> Path:
    import tarfile

    with tarfile.open(target, f"w:{mode}") as archive:
        archive.add(folder, arcname="wrapping" if wrapped else ".")
    return target


def as_zip(folder: Path, target: Path, wrapped: bool) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, ("wrapping/" if wrapped else "") + path.relative_to(folder).as_posix())
    return target
