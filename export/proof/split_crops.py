"""A run's images as the network sees them: training images to calibrate int8 with, and the test split to judge by."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export.proof import images
from predictor.pillow_preprocessing import ImageError, read
from predictor.spec import ModelSpec

CALIBRATION = 512  # training images
SEED = 0  # of their choice
CHUNK = 64  # images decoded at a time, so that a test split of any size fits in memory


def calibration_crops(
    run: Path, spec: ModelSpec, data: str | None = None, count: int = CALIBRATION, seed: int = SEED
) -> np.ndarray:
    """uint8 (n, S, S, 3): `count` of the training images, drawn with `seed`, less those that cannot be read.

    Raises:
        ValueError: the data cannot be found, or none of them can be read.
    """
    bodies = (body for _, _, body in _shown(images.read(run, "train", data), "training images"))
    crops = [found for found in _crops(images.sample(bodies, count, seed), spec) if found is not None]
    if not crops:
        raise ValueError(f"{run}: no training image can be read; pass --data with what it was trained on")
    return np.stack(crops)


def labelled_crops(run: Path, spec: ModelSpec, data: str | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole test split in parts, uint8 (n, S, S, 3) with targets int64 (n,), less what cannot be read.

    Raises:
        ValueError: the data cannot be found, has a class that the spec has not, or has no readable test image.
    """
    index, count = {label: i for i, label in enumerate(spec.labels)}, 0
    items = iter(_shown(images.read(run, "test", data), "test images"))
    while chunk := list(islice(items, CHUNK)):
        if unknown := sorted({label for _, label, _ in chunk} - index.keys()):
            raise ValueError(f"{run}: '{unknown[0]}' is none of its labels; pass --data with what it was trained on")
        found = zip(_crops([body for _, _, body in chunk], spec), (index[label] for _, label, _ in chunk), strict=True)
        good = [(crops, target) for crops, target in found if crops is not None]
        if good:
            count += len(good)
            yield np.stack([crops for crops, _ in good]), np.array([target for _, target in good])
    if not count:
        raise ValueError(f"{run}: no test image can be read; pass --data with what it was trained on")


def _crops(bodies: list[bytes], spec: ModelSpec) -> list[np.ndarray | None]:
    """The squares that the network sees, uint8 (S, S, 3); None for an image that cannot be read."""

    def one(body: bytes) -> np.ndarray | None:
        try:
            return read(body, spec.rule)
        except ImageError:  # left out of training too, by --skip-bad
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, bodies))


def _shown(items: Iterable[tuple[str, str, bytes]], what: str) -> Iterable[tuple[str, str, bytes]]:
    return tqdm(items, desc=what, unit="images", leave=False, disable=None)  # on a terminal only
