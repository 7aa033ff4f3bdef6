"""The worst that one client can send: what each costs its neighbours, the workers and the machine's memory.

Each attack has a fresh server, four connections at once that send it again and again, and neighbours that ask about
good images all the while. An attack is harmless if no neighbour waits more than WAIT seconds or loses a response, no
worker is replaced, and the server's processes together grow by at most MEMORY MiB.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.probes import KnownImages, family, probing, workers_of
from benchmarks.serving.workload import SMALL
from launcher import Ports, RunningServer, serving

CONNECTIONS, SECONDS = 4, 10  # of the attacker; a request that is under way then is waited for
CALM_SECONDS = 2  # of neighbours alone, before the attack
WAIT, MEMORY = 3.0, 400  # s that a neighbour may wait, MiB that the server may grow by
TIMEOUT = 90.0  # s for a response to the attacker
LARGE = 10_000_000  # bytes of a JSON body: below TorchServe's limit of 10 MiB

Send = Callable[[RunningServer], int]  # sends the attack once; returns the status of the response, 0 for none


@dataclass(frozen=True)
class Body:
    """One request to the model's endpoint."""

    body: bytes
    content_type: str = "application/octet-stream"
    path: str = f"/predictions/{SMALL}"

    def __call__(self, server: RunningServer) -> int:
        headers = {"Authorization": f"Bearer {server.key()}", "Content-Type": self.content_type}
        return requests.post(server.url + self.path, self.body, headers=headers, timeout=TIMEOUT).status_code


@dataclass(frozen=True)
class Stream:
    """A call of TorchServe's gRPC API for streams, in one direction or in both."""

    image: bytes
    both_ways: bool = False

    def __call__(self, server: RunningServer) -> int:
        import grpc

        from tests import grpc_call

        with suppress(grpc.RpcError):
            if self.both_ways:
                grpc_call.stream_both_ways(server, [{"data": self.image}], model=SMALL)
            else:
                grpc_call.stream(server, {"data": self.image}, model=SMALL)
            return 200
        return 0


def attacks(image: bytes) -> dict[str, Send]:
    """By name. `image` is a good one, which some of them need."""
    from tests.hostile_images import IMAGES
    from tests.icc import P3
    from tests.kinds import LARGE_HEIC, gradient, save

    numbers = b'{"instances": [' + b"0," * (LARGE // 2) + b"0]}"
    texts = {"name": "x", "datatype": "BYTES", "shape": [LARGE // 3], "data": [""] * (LARGE // 3)}
    pixels = {"name": "x", "datatype": "UINT8", "shape": [1, LARGE // 6, 1, 3], "data": [0] * (LARGE // 2)}
    explained = {"instances": [{"b64": base64.b64encode(image).decode()}] * 8}
    giants = {"instances": [{"b64": base64.b64encode(IMAGES["png of 16 megapixels"]).decode()}] * 150}
    found: dict[str, Send] = {
        "5 million numbers as instances": Body(numbers, "application/json"),
        "3.3 million texts (v2)": Body(_dense({"inputs": [texts]}), "application/json"),
        "5 million pixels as JSON (v2)": Body(_dense({"inputs": [pixels]}), "application/json"),
        "explanations of 8 images": Body(_dense(explained), "application/json", f"/explanations/{SMALL}"),
        "150 PNG files of 16 megapixels as instances": Body(_dense(giants), "application/json"),
        "heic of 24 megapixels": Body(LARGE_HEIC),
        "jpeg of 48 megapixels in Display P3": Body(
            save(gradient(800, 600).resize((8_000, 6_000)), "JPEG", icc_profile=P3)
        ),
        "gRPC StreamPredictions": Stream(image),
        "gRPC StreamPredictions2": Stream(image, both_ways=True),
    }
    return found | {name: Body(file) for name, file in IMAGES.items()}


def part_attacks(archive: Path, images: KnownImages, folder: Path, options: Any) -> dict[str, Any]:
    """What each attack costs, by its name."""
    found = {}
    for number, (name, send) in enumerate(attacks(images.bodies[0]).items()):
        with serving([archive], folder / str(number), ports=Ports.free()) as server:
            found[name] = cost_of(server, send, images.bodies[0])
        print(f"  {attack_line(name, found[name])}", flush=True)
    return found


def cost_of(server: RunningServer, send: Send, image: bytes) -> dict[str, Any]:
    """One attack on a server that neighbours send `image` to.

    Returns:
        longest: s, the longest wait of a neighbour during the attack or after it; calm: the same before it;
        failed: neighbours' requests that got no response, by status; replaced: workers; mebibytes: growth at the peak;
        statuses: the attacker's responses, by status.
    """
    workers = workers_of(server)
    statuses: Counter[str] = Counter()
    with probing(server, image) as notes, _peak(server) as memory:
        time.sleep(CALM_SECONDS)
        before, at = memory[-1], time.monotonic()
        _attack(server, send, statuses)
        time.sleep(CALM_SECONDS)
    during = [note for note in notes if note.done > at]
    return {
        "longest": max(note.done - note.sent for note in during),
        "calm": max(note.done - note.sent for note in notes if note.done <= at),
        "failed": dict(Counter(str(note.status or "no response") for note in during if note.status != 200)),
        "neighbours": len(during),
        "replaced": len(set(workers) - set(workers_of(server))),
        "mebibytes": max(memory) - before,
        "statuses": dict(statuses),
    }


def is_harmless(found: Mapping[str, Any]) -> bool:
    is_quiet = found["longest"] <= WAIT and not found["failed"]
    return is_quiet and not found["replaced"] and bool(found["mebibytes"] <= MEMORY)


def attack_line(name: str, found: Mapping[str, Any]) -> str:
    said = ", ".join(f"{count} × {status}" for status, count in found["statuses"].items())
    failed = ", ".join(f"{count} × {status}" for status, count in found["failed"].items()) or "none"
    return (
        f"{name:44} {'harmless' if is_harmless(found) else 'COSTLY  '} wait {found['longest']:5.2f} s, "
        f"failed: {failed} of {found['neighbours']}, {found['replaced']} workers replaced, "
        f"{found['mebibytes']:+5.0f} MiB; got {said}"
    )


def _attack(server: RunningServer, send: Send, statuses: Counter[str]) -> None:
    """CONNECTIONS threads for SECONDS; every response's status is counted."""
    until = time.monotonic() + SECONDS

    def repeat() -> None:
        while time.monotonic() < until:
            try:
                status = str(send(server))
            except requests.RequestException as error:
                status = type(error).__name__
            statuses[status] += 1

    threads = [threading.Thread(target=repeat) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def _peak(server: RunningServer) -> Iterator[list[float]]:
    """Resident MiB of all the server's processes, every 50 ms."""
    over, seen = threading.Event(), [_resident(server)]

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(_resident(server))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _resident(server: RunningServer) -> float:
    """The sum over the processes but for Java, whose heap grows to its own limit (`-Xmx`) whatever is sent."""
    total = 0
    for process in family(server):
        with suppress(psutil.Error):
            total += 0 if process.name() == "java" else process.memory_info().rss
    return total / 2**20


def _dense(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
