"""Where labelled images come from: data sets known by name, folders, archives read in place, label tables, and Hugging
Face data sets on disk.

A source lists its images first (`entries`) and reads them afterwards, once, in its own order (`read`), so that a
compressed archive is never unpacked to disk.
"""

from __future__ import annotations

import difflib
import zipfile
from pathlib import Path

from dataset.sources.archives import TarSource, ZipSource
from dataset.sources.base import DataError, Entry, ImageInput, Source, Unreadable, printable
from dataset.sources.builtin import BUILT_IN
from dataset.sources.folders import FolderSource
from dataset.sources.huggingface import HuggingFaceSource, is_saved
from dataset.sources.tables import SUFFIXES as TABLES
from dataset.sources.tables import TableSource

__all__ = ["BUILT_IN", "DataError", "Entry", "ImageInput", "Source", "Unreadable", "open_source", "printable"]


def open_source(data: str, download_dir: str = "data") -> Source:
    """The source that `--data` names.

    Raises:
        DataError: there is none, or its layout breaks a rule.
    """
    if data in BUILT_IN:
        return BUILT_IN[data](data, download_dir)
    path = Path(data)
    if path.is_dir():
        return HuggingFaceSource(path) if is_saved(path) else FolderSource(path)
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return TableSource(path)
        if zipfile.is_zipfile(path):
            return ZipSource(path)
        return TarSource(path)
    close = difflib.get_close_matches(data, BUILT_IN, n=1)
    choices = f"give one of {', '.join(BUILT_IN)}, a folder, an archive or a table"
    hint = f"did you mean {close[0]}?" if close else choices
    raise DataError(f"--data {data}: no such data set, folder, archive or table; {hint}")
