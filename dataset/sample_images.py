"""Some images of the val split, kept as files in the run folder: for parity checks and for trying the endpoint."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

from PIL import Image

from dataset.sources import Entry
from predictor.files import atomic_write, sha256, write_text
from predictor.pillow_preprocessing import KINDS

SAMPLES = 64  # images at the most
SAMPLES_LIST = "samples.json"  # in the run folder: which files of RUN/samples a run has written
LABEL_BYTES = 80  # of a label in a file name, which may have 255 in all
FILE_BYTES = 2 << 20  # of each at the most, so that a run folder stays small
logger = logging.getLogger(__name__)


def choose_samples(entries: Sequence[Entry], splits: Sequence[str]) -> set[int]:
    """Indices of images of the val split, the classes in turn, so that each has its share."""
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, (entry, split) in enumerate(zip(entries, splits, strict=True)):
        if split == "val":
            by_class[entry.label].append(index)
    rounds = max(map(len, by_class.values()), default=0)
    turns = (indices[i] for i in range(rounds) for _, indices in sorted(by_class.items()) if i < len(indices))
    return set(islice(turns, SAMPLES))


def name_samples(entries: Sequence[Entry], files: Mapping[int, bytes]) -> dict[str, bytes]:
    """`LABEL-0.png`, `LABEL-1.png`, …: names that a person can type. Large files are left out.

    Args:
        files: by index in `entries`.
    """
    named: dict[str, bytes] = {}
    counts: dict[str, int] = defaultdict(int)
    for index, body in sorted(files.items()):
        if len(body) > FILE_BYTES:
            continue
        label = "".join(c if c.isalnum() else "_" for c in entries[index].label)
        label = label.encode()[:LABEL_BYTES].decode(errors="ignore")
        number = counts[label.casefold()]  # for each name, not each class: two long labels may begin alike
        named[f"{label}-{number}{_suffix(entries[index].name, body)}"] = body
        counts[label.casefold()] += 1
    return named


def _suffix(name: str, body: bytes) -> str:
    """As the file's name has it; as its format where a table or a data set names it without one."""
    if suffix := PurePosixPath(name).suffix.lower():
        return suffix
    with contextlib.suppress(Exception), Image.open(io.BytesIO(body), formats=KINDS) as image:
        return f".{image.format}".lower()
    return ""


def save_samples(samples: dict[str, bytes], folder: Path, say: Callable[[str], None] = logger.warning) -> None:
    """Writes the files, and removes those of an earlier run. What no run has written, or was changed since, is left.

    The names and SHA-256 of the files stand in SAMPLES_LIST beside the folder.

    Args:
        say: is told of files that stand where a sample would.

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
        say(f"{folder}: {len(taken)} files that no run has written were left as they are, such as {taken[0]}")


def refuse_links(run: Path, names: Iterable[str]) -> None:
    """Raises ValueError where a link or a file stands in the place of a folder that a run writes into.

    Args:
        names: of the folders, in the run's own.
    """
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
