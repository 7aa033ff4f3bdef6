"""The folder that a TorchServe works in: locked for one server, with temporary files that only its owner may reach."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import ServerError
from launcher.ports import Ports

KILLED_SECONDS = 5  # that a killed server may take to be gone
LOCK = "lock"  # in the server's folder: locked while a TorchServe works there


@contextmanager
def locked(folder: Path, ports: Ports) -> Iterator[int]:
    """Yields the lock of the folder, a file descriptor. Whoever inherits it keeps the folder locked.

    Raises:
        ServerError: another server works there.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + KILLED_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pid, group, first = (*map(int, os.pread(lock, 100, 0).split()), 0, 0, 0)[:3]
            if _is_alive(pid):
                raise ServerError(
                    f"{folder}: another server works there (process {pid}, port {first}); stop it first, or copy the "
                    "run folder and serve the copy"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"{folder}: TorchServe still works there, without serve.py; end it: kill -- -{group}")
            time.sleep(0.05)
        note_owner(lock, ports)
        yield lock
    finally:
        os.close(lock)


def note_owner(lock: int, ports: Ports, group: int = 0) -> None:
    """For the message to whoever finds the folder locked: serve.py's process, TorchServe's group, the first port."""
    os.pwrite(lock, f"{os.getpid():10} {group:10} {ports.inference:5}".encode(), 0)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


def make_temporary_folder(folder: Path) -> Path:
    """An empty folder for TorchServe's pid file, sockets and unpacked models, without those of a killed server.

    Nobody else may enter it: whoever connects to a worker's socket needs no key. It lies in `folder`, or in /tmp where
    that path would be too long for a socket (108 bytes on Linux, 104 on macOS).
    """
    own = folder.resolve() / "tmp"
    if len(os.fsencode(own / ".ts.sock.65535")) < 104:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(mode=0o700, parents=True)
        return own
    return Path(tempfile.mkdtemp(prefix="torchserve-", dir="/tmp"))
