"""What an export says while it works: a line for each step that is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


def say(line: str) -> None:
    """A line on stdout, at once, above a bar where there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def one_line(error: Exception) -> str:
    """What an error says of itself, or else its kind."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says that `what` is done and how long it took; on a terminal also that it is being done."""
    started = time.perf_counter()
    if sys.stderr.isatty():
        print(f"{what} …", end="\r", file=sys.stderr, flush=True)
    yield
    say(f"{what}: {time.perf_counter() - started:.1f} s")
