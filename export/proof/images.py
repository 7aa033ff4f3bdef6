"""The real images on which parity is proven, and others of a run's data."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import yaml
from PIL import Image

from dataset.loading import read_split
from export.progress import say
from predictor.pillow_preprocessing import ImageError, decode

PHOTOGRAPHS = 16  # cut-outs beside a run's own samples
MANY = 1000  # test images for `--verify all`
MANY_PHOTOGRAPHS = 128

# Sizes that every set has, px, width × height: the least, the whole, portrait, landscape, odd, and thin.
SIZES = ((9, 9), (640, 427), (47, 120), (341, 256), (199, 201), (9, 427), (640, 9))

Named = tuple[str, Image.Image]
Item = TypeVar("Item")


def of_samples(samples: Path) -> list[Named]:
    """The images of a run's `samples` folder, and some cut-outs of photographs.

    Raises:
        ValueError: as `sample_files` and `decode_sample`.
    """
    files = sample_files(samples)
    return _by_size([(path.name, decode_sample(path)) for path in files] + photographs(PHOTOGRAPHS))


def sample_files(samples: Path) -> list[Path]:
    """The files of a run's `samples` folder, without hidden ones, which a system or a killed training left there.

    Raises:
        ValueError: the folder is missing or empty.
    """
    files = sorted(path for path in samples.glob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise ValueError(f"{samples}: no images for parity and golden answers; re-run train.py, or put some there")
    return files


def decode_sample(path: Path, colour: str = "srgb") -> Image.Image:
    """
    Raises:
        ValueError: the file is no image that can be read; the message names it.
    """
    try:
        return decode(path.read_bytes(), colour=colour)
    except ImageError as error:
        raise ValueError(f"{path}: {error}; move it away") from None


def of_test_split(run: Path, data: str | None = None) -> list[Named]:
    """At least 1,000: of the test split, drawn with a seed, and cut-outs of photographs in sizes of their own.

    Raises:
        ValueError: the data is not there.
    """
    taken = sample(((name, body) for name, _, body in read(run, "test", data)), MANY)
    images = [named for named in map(_decoded, taken) if named]
    return _by_size(images + photographs(max(MANY_PHOTOGRAPHS, MANY - len(images))))


def photographs(count: int) -> list[Named]:
    """Cut-outs of scikit-learn's two photographs (640×427 px), the same ones each time, from 9×9 px to the whole."""
    from sklearn.datasets import load_sample_images

    bundle = load_sample_images()
    wholes = [Image.fromarray(pixels) for pixels in bundle.images]
    draw = random.Random(0)
    cut: list[Named] = []
    for i in range(count):
        whole, file = wholes[i % 2], Path(bundle.filenames[i % 2]).name
        limit = (round(9 * (640 / 9) ** draw.random()), round(9 * (427 / 9) ** draw.random()))  # small ones as often
        width, height = SIZES[i] if i < len(SIZES) else limit
        left, top = draw.randint(0, whole.width - width), draw.randint(0, whole.height - height)
        cut.append((f"{file} {width}×{height}+{left}+{top}", whole.crop((left, top, left + width, top + height))))
    return cut


def sample(items: Iterable[Item], count: int, seed: int = 0) -> list[Item]:
    """`count` of the items, each as likely as any other, in their order; in one pass (Vitter 1985, algorithm R)."""
    draw, kept = random.Random(seed), dict[int, tuple[int, Item]]()
    for i, item in enumerate(items):
        index = i if i < count else draw.randrange(i + 1)
        if index < count:
            kept[index] = (i, item)
    return [item for _, item in sorted(kept.values(), key=lambda pair: pair[0])]


def read(run: Path, split: str, data: str | None = None) -> Iterator[tuple[str, str, bytes]]:
    """Name, label and file of each image of a split, cut as the run has cut it.

    Args:
        data: where the data lies now, if not where it was.

    Raises:
        ValueError: config.yaml or the data is not there; the message says what to pass.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        source, folder = data or config["data"], config["download_dir"]
        cuts = {"val_fraction": config["val_fraction"], "test_fraction": config["test_fraction"]}
        seed = config["split_seed"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{run / 'config.yaml'}: cannot be read ({error}); re-run train.py") from None
    try:
        yield from read_split(source, split, folder, run=run, **cuts, seed=seed, say=say)
    except ValueError as error:
        raise ValueError(f"{error}; pass --data with where it lies now") from None


def _decoded(item: tuple[str, bytes]) -> Named | None:
    try:
        return item[0], decode(item[1])
    except ImageError:  # left out of training too, by --skip-bad
        return None


def _by_size(images: list[Named]) -> list[Named]:
    """Those of equal size beside each other, so that they can go through the pixel graph in batches."""
    return sorted(images, key=lambda named: named[1].size)
