"""Labelled images, decoded once into the squares that the network sees, split into train, val and test."""

from __future__ import annotations

import hashlib
import io
import json
import os
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

from predictor.files import atomic_write, sha256, write_text
from predictor.pillow_preprocessing import ImageError, crop, read
from training import distributed, splits
from training.sources import DataError, Entry, ImageInput, Source, Unreadable, open_source, shown

SAMPLES = 64  # images kept as files, for parity checks and for trying the endpoint
SAMPLES_LIST = "samples.json"  # in the run folder: which files of RUN/samples a run has written
SAMPLE_LABEL_BYTES = 80  # of a label in a file name, which may have 255 in all
SAMPLE_BYTES = 2 << 20  # of each at the most, so that a run folder stays small
DECODED_TOGETHER = 16  # images that a thread decodes before it asks for more, which costs as much as a tiny one
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
            raise OSError("no space is left for the temporary file of the images")

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
                raise OSError("the temporary file of the images is cut short; is the disk full?")

        list(self._readers.map(read, range(len(places)), places.tolist()))
        return rows


@dataclass(frozen=True)
class Split:
    """N labelled images, as rows of a tensor that the splits share.

    pixels: uint8 (all, S, S, 3), RGB; rows: int64 (N,), places in it; targets: int64 (N,), places in the labels.
    """

    pixels: Tensor | FilePixels
    rows: Tensor
    targets: Tensor
    names: list[str]  # as Entry.key

    def crops(self, chosen: Tensor | slice) -> Tensor:
        """uint8 (n, S, S, 3) of the chosen images."""
        return self.pixels[self.rows[chosen]]

    def read_ahead(self, chosen: Tensor) -> None:
        """Says that these are wanted next: where images stream from a file, they are read meanwhile."""
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
    samples: dict[str, bytes]  # file name to image file, of the val split
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
    known: Mapping[str, str] | None = None,
) -> Data:
    """Reads and decodes every image. The pixels of the test split are only looked at by the final evaluation.

    Args:
        scratch: folder for a temporary file, used where the images would fill the memory.
        workers: threads that decode; by default one for each core.
        known: of a run that goes on: the splits that its images have, by name.

    Raises:
        DataError: as `open_source`; an image cannot be read (unless `skip_bad`); as `splits.check_splits`.
    """
    source = open_source(data, download_dir)
    sides = splits.cut_splits(source.entries, val_fraction, test_fraction, split_seed, known)
    for warning in splits.check_splits(source.name, source.entries, sides):
        print(warning)
    sampled = _choose_samples(source.entries, sides)
    crops = allocate(len(sides), size, scratch)
    kept: dict[int, bytes] = {}

    def keep(place: int, image: ImageInput) -> None:
        if place in sampled:
            kept[place] = _as_file(image)

    rows = {place: place for place in range(len(sides))}
    bad = decode_all(source, rows, crops, size, resize, workers=workers, progress=progress, seen=keep)
    skipped = [f"{shown(source.entries[place].name)}: {reason}" for place, reason in sorted(bad.items())]
    if skipped and not skip_bad:
        raise DataError(_unreadable(data, skipped, len(sides)))
    return _assemble(source, sides, crops, bad, skipped, _name_samples(source.entries, kept))


def decode_all(
    source: Source,
    rows: Mapping[int, int],
    crops: Tensor | FilePixels,
    size: int,
    resize: int,
    *,
    workers: int | None = None,
    progress: bool = False,
    seen: Callable[[int, ImageInput], None] = lambda place, image: None,
) -> dict[int, str]:
    """Decodes the images whose places stand in `rows` into those rows of `crops`.

    Args:
        workers: threads; by default one for each core.
        seen: called with each image that could be decoded, by one of the threads.

    Returns:
        The reason for each place whose image cannot be read.
    """
    bad: dict[int, str] = {}

    def decode_some(items: list[tuple[int, ImageInput]]) -> None:
        for place, image in items:
            if isinstance(image, Unreadable):
                bad[place] = image.reason
                continue
            try:
                square = read(image, size, resize) if isinstance(image, bytes) else crop(image, size, resize)
            except (ImageError, MemoryError) as error:
                bad[place] = _reason(error)
                continue
            crops[rows[place]] = torch.from_numpy(square.copy())
            seen(place, image)

    wanted = (item for item in source.read() if item[0] in rows)
    threads, waiting = workers or os.cpu_count() or 1, deque[tuple[int, Future[None]]]()
    bar = tqdm(total=len(rows), desc="reading", unit="images", disable=not progress, leave=False)
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


