"""Ctrl-C and SIGTERM, which end a training at the next step rather than in the middle of one.

SIGTERM is how schedulers, `kill` and the notice of a spot machine end a program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(on_first: Callable[[int], None]) -> Iterator[Callable[[], int]]:
    """Gives a function that returns the number of the first signal, 0 before it.

    `on_first` is called with that number. The second signal ends the program at once.
    """
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)
        undo()
        on_first(number)

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        undo()
