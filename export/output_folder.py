"""The folder that an export writes: built beside its place, and swapped in whole at the end.

Ctrl-C, a kill or a full disk leave the earlier export as it was, or the new one. Of the earlier one only what it had
written goes (its manifest lists that); a user's own files, and the archives that a rollout keeps there, are carried
over. No file is written or removed through a link.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from predictor.files import sync_folder

EXPORT = "export"
STAGED = "archive"  # the folder in it that torch-model-archiver takes whole; an export's alone
FAILED = "export.failed"  # the graphs of an export whose parity failed, to look at
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"

NEW, OLD = ".export-new-", ".export-old-"
# What a killed export leaves in the run folder, and what one of an earlier version left in the export's.
_LEFT_IN_RUN = re.compile(r"\.export-(new-|old-)?[a-z0-9_]{8}")
_LEFT_IN_EXPORT = re.compile(r"\.(archive|reduced)-[a-z0-9_]{8}|\.(?P<file>.+)\.[a-z0-9_]{8}\.tmp")

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """One export of a run at a time. What a killed one has left is cleaned up: no live process holds it.

    Raises:
        ValueError: another export of the run is at work.
    """
    with _lock(run, wait=False) as locked:
        if locked:
            _clean_up(run)
        yield


@contextlib.contextmanager
def building(run: Path) -> Iterator[Path]:
    """An empty folder named `export`, in a temporary one beside its place. It is removed unless it was put there."""
    with tempfile.TemporaryDirectory(dir=run, prefix=NEW, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / EXPORT
        folder.mkdir()
        yield folder


def check(target: Path, names: Collection[str]) -> None:
    """Looks at what is there before anything is built.

    Args:
        names: of the files that an export may write.

    Raises:
        ValueError: `target` is a link or no folder, or holds a link, a special file, or a file of the user's that has
            one of `names` or lies in `archive`, whose files the archiver packs.
    """
    if target.is_symlink():
        raise ValueError(f"{target}: is a link, and an export writes through none; remove the link, then export again")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: must be a folder; move that file away")
    for path in sorted(target.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            kind = "link" if path.is_symlink() else "special file"
            raise ValueError(f"{path}: is a {kind}, and an export replaces its folder as a whole; move it away")
    is_listed = written_by_export(target) is not None
    for name in foreign(target):
        if name.split("/")[0] == STAGED or (is_listed and name in names):
            raise ValueError(f"{target / name}: no export wrote it, and this one may write that name; move it away")


def written_by_export(target: Path) -> set[str] | None:
    """The names that the earlier export of `target` wrote, by its manifest; None where nothing tells them.

    Exports of before there was a manifest have sums, which may name a user's files too: then only names of an
    export's own kinds count.
    """
    try:
        listed = json.loads((target / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name for name in listed if isinstance(name, str)} | {MANIFEST, SUMS, SIGNATURE}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):  # not one that fails for now
        pass
    try:
        lines = (target / SUMS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    found = {line[66:] for line in lines}
    models = {PurePosixPath(name).stem for name in found if name.endswith(".pt")}
    own = set(COMMON).union(*map(graph_files, models), {f"{model}.mar" for model in models})
    return found & own | {SUMS, SIGNATURE}


COMMON = (
    *("index_to_name.json", "parity.json", "golden.json", "model-config.yaml", "MODEL_CARD.md"),
    *(MANIFEST, SUMS, SIGNATURE),
)


def graph_files(name: str) -> set[str]:
    """All that an export may write for a model, but for the archive."""
    graphs = ("", ".crops", ".pixels")
    full = {f"{name}{graph}.{kind}" for graph in graphs for kind in ("pt2", "onnx")}
    return {f"{name}.pt"} | full | {f"{name}{graph}.{small}.onnx" for graph in graphs for small in ("int8", "fp16")}


def all_files(name: str) -> set[str]:
    """All that an export may write."""
    return graph_files(name) | {f"{name}.mar", *COMMON}


def foreign(target: Path) -> list[str]:
    """What lies in `target` and no export wrote, by its path in it."""
    written = written_by_export(target)
    ours = set(COMMON) if written is None else written
    names = (path.relative_to(target).as_posix() for path in sorted(target.rglob("*")) if not path.is_dir())
    return [name for name in names if name not in ours and not _is_left(name, ours)]


@contextlib.contextmanager
def replacing(new: Path, target: Path) -> Iterator[None]:
    """Carries over into `new` what no export wrote; when the block ends without an error, `new` becomes `target`.

    A rollout that works in `target` is waited for.

    Raises:
        ValueError: `target` cannot be replaced; the message has the way out.
    """
    with _lock(target) if target.is_dir() else contextlib.nullcontext():
        for name in foreign(target):
            if not os.path.lexists(new / name):
                _carry(target / name, new / name)
        if target.is_dir():
            shutil.copymode(target, new)
        yield
        _flush(new)
        _swap(new, target, target.parent / f"{OLD}{new.parent.name.removeprefix(NEW)}")


def put_failed(new: Path, run: Path) -> Path:
    """`new` becomes RUN/export.failed, whose files of an earlier failure go."""
    target = run / FAILED
    if target.is_symlink():
        raise ValueError(f"{target}: is a link, and an export writes through none; remove it, then export again")
    remove_failed(run)
    target.mkdir(exist_ok=True)
    for path in sorted(new.iterdir()):
        path.replace(target / path.name)
    return target


def remove_failed(run: Path) -> None:
    """Removes what a failed export wrote into RUN/export.failed, and the folder if nothing else is in it."""
    target = run / FAILED
    if target.is_symlink() or not target.is_dir():
        return
    for name in written_by_export(target) or ():
        path = target / name
        if PurePosixPath(name).name == name and (path.is_symlink() or path.is_file()):
            path.unlink()
    with contextlib.suppress(OSError):  # something of the user's is in it
        target.rmdir()


def _clean_up(run: Path) -> None:
    """Puts back an export that a kill caught between two renames, and removes the rest of killed exports."""
    left = [p for p in sorted(run.iterdir()) if _LEFT_IN_RUN.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    if not os.path.lexists(run / EXPORT):
        for path in left:
            if path.name.startswith(OLD):
                path.rename(run / EXPORT)
                left.remove(path)
                break
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def _is_left(name: str, ours: Collection[str]) -> bool:
    match = _LEFT_IN_EXPORT.fullmatch(name.split("/")[0])
    return bool(match) and (match["file"] is None or match["file"] in ours)  # type: ignore[index]


def _carry(source: Path, target: Path) -> None:
    """By a hard link, so that large files cost nothing; a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _swap(new: Path, target: Path, aside: Path) -> None:
    """`new` becomes `target`: in one step where the system can, else with the old one `aside` for a moment."""
    try:
        if not target.exists():
            new.rename(target)
        elif not _exchange(new, target):
            target.rename(aside)
            try:
                new.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ValueError(
            f"{target}: cannot be replaced as a whole ({error.strerror}); if it is a mount or a link, export a copy of "
            "the run, and copy the files over"
        ) from None
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux); False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


@contextlib.contextmanager
def _lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Of the folder itself, so that no file is left. It goes with the process that holds it, however that ends.

    Yields:
        Whether it is locked: not where the system or the file system has no such locks.

    Raises:
        ValueError: another process holds it, unless `wait`.
    """
    if os.name == "nt":
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"{folder}: another process works on this run; wait for it, or stop it") from None
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _flush(folder: Path) -> None:
    """To the disk, and not only to its cache: what is swapped in is whole after a power cut too."""
    for path in [*folder.rglob("*"), folder]:
        if stat.S_ISREG(path.lstat().st_mode):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
