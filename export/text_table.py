"""Tables as text: aligned for the terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart. The head is the first line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]], escape: Callable[[Any], str]) -> str:
    """
    Args:
        escape: of the rows' cells; the head is taken as it is.
    """
    lines = [head, ["---"] * len(head), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