def read_split(
    data: str,
    split: str,
    download_dir: str = "data",
    *,
    run: Path | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Iterator[tuple[str, str, bytes]]:
    """The image files of one split as they are, with name and label: what a client would send.

    Args:
        run: a run folder. Its record of what it was trained on goes before the cut, and what is left out of "test" for
            its sake is counted aloud.
    """
    source = open_source(data, download_dir)
    known = splits.read(run) if run else None
    sides = splits.cut_splits(source.entries, val_fraction, test_fraction, seed, known)
    if run and split == "test":
        _say_left_out(run, source, known)
    for place, image in source.read():
        if sides[place] == split:
            entry = source.entries[place]
            yield shown(entry.name), entry.label, _as_file(image)


def _say_left_out(run: Path, source: Source, known: Mapping[str, str] | None) -> None:
    if known is None:
        print(f"{splits.no_record(run)}; the test split is cut anew and may hold images that it was trained on")
    elif left_out := splits.learned(splits.overlap(source.entries, known)):
        print(f"{source.name}: left out by name: {left_out}")


def save_samples(samples: dict[str, bytes], folder: Path) -> None:
    """Writes the files, and removes those of an earlier run. What no run has written, or was changed since, is left.

    The names and SHA-256 of the files stand in SAMPLES_LIST beside the folder.

    Raises:
        ValueError: as `refuse_links`.
    """
    refuse_links(folder.parent, [folder.name])
    folder.mkdir(exist_ok=True)
    listing = folder.parent / SAMPLES_LIST
    listed = _read_list(listing)
    ours = {name for name, digest in listed.items() if _is_unchanged(folder / name, digest)}
    for name in ours - samples.keys():
        (folder / name).unlink()
    taken = sorted(name for name in samples.keys() - ours if os.path.lexists(folder / name))
    written = {name: body for name, body in samples.items() if name not in taken}
    write_text(listing, json.dumps({name: _sha256(body) for name, body in written.items()}, indent=1) + "\n")
    for name, body in written.items():
        with atomic_write(folder / name) as file:
            file.write(body)
    if taken:
        print(f"{folder}: {len(taken)} files that no run has written were left as they are, such as {taken[0]}")


def refuse_links(run: Path, names: Iterable[str] = ("samples", "report")) -> None:
    """Raises ValueError where a link or a file stands in the place of a folder that a run writes into."""
    for path in (run / name for name in names):
        if path.is_symlink():
            raise ValueError(f"{path}: is a link, and a run writes into folders of its own only; remove it")
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file where the run needs a folder; move it away")


def _read_list(path: Path) -> dict[str, str]:
    """Names of files in one folder with their SHA-256; none where the list is missing or no such list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {name: digest for name, digest in pairs if Path(name).name == name}  # no way out of the folder


def _is_unchanged(path: Path, digest: str) -> bool:
    return path.is_file() and not path.is_symlink() and sha256(path) == digest


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


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
            f"the images take {needed / 1e9:.1f} GB, over half of the free memory ({free / 1e9:.1f} GB), and {where} "
            f"has room for {space / 1e9:.1f} GB; choose another disk ({'--out' if scratch else 'TMPDIR'}), or a "
            "smaller --size"
        )
    print(
        f"the images take {needed / 1e9:.1f} GB, over half of the free memory ({free / 1e9:.1f} GB): "
        f"they stream from a temporary file in {where}"
    )
    return FilePixels(count, size, scratch)


def on_device(data: Data, device: torch.device) -> Data:
    """`data` with its images on the GPU, so that no batch is copied there, if a quarter of its memory holds them."""
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
    sides: list[str],
    crops: Tensor | FilePixels,
    bad: dict[int, str],
    skipped: list[str],
    samples: dict[str, bytes],
) -> Data:
    index = {label: i for i, label in enumerate(source.labels)}
    parts = {}
    for split in ("train", "val", "test"):
        places = [i for i, own in enumerate(sides) if own == split and i not in bad]
        targets = torch.tensor([index[source.entries[i].label] for i in places], dtype=torch.int64)
        parts[split] = Split(crops, torch.tensor(places), targets, [source.entries[i].key for i in places])
        if not places:
            raise DataError(f"{source.name}: no readable image is left in {split}; see the list of unreadable files")
    if empty := sorted(set(source.labels) - {source.labels[i] for i in parts["train"].targets.tolist()}):
        raise DataError(f"{source.name}: class '{empty[0]}' has no readable training image; add some")
    return Data(source.name, source.labels, source.flips, **parts, samples=samples, skipped=skipped)


def _choose_samples(entries: list[Entry], sides: list[str]) -> set[int]:
    """Places of val images, the classes in turn, so that each has its share."""
    by_class: dict[str, list[int]] = defaultdict(list)
    for place, entry in enumerate(entries):
        if sides[place] == "val":
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
        label = label.encode()[:SAMPLE_LABEL_BYTES].decode(errors="ignore")
        number = counts[label.casefold()]  # for each name, not each class: two long labels may begin alike
        named[f"{label}-{number}{Path(entries[place].name).suffix.lower()}"] = body
        counts[label.casefold()] += 1
    return named


def _as_file(image: ImageInput) -> bytes:
    if isinstance(image, Unreadable):
        return b""
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    Image.Image.save(image, buffer, "PNG")
    return buffer.getvalue()


def _reason(error: ImageError | MemoryError) -> str:
    """Why a file has no usable image, without the bodies and the sending that the endpoint's clients are told of."""
    if isinstance(error, MemoryError):  # Pillow's word for a side that it cannot count, too
        return "the image is too long or too large to be decoded"
    return str(error).partition("; send")[0].replace("the body", "the file")


def _unreadable(data: str, skipped: list[str], total: int) -> str:
    rest = f"\n  … and {len(skipped) - LISTED} more" if len(skipped) > LISTED else ""
    names = "".join(f"\n  {line}" for line in skipped[:LISTED])
    return f"{data}: {len(skipped)} of {total} images cannot be read; mend them or pass --skip-bad{names}{rest}"


def _batches(items: Iterable[tuple[int, ImageInput]]) -> Iterator[list[tuple[int, ImageInput]]]:
    batch: list[tuple[int, ImageInput]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1]) if isinstance(item[1], bytes) else 0
        if len(batch) == DECODED_TOGETHER or size >= TOGETHER_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
