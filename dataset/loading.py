"""All of it together: labelled images, decoded once, cut into train, val and test; or one split's files as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dataset import splits
from dataset.decoded_images import Data, Split, StreamedPixels, allocate
from dataset.decoding import as_file, decode_each, name_unreadable, square, unreadable_images
from dataset.frames import Frames, FrameSquares, make_frame
from dataset.placement import Wanted, bodies_for
from dataset.sample_images import choose_samples, name_samples
from dataset.sources import DataError, Source, open_source, printable
from dataset.store import StoredBodies, StoredCrops
from predictor.spec import PixelRule

logger = logging.getLogger(__name__)


def load(
    data: str,
    *,
    rule: PixelRule,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    known: Mapping[str, str] | None = None,
    edge: int | None = None,
    store: str = "auto",
    skip_bad: bool = False,
    download_dir: str = "data",
    source: Source | None = None,
    scratch: Path | None = None,
    workers: int = 1,
    processes: int = 1,
    say: Callable[[str], None] = logger.warning,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Data:
    """Reads and decodes every image. The pixels of the test split are only looked at by the final evaluation.

    Args:
        known: of a run that goes on: the splits that its images have, by name.
        edge: px: keep the training images as whole frames with a short edge of at most so many, which random crops are
            cut out of; else all images become crops by the rule.
        store: where they are kept, as `dataset.placement.bodies_for` takes it.
        skip_bad: leave images out that cannot be read.
        source: of `data`, where it is open already.
        scratch: folder for a temporary file, used where the images would fill the memory and have no store.
        workers: threads that decode, and that cut crops out of frames.
        processes: how many on this machine hold the images at once.
        say: is told what the user should know, a line at a time: classes without a val or test image, images that
            stream from a file.
        progress: told how many images are done, of how many.

    Raises:
        DataError: as `open_source`; an image cannot be read (unless `skip_bad`); as `splits.check_splits`.
    """
    source = source or open_source(data, download_dir)
    assigned = splits.cut_splits(source.entries, val_fraction, test_fraction, split_seed, known)
    for warning in splits.check_splits(source.name, source.entries, assigned):
        say(warning)
    kept = _Kept(data, source, assigned, rule, edge, store=store, scratch=scratch, processes=processes, say=say)
    with kept.bodies.filling(say):
        unreadable = decode_each(source, kept.missing(), kept.keep, workers=workers, progress=progress)
        kept.leave_out(unreadable)
    kept.check(unreadable)
    skipped = name_unreadable(source.entries, unreadable)
    if skipped and not skip_bad:
        raise unreadable_images(data, skipped, len(assigned))
    by_split = _by_split(source, assigned, kept.pixels(workers), kept.rows, unreadable)
    samples = name_samples(source.entries, kept.files)
    return Data(source.name, source.labels, source.flips, **by_split, samples=samples, skipped=skipped)


class _Kept:
    """The decoded images: crops by the rule; with `edge` the training images as whole frames.

    rows: of each image its row among those of its kind, by its index.
    files: of the samples, by their index.
    """

    def __init__(
        self,
        data: str,
        source: Source,
        assigned: Sequence[str],
        rule: PixelRule,
        edge: int | None,
        *,
        store: str,
        scratch: Path | None,
        processes: int,
        say: Callable[[str], None],
    ) -> None:
        self._data, self._rule, self._edge = data, rule, edge
        self._whole = [index for index, split in enumerate(assigned) if edge and split == "train"]
        self._crops = sorted(set(range(len(assigned))) - set(self._whole))
        self.rows = {index: row for indices in (self._whole, self._crops) for row, index in enumerate(indices)}
        self._is_whole = set(self._whole)
        self._sampled = choose_samples(source.entries, assigned)
        self.files: dict[int, bytes] = {}
        wanted = Wanted(self._whole, self._crops, edge or 0, rule)
        self.bodies = bodies_for(data, source, wanted, store, processes=processes, say=say)
        self._cropped: Tensor | StreamedPixels
        if isinstance(self.bodies, StoredBodies):
            self._cropped = StoredCrops(self.bodies, len(self._whole), rule)
        else:
            count = len(self._crops)
            self._cropped = allocate(count, rule.height, rule.width, scratch, processes=processes, say=say)

    def missing(self) -> set[int]:
        """The images that are still to be read."""
        return {*self._without_pixels(), *self._sampled}

    def keep(self, index: int, image: bytes | Image.Image) -> None:
        if self._edge and index in self._is_whole:
            self.bodies[self.rows[index]] = make_frame(image, self._edge, self._rule.colour)
        else:
            self._cropped[self.rows[index]] = square(image, self._rule)
        if index in self._sampled:
            self.files[index] = as_file(image)

    def leave_out(self, unreadable: Collection[int]) -> None:
        """Says which of the images cannot be read, while some are added."""
        order = [*self._whole, *self._crops]
        self.bodies.leave_out([row for row, index in enumerate(order) if index in unreadable])

    def check(self, unreadable: Collection[int]) -> None:
        """
        Raises:
            DataError: pixels of readable images are missing, which would be trained on as black.
        """
        if isinstance(self.bodies, StoredBodies) and (lost := self._without_pixels().difference(unreadable)):
            raise DataError(
                f"{self._data}: {len(lost):,} images are gone from their store, as if it had been removed meanwhile; "
                "start again, or give another --store DIR"
            )

    def pixels(self, workers: int) -> dict[str, Tensor | StreamedPixels | FrameSquares]:
        """By split."""
        found: dict[str, Tensor | StreamedPixels | FrameSquares] = dict.fromkeys(splits.SPLITS, self._cropped)
        if self._edge:
            found["train"] = FrameSquares(Frames(self.bodies, workers, self._rule.interpolation), self._rule)
        return found

    def _without_pixels(self) -> set[int]:
        order = [*self._whole, *self._crops]
        missing = {order[row] for row in self.bodies.missing}
        return missing if isinstance(self.bodies, StoredBodies) else {*missing, *self._crops}


def _by_split(
    source: Source,
    assigned: Sequence[str],
    pixels: Mapping[str, Tensor | StreamedPixels | FrameSquares],
    rows: Mapping[int, int],
    unreadable: Mapping[int, str],
) -> dict[str, Split]:
    """The readable images of each split.

    Args:
        pixels: by split; rows: of each image its row there, by its index.

    Raises:
        DataError: a split has none, or a class none to train on.
    """
    index_of = {label: i for i, label in enumerate(source.labels)}
    found = {}
    for split in splits.SPLITS:
        chosen = [index for index, own in enumerate(assigned) if own == split and index not in unreadable]
        targets = torch.tensor([index_of[source.entries[index].label] for index in chosen], dtype=torch.int64)
        own_rows = torch.tensor([rows[index] for index in chosen], dtype=torch.int64)
        found[split] = Split(pixels[split], own_rows, targets, [source.entries[index].key for index in chosen])
        if not chosen:
            raise DataError(f"{source.name}: no readable image is left in {split}; see the list of unreadable files")
    if empty := sorted(set(source.labels) - {source.labels[i] for i in found["train"].targets.tolist()}):
        raise DataError(f"{source.name}: class '{empty[0]}' has no readable training image; add some")
    return found


def read_split(
    data: str,
    split: str,
    download_dir: str = "data",
    *,
    run: Path | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    say: Callable[[str], None] = logger.warning,
) -> Iterator[tuple[str, str, bytes]]:
    """The image files of one split as they are, with name and label: what a client would send.

    Args:
        run: a run folder. Its record of what it was trained on goes before the cut.
        say: is told how many images are left out of "test" for the sake of that record, or that there is none.
    """
    source = open_source(data, download_dir)
    known = splits.read(run) if run else None
    assigned = splits.cut_splits(source.entries, val_fraction, test_fraction, seed, known)
    if run and split == "test" and (line := _left_out(run, source, known)):
        say(line)
    for index, image in source.read():
        if assigned[index] == split:
            entry = source.entries[index]
            yield printable(entry.name), entry.label, as_file(image)


def _left_out(run: Path, source: Source, known: Mapping[str, str] | None) -> str:
    """What a user should know of a test split's relation to the run, in a line; or nothing."""
    if known is None:
        return f"{splits.no_record(run)}; the test split is cut anew and may hold images that it was trained on"
    if left_out := splits.learned(splits.overlap(source.entries, known)):
        return f"{source.name}: left out by name: {left_out}"
    return ""
