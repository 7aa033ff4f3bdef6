"""What an export says while it works, through `logging`: a line for each step that is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)


def say(line: str) -> None:
    """A line, which `python -m export` prints."""
    log.info(line)


def one_line(error: Exception) -> str:
    """What an error says of itself, or else its kind."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says that `what` is done and how long it took; on a terminal also that it is being done."""
    started = time.perf_counter()
    with tqdm(desc=f"{what} …", bar_format="{desc}", leave=False, disable=None):  # on a terminal only
        yield
    say(f"{what}: {time.perf_counter() - started:.1f} s")
