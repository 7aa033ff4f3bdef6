"""Data sets that are known by name: scikit-learn's digits, and what torchvision downloads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from PIL import Image

from dataset.sources.base import DataError, Entry, ImageInput, Source, chosen


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

    def read(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, ImageInput]]:
        for i in chosen(self.entries, wanted):
            yield i, Image.fromarray(self._images[i]).convert("RGB")

    def peek(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        yield from (Image.fromarray(self._images[i]) for i in indices)

    def stamps(self, indices: Sequence[int]) -> None:
        return None


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
