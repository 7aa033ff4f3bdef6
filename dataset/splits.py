"""Which images a run may learn from: train, val and test are cut by name, and each run keeps a record of the cut.

Where the data brings no split of its own, an image's side follows from a hash of the seed, its label and its name, and
from nothing else: not from the other images, their number or their order, nor from how the data is packed. So a copy,
an archive or an addition moves no image from one side to the other. That rules out exact shares: the number of test
images varies as in n tosses of a coin, by √(n · fraction · (1 - fraction)), and a small class may have none. Such a
class is named; the way out is more images or a larger fraction, never an image that changes sides.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dataset.sources import DataError, Entry
from predictor.files import atomic_write

FILE = "splits.json.gz"  # in the run folder
SPLITS = ("train", "val", "test")
LEARNED = ("train", "val")  # a run's weights come from train; its best epoch and its temperature from val
VERSION = 1
NAMED = 10  # classes in a message


def position(seed: int, label: str, name: str) -> float:
    """Where an image stands between 0 and 1, evenly spread over images and seeds."""
    text = f"{seed}\0{label}\0{name}".encode(errors="surrogatepass")  # a file name need not be UTF-8
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def cut_splits(
    entries: Sequence[Entry],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    known: Mapping[str, str] | None = None,
) -> list[str]:
    """The split of each entry: the one in `known`, else the data's own, else by its position.

    Test is cut from the low end and val from the high end, so that a new fraction of one leaves the other as it was.

    Args:
        known: splits by `Entry.key`, as `read` returns them.

    Raises:
        DataError: the fractions leave nothing to train on.
    """
    given = {entry.split for entry in entries}
    test = 0 if "test" in given else test_fraction
    val = 0 if "val" in given else val_fraction
    if test + val >= 1:
        raise DataError(f"--val-fraction {val:g}, --test-fraction {test:g}: nothing is left to train on; lower them")

    def split_of(entry: Entry) -> str:
        if known and (split := known.get(entry.key)):
            return split
        if entry.split in ("val", "test"):
            return entry.split
        drawn = position(seed, entry.label, entry.key)
        return "test" if drawn < test else "val" if drawn >= 1 - val else "train"

    return [split_of(entry) for entry in entries]


def check_splits(name: str, entries: Sequence[Entry], splits: Sequence[str]) -> list[str]:
    """A line for val and test each if some classes have no image there.

    Raises:
        DataError: a class has no training image, or val or test has no image at all.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for entry, split in zip(entries, splits, strict=True):
        found[entry.label][split] += 1
    for label, counts in sorted(found.items()):
        if not counts["train"]:
            raise DataError(
                f"{name}: none of the {counts.total()} images of class '{label}' falls into train; add images, or pass "
                "a smaller --val-fraction or --test-fraction, or another --split-seed"
            )
    warnings = []
    for split in ("val", "test"):
        without = sorted(label for label, counts in found.items() if not counts[split])
        if len(without) == len(found):
            raise DataError(
                f"{name}: none of its {len(entries)} images falls into {split}; add images, or pass a larger "
                f"--{split}-fraction, or another --split-seed"
            )
        if without:
            classes = ", ".join(f"'{label}'" for label in without[:NAMED]) + ", …" * (len(without) > NAMED)
            warnings.append(
                f"{len(without)} of {len(found)} classes have no {split} image, so {split} does not measure them: "
                f"{classes}; add images, or pass a larger --{split}-fraction"
            )
    return warnings


def write(run: Path, splits: Mapping[str, Iterable[str]], earlier: Mapping[str, str] | None = None) -> None:
    """Records the names of each split in the run folder.

    Args:
        splits: the keys of the images, by split.
        earlier: what the record held: an image that has gone from the data stays one that was trained on.
    """
    merged = dict(earlier or {}) | {key: split for split in SPLITS for key in splits[split]}
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key, split in sorted(merged.items()):
        names[split].append(key)
    body = json.dumps({"version": VERSION, **names}, indent=0).encode()  # ASCII: it keeps names that are not UTF-8
    with atomic_write(run / FILE) as file:
        file.write(gzip.compress(body, compresslevel=6, mtime=0))


def read(run: Path) -> dict[str, str] | None:
    """The split of each image that the run has seen, by `Entry.key`; None for a run without a record.

    Raises:
        ValueError: the record cannot be read.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        return {key: split for split in SPLITS for key in content[split]}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); restore it from a copy of the run, or train anew"
        ) from None


def overlap(entries: Iterable[Entry], known: Mapping[str, str]) -> Counter[str]:
    """How many of the images the run has in each split, and under "" how many it has never seen."""
    return Counter(known.get(entry.key, "") for entry in entries)


def learned(counts: Mapping[str, int]) -> str:
    """`1,293 training images and 144 validation images of the run`, or nothing."""
    words = {"train": "training", "val": "validation"}
    parts = [f"{counts[split]:,} {words[split]} images" for split in LEARNED if counts.get(split)]
    return f"{' and '.join(parts)} of the run" if parts else ""


def no_record(run: Path) -> str:
    return f"{run}: has no {FILE}, which says what it was trained on"
