"""A table of labelled images: `labels.csv` or `labels.parquet`, with a path and a label in each row.

A path is relative to the table's folder and stays within it. It is what an image is called (`Entry.key`), so a table
that lies in a folder of class folders cuts the images into train, val and test as that folder itself would be cut.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from dataset.sources.base import DataError, Entry, ImageInput, chosen, printable
from dataset.sources.folders import file_stamp, open_files, read_file
from dataset.sources.layout import SPLIT_FOLDERS, find_labels, path_parts

SUFFIXES = (".csv", ".tsv", ".parquet")
DELIMITERS = ",;\t"
COLUMNS = {  # what each column may be called, the first of those that are there
    "path": ("path", "file", "filename", "file_name", "image"),
    "label": ("label", "class"),
    "split": ("split",),
}

Row = tuple[str, str, str, str]  # where it stands ("line 7"), path, label, split


class TableSource:
    """Rows of path, label and perhaps split."""

    flips = True

    def __init__(self, path: Path) -> None:
        self.name, self._folder = path.stem, path.parent
        rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
        self.entries = _read_entries(str(path), rows)
        self.labels = find_labels(str(path), self.entries, {entry.label for entry in self.entries})

    def read(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, ImageInput]]:
        for i in chosen(self.entries, wanted):
            yield i, read_file(self._folder / self.entries[i].name)

    def peek(self, indices: Sequence[int]) -> Iterator[IO[bytes]]:
        return open_files(self._folder / self.entries[i].name for i in indices)

    def stamps(self, indices: Sequence[int]) -> list[str]:
        return [file_stamp(self._folder / self.entries[i].name) for i in indices]


def path_within(path: str) -> str | None:
    """A relative path in its shortest form, with `/`; None if it leads out of the folder that it is relative to."""
    parts = path_parts(path)
    windows = PureWindowsPath(path)
    is_absolute = windows.drive or windows.root or PurePosixPath(path).is_absolute()
    return None if is_absolute or ".." in parts or not parts else "/".join(parts)


def _read_entries(where: str, rows: Iterable[Row]) -> list[Entry]:
    """
    Raises:
        DataError: there are no rows, or one has no label, an unknown split, a path that leads out of the folder or that
            an earlier row has.
    """
    entries, seen = [], dict[str, str]()
    for place, path, label, split in rows:
        name = path_within(path)
        if name is None:
            shown = f"the path {printable(path)!r} leads out of the table's folder" if path else "there is no path"
            raise DataError(f"{where}: {place}: {shown}; give paths below the folder, relative to it")
        if not label:
            raise DataError(f"{where}: {place}: {printable(name)} has no label; fill it in or remove the row")
        if split and split.lower() not in SPLIT_FOLDERS:
            raise DataError(f"{where}: {place}: unknown split {split!r}; give train, val or test, or leave it empty")
        key, label = (unicodedata.normalize("NFC", text) for text in (name, label))
        if earlier := seen.get(key):
            raise DataError(f"{where}: {place}: {printable(name)} stands in {earlier} already; remove one of them")
        seen[key] = place
        entries.append(Entry(name, label, SPLIT_FOLDERS.get(split.lower(), ""), key))
    if not entries:
        raise DataError(f"{where}: has no rows; give a path and a label in each")
    return sorted(entries, key=lambda entry: entry.key)


def _find_columns(where: str, names: Sequence[str]) -> dict[str, int]:
    """Index of each column that is there, by what it holds.

    Raises:
        DataError: one that is needed is missing, or there twice.
    """
    plain = [name.strip().lower() for name in names]
    found = {}
    for column, called in COLUMNS.items():
        if name := next((name for name in called if name in plain), None):
            if plain.count(name) > 1:
                raise DataError(f"{where}: has {plain.count(name)} columns {name!r}; rename all but one")
            found[column] = plain.index(name)
        elif column != "split":
            shown = ", ".join(repr(printable(name)) for name in names) or "nothing"
            raise DataError(f"{where}: has no column {column!r}; its columns are {shown}; name one of them so")
    return found


def _csv_rows(path: Path) -> Iterator[Row]:
    """
    Raises:
        DataError: the file is not UTF-8, no CSV, has no such columns, or a row of another length.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(DELIMITERS, key=lambda one: _width(header, one))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            columns = _find_columns(str(path), names)
            for cells in reader:
                if not any(cell.strip() for cell in cells):  # spreadsheets write such rows at the end
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}: line {reader.line_num}: has {len(cells)} cells where the header has {len(names)}; "
                        "put cells that hold the delimiter in double quotes"
                    )
                cell = {column: cells[index].strip() for column, index in columns.items()}
                yield f"line {reader.line_num}", cell["path"], cell["label"], cell.get("split", "")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; save the table as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: is no CSV ({error}); save the table anew") from None


def _width(header: str, delimiter: str) -> int:
    """The number of columns that a header has with this delimiter."""
    try:
        return len(next(csv.reader([header], delimiter=delimiter), []))
    except csv.Error:
        return 0


def _parquet_rows(path: Path) -> Iterator[Row]:
    """
    Raises:
        DataError: pyarrow is missing; the file is damaged, has no such columns, or a cell is neither text nor a whole
            number.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow, of the extra 'datasets'; pip install datasets") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = _find_columns(str(path), names)
            table = file.read(columns=[names[index] for index in columns.values()])
    except (ArrowException, OSError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise DataError(f"{path}: is no Parquet file, or damaged ({reason}); write it anew") from None
    values = {
        column: [cell_text(f"{path}: column {names[index]!r}", cell) for cell in table.column(names[index]).to_pylist()]
        for column, index in columns.items()
    }
    splits = values.get("split") or [""] * table.num_rows
    for number, cells in enumerate(zip(values["path"], values["label"], splits, strict=True), start=1):
        yield f"row {number}", *cells


def cell_text(where: str, cell: Any) -> str:
    """
    Raises:
        DataError: it is neither text, nor a whole number, nor empty.
    """
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell.strip()
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    raise DataError(f"{where}: holds values of type {type(cell).__name__}; give text, or whole numbers as labels")
