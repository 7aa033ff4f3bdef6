"""The run folder: looked at and locked before an image is read, so that no work is overwritten and none is lost."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import math
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset import splits
from dataset.sample_images import SAMPLES_LIST, refuse_links
from dataset.sources import BUILT_IN
from model import checkpoint
from predictor.files import remove_all_leftovers, remove_leftovers, write_text
from training.resume_state import FILE as CHECKPOINT
from training.tensorboard import Board

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RESULTS = ("model.pt", "spec.json", "metrics.json", "history.csv")
FILES = (
    *RESULTS,
    CHECKPOINT,
    "config.yaml",
    splits.FILE,
    SAMPLES_LIST,
    *(f"report/{n}" for n in ("index.html", "curves.png", "batch.png", "confusion.png", "mistakes.png")),
)
FOLDERS = ("report", "samples", "tensorboard")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of files


@contextmanager
def claimed(out: Path, data: str, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Holds the run folder for the time of the block; makes it if need be, and removes it if nothing came into it.

    Args:
        data: what --data names; the run folder must lie apart from it.
        resume: the run in the folder goes on.
        overwrite: a run in the folder may be replaced.

    Raises:
        ValueError: the folder cannot be used, holds a run, or another training has it; or the disk became full.
    """
    flag = f"{'--resume' if resume else '--out'} {out}"
    try:
        _check_kinds(out, flag)
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        with _locked(out, flag):
            _check_apart(out, data, flag)
            if not resume and not overwrite:
                _check_free(out, flag)
            _check_writable(out, flag)
            for name in FILES:
                remove_leftovers(out / name)
            remove_all_leftovers(out / "samples")
            with _full_disk_in_one_line(out):
                yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty stays
            for folder in made:
                folder.rmdir()


def results_in(out: Path) -> list[str]:
    """The files of a run that the folder holds, by which it is one: weights, or a state to go on from, among them."""
    return [name for name in (*RESULTS, CHECKPOINT) if (out / name).exists()]


def begin(out: Path, *, resume: bool) -> None:
    """Removes the results of an earlier run, unless it goes on: one that ends early would leave another's weights."""
    for name in () if resume else (*RESULTS, CHECKPOINT, splits.FILE):
        (out / name).unlink(missing_ok=True)


def recorded_splits(out: Path) -> dict[str, str] | None:
    """The splits of a run that goes on, so that no image changes its side; None if it has not come to a checkpoint.

    Raises:
        ValueError: it has none.
    """
    known = splits.read(out)
    if known is None and (out / CHECKPOINT).exists():
        raise ValueError(f"--resume {splits.no_record(out)}; start a new run")
    return known


class EpochFiles:
    """What is written after each epoch: last.ckpt, history.csv and, where it is installed, TensorBoard's events.

    Within an epoch it is last.ckpt alone.
    """

    def __init__(self, out: Path, history: Sequence[dict[str, float]]) -> None:
        self._out, self._board = out, Board(out / "tensorboard", math.ceil(history[-1]["epoch"]) if history else 0)
        if history:
            write_history(history, out)  # the kill may have come between the two files

    def save(self, state: Mapping[str, Any]) -> None:
        checkpoint.save(state, self._out / CHECKPOINT)

    def write(self, state: Mapping[str, Any], history: Sequence[dict[str, float]]) -> None:
        self.save(state)
        write_history(history, self._out)
        self._board.write(history[-1])


def write_history(history: Sequence[dict[str, float]], out: Path) -> None:
    """history.csv, a row for each epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    write_text(out / "history.csv", text.getvalue())


def _check_kinds(out: Path, flag: str) -> None:
    """Files where folders must go, and folders where files must go."""
    there = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
    if not there.is_dir():
        which = "is" if there == out else f"{there} is"
        raise ValueError(f"{flag}: {which} a file; name a folder")
    refuse_links(out, FOLDERS)
    for name in FILES:
        if (out / name).is_dir():
            raise ValueError(f"{flag}: {name} is a folder, where a file must go; move it")


def _check_apart(out: Path, data: str, flag: str) -> None:
    if data in BUILT_IN or not Path(data).is_dir():
        return
    own, images = out.resolve(), Path(data).resolve()
    if own == images:
        raise ValueError(f"{flag}: is the folder of --data, where its report would be a class; name another folder")
    if images in own.parents:
        raise ValueError(f"{flag}: lies in --data {data}, and would be a class there; name a folder outside")
    if own in images.parents:
        raise ValueError(f"{flag}: holds --data {data}; name a folder of its own")


def _check_free(out: Path, flag: str) -> None:
    if found := results_in(out):
        raise ValueError(
            f"{flag}: holds a run already ({found[0]}); go on with it (--resume {shlex.quote(str(out))}), "
            "choose another folder, or pass --overwrite"
        )


def _check_writable(out: Path, flag: str) -> None:
    for folder in (out, *(out / name for name in FOLDERS)):
        try:
            if folder.is_dir():
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"{flag}: {folder} cannot be written ({error.strerror}); mend its permissions or choose another folder"
            ) from None


@contextmanager
def _locked(out: Path, flag: str) -> Iterator[None]:
    """The lock is on the folder itself, and ends with the process, however that ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{flag}: another training is at work there; wait for it, or choose another folder") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk_in_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        kept = f"{out / CHECKPOINT} is whole" if (out / CHECKPOINT).exists() else "there is no checkpoint yet"
        go_on = f"--resume {shlex.quote(str(out))}"
        raise ValueError(f"{out}: cannot be written ({error.strerror}); {kept}: make room and pass {go_on}") from None
