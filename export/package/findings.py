"""What a check of an export folder finds: lines that each name the file, the fault and the way out."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.progress import one_line

MOST_TEXT = 64_000_000  # bytes of a text inside an archive: a zip file can promise terabytes
ANEW = "export again or restore the file"


@contextmanager
def noting(file: str, findings: list[str]) -> Iterator[None]:
    """An error of the block becomes a finding: of a wrong file, parsers raise whatever it leads them into."""
    try:
        yield
    except Exception as error:
        findings.append(f"{file}: cannot be read ({one_line(error)}); {ANEW}")


def text_inside(packed: zipfile.ZipFile, name: str) -> str:
    """
    Raises:
        ValueError: it is larger than any text of an export.
    """
    if packed.getinfo(name).file_size > MOST_TEXT:
        raise ValueError(f"'{name}' inside is larger than {MOST_TEXT:,} bytes")
    return packed.read(name).decode()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def differs(what: str, source: str) -> str:
    """The finding where `what` is not the same as the file `source` of this checkout."""
    return (
        f"{what} differs from this checkout's {source}; export again, or, if another checkout made it, check it there "
        "or by its signature (--public-key FILE)"
    )
