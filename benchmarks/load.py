"""Load on a server, with every response checked: wrk where it is installed, else `requests` in threads (slower)."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

SCRIPT = Path(__file__).with_name("load.lua")
TOLERANCE = 1e-3  # of a probability: far above rounding, far below what another image gets
RESPONSE = np.dtype([("due", "f8"), ("sent", "f8"), ("done", "f8"), ("status", "i4"), ("correct", "i4")])  # s
BEST = re.compile(rb'{\s*"([^"]+)":\s*([\d.e-]+)')  # the first label of a response, in each shape of responses


@dataclass(frozen=True)
class Request:
    """A body to send, and the best label and its probability of each image in it."""

    body: bytes
    content_type: str
    best: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """What a load found. Only correct responses count."""

    requests_per_second: float
    p50: float  # ms
    p99: float  # ms
    wrong: int  # responses that were not the known one, errors included
    failed: int  # requests without a response
    said: str = ""  # one of the wrong responses


def best_of(response: bytes) -> tuple[tuple[str, float], ...]:
    """The best label and its probability of each image of a response, in order."""
    return tuple((label.decode(), float(value)) for label, value in BEST.findall(response))


def ask(url: str, key: str, request: Request) -> tuple[tuple[str, float], ...]:
    """One response, for nobody else at the same time."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": request.content_type}
    reply = requests.post(url, data=request.body, headers=headers, timeout=60)
    reply.raise_for_status()
    return best_of(reply.content)


def load(
    url: str, key: str, wanted: Sequence[Request], connections: int, seconds: float, tolerance: float = TOLERANCE
) -> Result:
    """As many requests as `connections` clients can make, each waiting for its response before it asks again.

    Args:
        tolerance: of a probability.
    """
    if shutil.which("wrk"):
        return _wrk(url, key, wanted, connections, seconds, variables={"TOLERANCE": str(tolerance)})
    return _threads(url, key, wanted, connections, seconds, tolerance)


def timed(
    url: str, key: str, wanted: Sequence[Request], connections: int, seconds: int, rate: float | None = None
) -> tuple[Result, np.ndarray]:
    """The same with wrk only, and every response: an array of RESPONSE in the order of `done`.

    Args:
        rate: requests a second that leave at fixed times, whatever the responses take, as long as a connection is free;
            one that had to wait for its connection counts from when it was `due`. By default each connection asks again
            as soon as it has its response.

    Raises:
        RuntimeError: wrk is missing, or failed.
    """
    if not shutil.which("wrk"):
        raise RuntimeError("wrk is missing, which makes this load: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        variables = {"RESPONSES": folder, "CONNECTIONS": str(connections)}
        if rate:
            variables |= {"RATE": str(rate), "START": str(time.monotonic() + 0.5)}
        result = _wrk(url, key, wanted, connections, seconds, threads=connections, variables=variables)
        responses = np.concatenate([np.fromfile(file, RESPONSE) for file in Path(folder).iterdir()])
    return result, responses[np.argsort(responses["done"])]


def _wrk(
    url: str,
    key: str,
    wanted: Sequence[Request],
    connections: int,
    seconds: float,
    threads: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        lines = []
        for number, request in enumerate(wanted):
            body = Path(temporary) / str(number)
            body.write_bytes(request.body)
            known = [word for label, value in request.best for word in (label, f"{value:.9f}")]
            lines.append("\t".join([str(body), request.content_type, key or "none", *known]))
        (Path(temporary) / "requests").write_text("\n".join(lines))
        count = threads or min(connections, len(wanted))
        line = ["wrk", "-t", str(count), "-c", str(connections), "-d", f"{seconds:g}s"]
        done = subprocess.run(
            [*line, "--timeout", "20s", "-s", str(SCRIPT), url],
            env={**os.environ, **(variables or {}), "REQUESTS": str(Path(temporary) / "requests")},
            capture_output=True,
            text=True,
        )
    found = re.search(r"^RESULT (\d+) (\d+) (\d+) (\S+) (\S+) (\S+) ?(.*)$", done.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(f"wrk failed: {(done.stdout + done.stderr)[-500:]}")
    correct, wrong, failed, duration, p50, p99, said = found.groups()
    return Result(int(correct) / float(duration), float(p50), float(p99), int(wrong), int(failed), said)


def _threads(
    url: str, key: str, wanted: Sequence[Request], connections: int, seconds: float, tolerance: float = TOLERANCE
) -> Result:
    times: list[float] = []
    wrong: list[str] = []
    failed: list[str] = []
    deadline = time.perf_counter() + seconds

    def client(request: Request) -> None:
        with requests.Session() as session:
            session.headers.update({"Authorization": f"Bearer {key}", "Content-Type": request.content_type})
            while (started := time.perf_counter()) < deadline:
                try:
                    reply = session.post(url, data=request.body, timeout=20)
                except requests.RequestException as error:
                    failed.append(str(error))
                    continue
                got = best_of(reply.content)
                correct = len(got) == len(request.best) and all(
                    label == expected and abs(value - known) <= tolerance
                    for (label, value), (expected, known) in zip(got, request.best, strict=True)
                )
                if reply.ok and correct:
                    times.append(1000 * (time.perf_counter() - started))
                else:
                    wrong.append(f"{reply.status_code} {reply.text[:200]}")

    clients = [threading.Thread(target=client, args=(wanted[i % len(wanted)],)) for i in range(connections)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    ranks = statistics.quantiles(times, n=100) if len(times) > 1 else [float("nan")] * 99
    return Result(len(times) / seconds, ranks[49], ranks[98], len(wrong), len(failed), (wrong or [""])[0])
