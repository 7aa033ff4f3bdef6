"""What this project changes in TorchServe's worker, so that it spends its time on images.

The patches are about its inner loop (ts/protocol/otf_message_handler.py of 0.12, the last release), and none changes
what goes over the wire. Another release is not patched, and the log says so; nor is this one with `patch_worker: false`
in model-config.yaml. One setting of TorchServe's own is made in any case: JSON is left to the handler.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from collections.abc import Callable
from socket import socket

TORCHSERVE = "0.12."  # the release that is changed
BUFFER = 1 << 18  # bytes: a batch of small images in one read


def tune(is_wanted: bool = True) -> None:
    """Called once, when the handler is initialised.

    Args:
        is_wanted: the setting `patch_worker`.
    """
    leave_json()
    if not is_wanted:
        return
    import ts

    if not ts.__version__.startswith(TORCHSERVE):
        logging.warning(
            "TorchServe's worker is left as it is, which is slower: %s is not %sx, for which the changes were written",
            ts.__version__,
            TORCHSERVE,
        )
        return
    read_ahead()
    log_less()


def read_ahead() -> None:
    """Reads the frontend's messages through a buffer; upstream makes a system call for each number and string.

    Together they took a sixth of a worker's time with a small network.
    """
    from ts.protocol import otf_message_handler as protocol

    read: Callable[[int], bytes] | None = None  # of the worker's one connection
    number = struct.Struct("!i").unpack

    def retrieve_buffer(connection: socket, length: int) -> bytes:
        nonlocal read
        if read is None:
            read = connection.makefile("rb", BUFFER).read
        data = read(length) if length > 0 else b""  # upstream takes a negative length for none
        if len(data) < length:
            sys.exit(0)  # the frontend is gone; as upstream
        return data

    protocol._retrieve_buffer = retrieve_buffer
    protocol._retrieve_int = lambda connection: number(retrieve_buffer(connection, 4))[0]


def leave_json() -> None:
    """JSON arrives as bytes: otherwise TorchServe makes objects of it, however many, and a traceback in the log if it
    cannot. This is a setting of its own, and no patch."""
    os.environ["TS_DECODE_INPUT_REQUEST"] = "false"


def log_less() -> None:
    """Warnings and metrics only: upstream logs a line for each batch, which the frontend reads, parses and writes."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ts.metrics").setLevel(logging.INFO)  # metrics go to the frontend as log lines
