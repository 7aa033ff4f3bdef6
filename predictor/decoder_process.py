"""Decodes what is not plainly harmless in a process of its own, which may be killed.

A worker decodes plain files itself (`image_headers.is_plain`). All else, among it files of a kilobyte that make
libtiff or Pillow work for minutes or take gigabytes, goes to a child process that stays alive beside the worker, has
limits of its own, and is replaced when it has died of an image. It ends when its worker does: its socket then does.

Over that socket, numbers little-endian, with the child as little trusted as the image that it reads:

    to it      u32 length of what follows, u32 length of the file; as JSON the pixel rule and the most pixels (null: no
               limit); the file
    from it    once, as it starts, READY; then for each file u8 kind, u32 length; and
               CROP: uint8 (height, width, 3), RGB, always that long; REFUSED: cause, a line feed, message, in UTF-8

Only the crop comes back, 3 to 1,000 kB: that takes a socket less than a millisecond, and no shared memory is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from predictor.image_headers import is_heif, is_photograph
from predictor.pillow_preprocessing import MAX_PIXELS, NO_MEMORY, ImageError, read
from predictor.spec import PixelRule

BATCH_SECONDS = 1.25  # that all images of a batch may wait for the child: an image may have to wait for two batches
# Of the processor, for one image. A photograph takes long for a reason, its pixels: in Display P3 0.9 s for 48
# megapixels, as HEIC 1 s for 24.
SECONDS = {"photograph": 1.25, "other": 1.0}
MOST_BATCH_SECONDS = 12.0  # whatever the operator allows: TorchServe replaces a worker that takes longer than 30
MEMORY = 64 << 20  # bytes that one image may take: 16 megapixels in Pillow
ALONE_MEMORY = 256 << 20  # and where that is too little, one image at a time of all workers: 50 megapixels, and copies
START_SECONDS = 60.0  # until the first child is ready, on a machine that is starting everything else
MAX_MESSAGE = 4_096  # bytes

_REQUEST, _REPLY = struct.Struct("<II"), struct.Struct("<BI")
READY, CROP, REFUSED = range(3)
_CAUSES = ("empty", "not_an_image", "unsupported_kind", "truncated", "too_many_pixels")

# What the child gets of the environment: how libraries are found, none of the server's secrets.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
_SETTINGS = {
    "OPENBLAS_NUM_THREADS": "1",  # NumPy's library would reserve memory for each core
    "MALLOC_MMAP_THRESHOLD_": "131072",  # glibc: large blocks go back to the system as soon as they are free
    "MALLOC_ARENA_MAX": "1",  # glibc: 64 MB of addresses, which count as memory here, for each thread of libde265
}


class DecoderProcess:
    """The child of one worker. Threads may share it; images go through it one by one."""

    def __init__(self, max_pixels: int | None = MAX_PIXELS) -> None:
        """Starts the child, and does not wait for it; see `wait`.

        Args:
            max_pixels: of an image, or None; where they are more than by default, so are the limits.
        """
        self._lock, self._max_pixels = threading.Lock(), max_pixels
        self._left = 0.0
        self._start()

    def wait(self) -> None:
        """Until the child is ready.

        Raises:
            RuntimeError: it does not start; TorchServe logs that.
        """
        try:
            self._until_ready(time.monotonic() + START_SECONDS)
        except OSError:
            self.close()
            raise RuntimeError("the process that decodes images does not start; is there memory for it?") from None

    def begin_batch(self) -> None:
        self._left = min(BATCH_SECONDS * _scale(self._max_pixels), MOST_BATCH_SECONDS)

    def read(self, body: bytes, rule: PixelRule) -> np.ndarray:
        """`pillow_preprocessing.read` in the child.

        Raises:
            ImageError: as `pillow_preprocessing.read`; `too_slow`: it takes the processor more than SECONDS;
                `no_time`: there is none left in this batch: the machine is busy, or a neighbour was expensive.
        """
        with self._lock:
            started = time.monotonic()
            try:
                if self._left <= 0:
                    raise _no_time()
                return self._ask(body, rule, started + self._left)
            finally:
                self._left -= time.monotonic() - started

    def close(self) -> None:
        """Kills the child."""
        self._end()

    def _ask(self, body: bytes, rule: PixelRule, until: float) -> np.ndarray:
        if self._child.poll() is not None:  # killed between two images
            self._restart()
        try:
            self._until_ready(until)
            settings = json.dumps([asdict(rule), self._max_pixels]).encode()
            self._send(_REQUEST.pack(len(settings), len(body)) + settings, until)
            self._send(body, until)
            kind, length = _REPLY.unpack(self._receive(_REPLY.size, until))
            if kind == CROP and length == rule.height * rule.width * 3:
                return np.frombuffer(self._receive(length, until), np.uint8).reshape(rule.height, rule.width, 3)
            if kind == REFUSED and length <= MAX_MESSAGE:
                raise _refusal(self._receive(length, until))
        except TimeoutError:
            self._restart()
            raise _no_time() from None
        except OSError:
            pass
        raise self._death(_seconds(body, self._max_pixels))

    def _death(self, seconds: float) -> ImageError:
        """Why the child is gone, or answers what it never should; there is a new one.

        Args:
            seconds: that the child had.
        """
        status = self._restart()
        if status == -signal.SIGPROF:
            return ImageError(
                "too_slow", f"decoding this image takes over {seconds:g} s; save it as a JPEG or PNG of fewer pixels"
            )
        if status == -signal.SIGKILL:  # not ours: the system's, when memory is short
            return ImageError("too_many_pixels", NO_MEMORY)
        return ImageError("truncated", "the image is damaged: its decoder crashed")

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        here = Path(__file__).resolve()
        root = here.parents[1]
        module = f"{here.parent.name}.{here.stem}"
        code = f"import sys; sys.path[:] = sys.argv[2:]; import {module} as child; child.main(int(sys.argv[1]))"
        self._is_ready = False
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, str(theirs.fileno()), *map(str, (root, *sys.path))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # TorchServe parses what workers write there
                stderr=subprocess.DEVNULL,  # libtiff can be made to write half a gigabyte
                pass_fds=[theirs.fileno()],
                env={**{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}, **_SETTINGS},
                cwd=root,
            )
        self._end = weakref.finalize(self, _end, self._socket, self._child)

    def _restart(self) -> int:
        """Kills the child if it lives, starts another, and returns the status of the first (0 if it lived).

        Raises:
            ImageError: `no_time`: there is no memory for another now.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):  # a moment, in which it may be dying of its own accord
            self._child.wait(0.05)
        killed = self._child.poll() is None
        self.close()
        status = 0 if killed else self._child.returncode
        try:
            self._start()
        except OSError:
            raise _no_time() from None
        return status

    def _until_ready(self, until: float) -> None:
        if not self._is_ready:
            if self._receive(_REPLY.size, until) != _REPLY.pack(READY, 0):
                raise OSError
            self._is_ready = True

    def _send(self, data: bytes, until: float) -> None:
        self._socket.settimeout(_remaining(until))
        self._socket.sendall(data)

    def _receive(self, length: int, until: float) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._socket.settimeout(_remaining(until))
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError
            view = view[count:]
        return bytes(data)


