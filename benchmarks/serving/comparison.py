"""Servers under the same load by turns, every response checked."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import requests

from benchmarks.load import TOLERANCE, Request, ask, load
from benchmarks.servers import ServerUnderTest

DRAINING = 1.0  # seconds after a response, in which the other worker too ends its batch
WAKING = 1.0  # seconds of load before each that counts: BentoML learns from the clock how long to wait for a batch

Starts = dict[str, Callable[[], contextlib.AbstractContextManager[ServerUnderTest]]]

log = logging.getLogger(__name__)


def known(server: ServerUnderTest, bodies: Sequence[bytes], expected: Sequence[tuple[str, float]]) -> list[Request]:
    """The requests with their predictions, which are those of the same graph in this process."""
    found = []
    with server.awake():
        for body, (label, value) in zip(bodies, expected, strict=True):
            request = server.body(body)
            best = ask(server.url, server.key, request)
            if len(best) != 1 or best[0][0] != label or abs(best[0][1] - value) > TOLERANCE:
                raise RuntimeError(f"{server.url} predicts {best}, the graph in this process {label}: {value:.4f}")
            found.append(replace(request, best=best))
    return found


def compare(
    starts: Starts,
    requests_of: Callable[[str, ServerUnderTest], list[Request]],
    connections: Sequence[int],
    rounds: int,
    seconds: float,
    images: int = 1,
    warm_up: float | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Each server under each load, by turns; medians.

    Args:
        images: of one request.
        warm_up: seconds of load for each server before the first turn; by default as many as of a turn.
        tolerance: of a probability.
    """
    results: dict[str, dict[int, list[dict[str, float]]]] = {}
    with ExitStack() as stack:
        running = {label: stack.enter_context(start()) for label, start in starts.items()}
        wanted = {label: requests_of(label, server) for label, server in running.items()}
        for label, server in running.items():
            with server.awake():  # Java and TorchScript optimise
                load(server.url, server.key, wanted[label], max(connections), warm_up or seconds)
                _drain(server, wanted[label][0])
        for _ in range(rounds):
            for label, server in running.items():
                for number in connections:
                    found = _measure(server, wanted[label], number, seconds, images, tolerance)
                    results.setdefault(label, {}).setdefault(number, []).append(found)
        memory = {label: server.mebibytes() for label, server in running.items()}
        ready = {label: server.ready_seconds for label, server in running.items()}
    return {
        label: {
            "loads": {str(number): _medians(found) for number, found in by_number.items()},
            "mebibytes": memory[label],
            "ready_seconds": ready[label],
        }
        for label, by_number in results.items()
    }


def _measure(
    server: ServerUnderTest, wanted: list[Request], number: int, seconds: float, images: int, tolerance: float
) -> dict[str, float]:
    with server.awake():
        load(server.url, server.key, wanted, number, WAKING)
        _drain(server, wanted[0])
        before = server.cpu_seconds()
        found = load(server.url, server.key, wanted, number, seconds, tolerance)
        spent = server.cpu_seconds() - before
        _drain(server, wanted[0])
    if found.wrong:
        log.warning("%s: %d wrong, e.g. %s", server.url, found.wrong, found.said[:150])
    rate = found.requests_per_second * images
    return {
        "images_per_second": rate,
        "p50_ms": found.p50,
        "p99_ms": found.p99,
        "wrong": found.wrong,
        "failed": found.failed,
        "cpu_seconds_per_1000": 1000 * spent / max(rate * seconds, 1),
    }


def _drain(server: ServerUnderTest, request: Request) -> None:
    """Waits for what wrk left behind: it would fill a queue of 100, and a server that rests would time out on it, and
    spend the beginning of its next turn on a new worker."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            ask(server.url, server.key, request)
            time.sleep(DRAINING)
            return
        time.sleep(0.2)


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    totals = ("wrong", "failed")
    return {key: (sum if key in totals else statistics.median)(row[key] for row in rows) for key in rows[0]}
