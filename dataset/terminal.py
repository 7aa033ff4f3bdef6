"""What the packages log, on the terminal of the commands that use them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage())  # above a bar, to standard output as it is now: it may have been redirected
        sys.stdout.flush()


@contextmanager
def printed(*packages: str) -> Iterator[None]:
    """In the block, what these packages log is printed to standard output, a line at a time."""
    handler, loggers = _Lines(), [logging.getLogger(name) for name in packages]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