def _end(connection: socket.socket, child: subprocess.Popen[bytes]) -> None:
    connection.close()
    child.kill()
    child.wait()


def _seconds(body: bytes, max_pixels: int | None) -> float:
    """Of the processor, for this image."""
    return SECONDS["photograph" if is_photograph(body) else "other"] * _scale(max_pixels)


def _scale(max_pixels: int | None) -> float:
    """How many times the usual limits an operator allows who allows larger images."""
    return 8.0 if max_pixels is None else min(8.0, max(1.0, max_pixels / MAX_PIXELS))


def _remaining(until: float) -> float:
    """Seconds; a socket takes 0 for "do not wait"."""
    if (seconds := until - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


def _no_time() -> ImageError:
    return ImageError(
        "no_time",
        "images that are large, have another colour profile or are no JPEG, PNG or WebP share a time in each batch, "
        "and it is over; ask again",
    )


def _refusal(reply: bytes) -> ImageError:
    cause, _, message = reply.decode(errors="replace").partition("\n")
    if cause not in _CAUSES:
        return ImageError("truncated", "the image is damaged: its decoder gives no sense")
    return ImageError(cause, " ".join(message.split()))


# In the child


def main(descriptor: int) -> None:
    """Reads images until the worker closes the socket."""
    _limit()
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as requests:
        connection.sendall(_REPLY.pack(READY, 0))
        while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
            settings, body = (requests.read(length) for length in _REQUEST.unpack(head))
            rule, max_pixels = json.loads(settings)
            kind, reply = _outcome(body, PixelRule(**rule | {"fill": tuple(rule["fill"])}), max_pixels)
            connection.sendall(_REPLY.pack(kind, len(reply)) + reply)
            del body, reply


def _limit() -> None:
    """No core dumps and no files; a signal that ends this process, whatever it is doing, when its time is over."""
    import resource
    import warnings

    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImageError):  # Pillow loads its readers now
        read(b"RIFF", PixelRule.square(1))


def _outcome(body: bytes, rule: PixelRule, max_pixels: int | None) -> tuple[int, bytes]:
    """Kind and content of the reply."""
    scale = _scale(max_pixels)
    crop: np.ndarray | ImageError | None = None
    signal.setitimer(signal.ITIMER_PROF, _seconds(body, max_pixels))
    try:
        if not is_heif(body):  # its decoder would find out that memory is short when most of the work is done
            crop = _attempt(body, rule, max_pixels, MEMORY)
        if crop is None or (isinstance(crop, ImageError) and (crop.cause == "truncated" or str(crop) == NO_MEMORY)):
            with _alone():  # some libraries call a lack of memory damage
                crop = _attempt(body, rule, max_pixels, int(ALONE_MEMORY * scale))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if isinstance(crop, ImageError):
        return REFUSED, f"{crop.cause}\n{crop}".encode(errors="replace")[:MAX_MESSAGE]
    return CROP, crop.tobytes()


def _attempt(body: bytes, rule: PixelRule, max_pixels: int | None, room: int) -> np.ndarray | ImageError:
    try:
        with _memory(room):
            return read(body, rule, max_pixels)
    except ImageError as error:
        return error.bare()
    except MemoryError:
        return ImageError("too_many_pixels", NO_MEMORY)


@contextlib.contextmanager
def _memory(room: int) -> Iterator[None]:
    """At most `room` bytes more than now; where there is no /proc, only time is limited."""
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Of all children whose code lies in this folder, as that of a model's workers does: one at a time."""
    import fcntl

    folder = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
