"""Labelled pictures, decoded once into the squares that the network sees, split into train, val and test."""

from __future__ import annotations

import io
import os
import random
import shutil
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import psutil
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model.files import atomic_write
from model.pictures import PictureError, crop, read
from training import distributed
from training.sources import DataError, Entry, Picture, Source, open_source

SAMPLES = 64  # pictures kept as files, for parity checks and for trying the endpoint
SAMPLE_BYTES = 2 << 20  # of each at the most, so that a run folder stays small
DECODED_TOGETHER = 16  # pictures that a thread decodes before it asks for more, which costs as much as a tiny one
TOGETHER_BYTES = 1 << 20  # of their files at the most, but for the last: large ones are decoded one by one
READERS = 8  # threads that read rows of a file
LISTED = 50  # unreadable files named one by one before the rest is counted


class FilePixels:
    """uint8 (N, S, S, 3) in a file without a name, which ends with the program. Rows are read when they are asked for.

    They are read, and not mapped into memory: what is mapped counts as the program's own memory until it is needed for
    something else, and a container's limit does not wait for that.
    """

    def __init__(self, count: int, size: int, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._row, self.shape = size * size * 3, (count, size, size, 3)
        self._file.truncate(count * self._row)
        self._readers = ThreadPoolExecutor(READERS)
        self._ahead = ThreadPoolExecutor(1)
        self._coming: tuple[Tensor, Future[Tensor]] | None = None

    def __setitem__(self, place: int, crop: Tensor) -> None:
        if os.pwrite(self._file.fileno(), crop.contiguous().numpy().data, place * self._row) != self._row:
            raise OSError("no space is left for the temporary file of the pictures")

    def __getitem__(self, places: Tensor) -> Tensor:
        coming, self._coming = self._coming, None
        if coming and torch.equal(coming[0], places):
            return coming[1].result()
        return self._read(places)

    def read_ahead(self, places: Tensor) -> None:
        """Begins to read what is likely to be asked for next."""
        self._coming = places, self._ahead.submit(self._read, places)

    def _read(self, places: Tensor) -> Tensor:
        rows = torch.empty((len(places), *self.shape[1:]), dtype=torch.uint8)
        views = rows.numpy()

        def read(i: int, place: int) -> None:
            if os.preadv(self._file.fileno(), [views[i].data], place * self._row) != self._row:
                raise OSError("the temporary file of the pictures is cut short; is the disk full?")

        list(self._readers.map(read, range(len(places)), places.tolist()))
        return rows


@dataclass(frozen=True)
class Split:
    """N labelled pictures, as rows of a tensor that the splits share.

    pixels: uint8 (all, S, S, 3), RGB; rows: int64 (N,), places in it; targets: int64 (N,), places in the labels.
    """

    pixels: Tensor | FilePixels
    rows: Tensor
    targets: Tensor
    names: list[str]

    def crops(self, chosen: Tensor | slice) -> Tensor:
        """uint8 (n, S, S, 3) of the chosen pictures."""
        return self.pixels[self.rows[chosen]]

    def read_ahead(self, chosen: Tensor) -> None:
        """Says that these are wanted next: where pictures stream from a file, they are read meanwhile."""
        if isinstance(self.pixels, FilePixels):
            self.pixels.read_ahead(self.rows[chosen])

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Data:
    name: str
    labels: list[str]
    flips: bool
    train: Split
    val: Split
    test: Split
    samples: dict[str, bytes]  # file name to picture file, of the val split
    skipped: list[str]  # unreadable files that --skip-bad left out, with the reason


def load(
    data: str,
    *,
    size: int,
    resize: int,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    skip_bad: bool = False,
    download_dir: str = "data",
    scratch: Path | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Data:
    """Reads and decodes every picture. The pixels of the test split are only looked at by the final evaluation.

    Args:
        scratch: folder for a temporary file, used where the pictures would fill the memory.
        workers: threads that decode; by default one for each core.

    Raises:
        DataError: as `open_source`; a picture cannot be read (unless `skip_bad`); a class has too few pictures.
    """
    source = open_source(data, download_dir)
    splits = cut_splits(source.entries, val_fraction, test_fraction, split_seed)
    sampled = _choose_samples(source.entries, splits)
    crops = allocate(len(splits), size, scratch)
    kept: dict[int, bytes] = {}

    def keep(place: int, picture: Picture) -> None:
        if place in sampled:
            kept[place] = _as_file(picture)

    rows = {place: place for place in range(len(splits))}
    bad = decode_all(source, rows, crops, size, resize, workers=workers, progress=progress, seen=keep)
    skipped = [f"{source.entries[place].name}: {reason}" for place, reason in sorted(bad.items())]
    if skipped and not skip_bad:
        raise DataError(_unreadable(data, skipped, len(splits)))
    return _assemble(source, splits, crops, bad, skipped, _name_samples(source.entries, kept))


def decode_all(
    source: Source,
    rows: Mapping[int, int],
    crops: Tensor | FilePixels,
    size: int,
    resize: int,
    *,
    workers: int | None = None,
    progress: bool = False,
    seen: Callable[[int, Picture], None] = lambda place, picture: None,
) -> dict[int, str]:
    """Decodes the pictures whose places stand in `rows` into those rows of `crops`.

    Args:
        workers: threads; by default one for each core.
        seen: called with each picture that could be decoded, by one of the threads.

    Returns:
        The reason for each place whose picture cannot be read.
    """
    bad: dict[int, str] = {}

    def decode_some(items: list[tuple[int, Picture]]) -> None:
        for place, picture in items:
            try:
                square = read(picture, size, resize) if isinstance(picture, bytes) else crop(picture, size, resize)
                crops[rows[place]] = torch.from_numpy(square.copy())
                seen(place, picture)
            except PictureError as error:
                bad[place] = str(error)

    wanted = (item for item in source.read() if item[0] in rows)
    threads, waiting = workers or os.cpu_count() or 1, deque[tuple[int, Future[None]]]()
    bar = tqdm(total=len(rows), desc="reading", unit="pictures", disable=not progress, leave=False)
    with bar, ThreadPoolExecutor(threads) as pool:

        def finish_one() -> None:
            count, done = waiting.popleft()
            done.result()
            bar.update(count)

        for items in _batches(wanted):
            waiting.append((len(items), pool.submit(decode_some, items)))
            if len(waiting) > 2 * threads:  # enough to do while more is read, and not all in memory
                finish_one()
        while waiting:
            finish_one()
    return bad


def cut_splits(entries: list[Entry], val_fraction: float, test_fraction: float, seed: int) -> list[str]:
    """The split of each entry: its own, or cut from its class with a seed where the data has none.

    Raises:
        DataError: a class is too small to be cut.
    """
    given = {entry.split for entry in entries}
    cuts = {} if "val" in given else {"val": val_fraction}
    if "test" not in given:
        cuts["test"] = test_fraction
    by_class: dict[str, list[int]] = defaultdict(list)
    for place, entry in enumerate(entries):
        if entry.split in ("", "train"):
            by_class[entry.label].append(place)
    splits = [entry.split or "train" for entry in entries]
    for label, places in sorted(by_class.items()):
        if len(places) < len(cuts) + 1:
            raise DataError(
                f"class '{label}' has {len(places)} pictures; it needs {len(cuts) + 1}, one for each of train, "
                f"{', '.join(cuts)}; add pictures or remove the class"
            )
        random.Random(f"{seed}/{label}").shuffle(places)
        rest = places
        for i, (split, fraction) in enumerate(cuts.items()):
            needed = len(cuts) - i  # one picture for each of the other cuts, and one for train
            count = min(max(1, round(fraction * len(places))), len(rest) - needed)
            for place in rest[:count]:
                splits[place] = split
            rest = rest[count:]
    return splits


def read_split(data: str, split: str, download_dir: str = "data", **cuts: float) -> Iterator[tuple[str, str, bytes]]:
    """The picture files of one split as they are, with name and label: what a client would send."""
    source = open_source(data, download_dir)
    options = {"val_fraction": 0.1, "test_fraction": 0.1, "seed": 0, **cuts}
    splits = cut_splits(source.entries, **options)  # type: ignore[arg-type]
    for place, picture in source.read():
        if splits[place] == split:
            entry = source.entries[place]
            yield entry.name, entry.label, _as_file(picture)


def save_samples(samples: dict[str, bytes], folder: Path) -> None:
    """Writes the files, and removes those of an earlier run."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in samples:
            path.unlink()
    for name, body in samples.items():
        with atomic_write(folder / name) as file:
            file.write(body)


def allocate(count: int, size: int, scratch: Path | None) -> Tensor | FilePixels:
    """uint8 (count, size, size, 3): in memory, or in a file where that would take over half of it.

    Raises:
        DataError: the disk has no room for that file.
    """
    needed, free = count * size * size * 3, free_memory()
    if needed <= free // 2:
        return torch.empty((count, size, size, 3), dtype=torch.uint8)
    where = scratch or tempfile.gettempdir()
    space = shutil.disk_usage(where).free
    if needed > space:
        raise DataError(
            f"the pictures take {needed / 1e9:.1f} GB, over half of the free memory ({free / 1e9:.1f} GB), and {where} "
            f"has room for {space / 1e9:.1f} GB; choose another disk ({'--out' if scratch else 'TMPDIR'}), or a "
            "smaller --size"
        )
    print(
        f"the pictures take {needed / 1e9:.1f} GB, over half of the free memory ({free / 1e9:.1f} GB): "
        f"they stream from a temporary file in {where}"
    )
    return FilePixels(count, size, scratch)


def on_device(data: Data, device: torch.device) -> Data:
    """`data` with its pictures on the GPU, so that no batch is copied there, if a quarter of its memory holds them."""
    pixels = data.train.pixels
    if device.type != "cuda" or isinstance(pixels, FilePixels):
        return data
    if pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
        return data
    copied = pixels.to(device)
    train, val, test = (replace(split, pixels=copied) for split in (data.train, data.val, data.test))
    return replace(data, train=train, val=val, test=test)


def free_memory() -> int:
    """Bytes: the machine's, or the container's where that has a limit of its own; under torchrun a process's share."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    sharing = distributed.local_world()
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no cgroups of version 2, or no limit ("max")
        return free // sharing
    return min(free, limit - used) // sharing


def _assemble(
    source: Source,
    splits: list[str],
    crops: Tensor | FilePixels,
    bad: dict[int, str],
    skipped: list[str],
    samples: dict[str, bytes],
) -> Data:
    index = {label: i for i, label in enumerate(source.labels)}
    parts = {}
    for split in ("train", "val", "test"):
        places = [i for i, own in enumerate(splits) if own == split and i not in bad]
        targets = torch.tensor([index[source.entries[i].label] for i in places], dtype=torch.int64)
        parts[split] = Split(crops, torch.tensor(places), targets, [source.entries[i].name for i in places])
        if not places:
            raise DataError(f"{source.name}: no readable picture is left in {split}; see the list of unreadable files")
    if empty := sorted(set(source.labels) - {source.labels[i] for i in parts["train"].targets.tolist()}):
        raise DataError(f"{source.name}: class '{empty[0]}' has no readable training picture; add some")
    return Data(source.name, source.labels, source.flips, **parts, samples=samples, skipped=skipped)


def _choose_samples(entries: list[Entry], splits: list[str]) -> set[int]:
    """Places of val pictures, the classes in turn, so that each has its share."""
    by_class: dict[str, list[int]] = defaultdict(list)
    for place, entry in enumerate(entries):
        if splits[place] == "val":
            by_class[entry.label].append(place)
    rounds = max(map(len, by_class.values()), default=0)
    turns = (places[i] for i in range(rounds) for _, places in sorted(by_class.items()) if i < len(places))
    return set(islice(turns, SAMPLES))


def _name_samples(entries: list[Entry], kept: dict[int, bytes]) -> dict[str, bytes]:
    """`LABEL-0.png`, `LABEL-1.png`, …: names that a person can type."""
    named: dict[str, bytes] = {}
    counts: dict[str, int] = defaultdict(int)
    for place, body in sorted(kept.items()):
        if len(body) > SAMPLE_BYTES:
            continue
        label = "".join(c if c.isalnum() else "_" for c in entries[place].label)
        named[f"{label}-{counts[label]}{Path(entries[place].name).suffix.lower()}"] = body
        counts[label] += 1
    return named


def _as_file(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    buffer = io.BytesIO()
    Image.Image.save(picture, buffer, "PNG")
    return buffer.getvalue()


def _unreadable(data: str, skipped: list[str], total: int) -> str:
    rest = f"\n  … and {len(skipped) - LISTED} more" if len(skipped) > LISTED else ""
    names = "".join(f"\n  {line}" for line in skipped[:LISTED])
    return f"{data}: {len(skipped)} of {total} pictures cannot be read; mend them or pass --skip-bad{names}{rest}"


def _batches(items: Iterable[tuple[int, Picture]]) -> Iterator[list[tuple[int, Picture]]]:
    batch: list[tuple[int, Picture]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1]) if isinstance(item[1], bytes) else 0
        if len(batch) == DECODED_TOGETHER or size >= TOGETHER_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
