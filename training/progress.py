"""Bars on a terminal, for work that says how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def reading_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of the images that are read in the block, from the first on; it is told how many are done, of how many."""
    bar: tqdm[Any] | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:  # not before: what is printed until then would break it
            bar = tqdm(total=total, desc="reading", unit="images", disable=not sys.stderr.isatty(), leave=False)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
