"""A data set that Hugging Face's `datasets` has saved to disk: `save_to_disk` of a Dataset or a DatasetDict.

Nothing is fetched, no code of the data set is run, and no file outside its folder is opened. An image is called
`[SPLIT/]LABEL/FILE` (`Entry.key`), as in a folder of class folders, by the file name that the data set keeps. One
without a name, or with that of an earlier row, is called `[SPLIT/]LABEL/#ROW`: its side of a cut then depends on it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dataset.sources.base import DataError, Entry, ImageInput, Unreadable, chosen, printable
from dataset.sources.folders import MAX_FILE_BYTES, TOO_LARGE
from dataset.sources.layout import SPLIT_FOLDERS, find_labels, path_parts
from dataset.sources.tables import cell_text

if TYPE_CHECKING:
    from datasets import Dataset

DICT, INFO, STATE = "dataset_dict.json", "dataset_info.json", "state.json"
NO_BYTES = Unreadable("the data set names a file and does not hold it; save it with its images")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` has written this folder."""
    return (folder / DICT).is_file() or all((folder / name).is_file() for name in (INFO, STATE))


class HuggingFaceSource:
    """Rows of an image and a label, which is a ClassLabel, text or a whole number."""

    flips = True

    def __init__(self, path: Path) -> None:
        self.name = path.resolve().name
        rows: list[tuple[Entry, Any, int]] = []  # with the column that holds its image, and its row there
        for split, part in _load(path):
            images, labels = _read_columns(f"{path}: split {split!r}" if split else str(path), part)
            rows += [(entry, images, row) for row, entry in enumerate(_read_entries(split, images, labels))]
        if not rows:
            raise DataError(f"{path}: has no rows; save it with its images")
        rows.sort(key=lambda row: row[0].key)
        self.entries = [entry for entry, _, _ in rows]
        self._stored = [(images, row) for _, images, row in rows]
        self.labels = find_labels(str(path), self.entries, {entry.label for entry in self.entries})

    def read(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, ImageInput]]:
        for i in chosen(self.entries, wanted):
            yield i, self._body(i)

    def peek(self, indices: Sequence[int]) -> Iterator[IO[bytes]]:
        yield from (BytesIO(body) for body in map(self._body, indices) if isinstance(body, bytes))

    def stamps(self, indices: Sequence[int]) -> None:
        return None

    def _body(self, index: int) -> bytes | Unreadable:
        images, row = self._stored[index]
        stored = images[row]["bytes"] if images[row].is_valid else None
        if stored is None or not (stored.is_valid and stored.as_buffer().size):
            return NO_BYTES
        return stored.as_py() if stored.as_buffer().size <= MAX_FILE_BYTES else Unreadable(TOO_LARGE)


def _load(path: Path) -> list[tuple[str, Dataset]]:
    """The data set of each split by its name, which is "" where there are none.

    Raises:
        DataError: `datasets` is missing; the folder is damaged, names files outside, or has splits of other names.
    """
    try:
        from datasets import load_from_disk
        from pyarrow import ArrowException
    except ImportError:
        reason = "was saved by Hugging Face's datasets, the extra 'datasets'"
        raise DataError(f"{path}: {reason}; pip install datasets") from None
    try:
        if not (path / DICT).is_file():
            _check_files(path)
            return [("", load_from_disk(path.resolve()))]
        splits = json.loads((path / DICT).read_text(encoding="utf-8"))["splits"]
        _check_splits(path, splits)
        for split in splits:
            _check_files(path / split)
        return [(split, load_from_disk((path / split).resolve())) for split in splits]
    except DataError:
        raise
    except (ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise DataError(f"{path}: cannot be loaded ({reason}); save it anew with save_to_disk") from None


def _check_splits(path: Path, splits: Sequence[str]) -> None:
    if other := [split for split in splits if split.lower() not in SPLIT_FOLDERS]:
        raise DataError(f"{path}: has a split {other[0]!r}; only train, validation and test may be there")
    if "train" not in map(str.lower, splits):
        raise DataError(f"{path}: has no split 'train'; its splits are {', '.join(splits) or 'none'}")


def _check_files(folder: Path) -> None:
    """
    Raises:
        DataError: the folder names files outside, which a data set from elsewhere must not have read.
    """
    for file in json.loads((folder / STATE).read_text(encoding="utf-8"))["_data_files"]:
        if path_parts(file["filename"]) != (file["filename"],):
            raise DataError(f"{folder}: names a file outside, {printable(file['filename'])!r}; save the data set anew")


def _read_columns(where: str, part: Dataset) -> tuple[Any, list[str]]:
    """The column of images, as pyarrow keeps structs of bytes and path, and the labels.

    Raises:
        DataError: there are no such columns, or several; a row has no label.
    """
    image, label = _find_columns(where, part.features)
    names = getattr(part.features[label], "names", None)  # of a ClassLabel
    table, labels = part.with_format("arrow")[:], []
    for row, cell in enumerate(table.column(label).to_pylist()):
        if names is not None:
            cell = _class_name(f"{where}: row {row}: column {label!r}", names, cell)
        text = cell_text(f"{where}: column {label!r}", cell)
        if not text:
            raise DataError(f"{where}: row {row} has no label; remove the rows without one")
        labels.append(unicodedata.normalize("NFC", text))
    return table.column(image), labels


def _class_name(where: str, names: Sequence[str], cell: int | None) -> str | None:
    """
    Raises:
        DataError: no class has this number.
    """
    if cell is None or cell == -1:  # -1 where a test split hides its labels
        return None
    if not 0 <= cell < len(names):
        raise DataError(f"{where}: {cell} is the number of no class, which are 0 to {len(names) - 1}; mend the row")
    return names[cell]


def _find_columns(where: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the columns of images and of labels: the only one of its kind, or `image` and `label`."""
    from datasets import ClassLabel, Image, Value

    def only(wanted: str, names: list[str]) -> str:
        if wanted in names:
            return wanted
        if len(names) != 1:
            has = f"{len(names)} columns could be the {wanted}" if names else f"no column is the {wanted}"
            shown = ", ".join(map(repr, names or features))
            raise DataError(f"{where}: {has} ({shown}); rename the one to use to {wanted!r}")
        return names[0]

    images, classes = (
        [name for name, one in features.items() if isinstance(one, kind)] for kind in (Image, ClassLabel)
    )
    values = [name for name, one in features.items() if isinstance(one, Value) and (name == "label" or _is_text(one))]
    return only("image", images), only("label", classes or values)


def _is_text(feature: Any) -> bool:
    return "string" in feature.dtype


def _read_entries(split: str, images: Any, labels: Iterable[str]) -> Iterator[Entry]:
    from pyarrow import compute

    seen = set[str]()
    for row, (label, path) in enumerate(zip(labels, compute.struct_field(images, "path").to_pylist(), strict=True)):
        folder, number = "/".join(filter(None, (split, label))), f"#{row}"
        key = f"{folder}/{unicodedata.normalize('NFC', (path_parts(path or '') or (number,))[-1])}"
        if key in seen:
            key = f"{folder}/{number}"
        seen.add(key)
        yield Entry(key, label, SPLIT_FOLDERS.get(split.lower(), ""))
