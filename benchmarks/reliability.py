"""What our server withstands: minutes of load, far too much of it, and faults under load. Every response is checked.

    python -m benchmarks.reliability
    python -m benchmarks.reliability --only sustained --minutes 0.5

sustained   80% of the peak for --minutes. wrk sends the requests at fixed times, whatever the responses take, and
            records every response (benchmarks/load.lua); whether the rate was held is part of the result. A request
            that had to wait for its connection counts from when it was due.
start       from starting TorchServe to the first response.
burst       400 connections, each asking again at once: far more than the queue holds. Then the same with the Python
            client (clients/python) beside it.
faults      each on a fresh server, sent images with different predictions by the Python client, each under a name of
            its own: none may be lost, returned twice or wrong. Probes that try once only tell how long a fault is
            felt. Where nothing recovers by itself the server is started anew, as a supervisor would.
attacks     the worst requests that are known (benchmarks/attacks.py), four connections at once, with good neighbours.

Needs wrk; the full disk needs root, for a small tmpfs. Writes benchmarks/results/reliability.json and reliability.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attacks import part_attacks
from benchmarks.faults import FAULTS, suffer
from benchmarks.load import timed
from benchmarks.machine import describe, save
from benchmarks.probes import Crowd, KnownImages, Note, client_of, watching
from benchmarks.reliability_report import plot, table
from benchmarks.serving.workload import SMALL, make_small
from clients.python.classify import Client
from launcher import Ports, serving

CONNECTIONS, SHARE = 64, 0.8  # of the sustained load: connections, and its share of the peak
WINDOWS, LAPS = 60, 10  # that it is divided into: 10 s each and a minute each, of 10 minutes
CROWD, BURST_SECONDS = 400, 10  # connections of the burst, and how long it lasts
STARTS = 5


def part_sustained(archive: Path, images: KnownImages, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    wanted, seconds = images.requests(8), max(WINDOWS // 2, round(60 * options.minutes))
    with serving([archive], folder, ports=Ports.free()) as server:
        url, key = f"{server.url}/predictions/{SMALL}", server.key()
        timed(url, key, wanted, CONNECTIONS, 5)  # Java optimises
        peak = timed(url, key, wanted, CONNECTIONS, 10)[0].requests_per_second
        rate = SHARE * peak
        with watching(lambda: server, seconds / WINDOWS) as samples:
            result, responses = timed(url, key, wanted, CONNECTIONS, seconds + 2, rate)
    started = responses["due"].min()
    responses = responses[responses["due"] < started + seconds]  # the last window is whole
    windows = windows_of(responses, started, seconds / WINDOWS)
    laps = windows_of(responses, started, seconds / LAPS)
    samples = [{**one, "at": one["at"] - started} for one in samples if one["at"] - started < seconds]
    of_lap = [
        [one["mebibytes"] for one in samples if lap <= LAPS * one["at"] / seconds < lap + 1] for lap in range(LAPS)
    ]
    return {
        "peak": peak,
        "rate": rate,
        "seconds": seconds,
        "responses": len(responses),
        "least_rate": min(window["rate"] for window in windows),
        "late_p99_ms": 1000 * float(np.percentile(responses["sent"] - responses["due"], 99)),
        "wrong": result.wrong,
        "failed": result.failed,
        "said": result.said,
        "laps": laps,
        "p99_growth": laps[-1]["p99_ms"] / laps[1]["p99_ms"],
        "memory_growth": statistics.median(of_lap[-1]) / statistics.median(of_lap[1]) - 1,
        "windows": windows,
        "samples": samples,
    }


def windows_of(responses: np.ndarray, started: float, seconds: float) -> list[dict[str, float]]:
    """By when requests were sent; milliseconds from when they were due or sent, whichever came first."""
    took = 1000 * (responses["done"] - np.minimum(responses["due"], responses["sent"]))
    number = ((responses["sent"] - started) / seconds).astype(int)
    found = []
    for one in range(round((responses["due"].max() - started) / seconds)):
        inside = number == one
        p50, p99 = np.percentile(took[inside], [50, 99])
        correct = int(responses["correct"][inside].sum())
        found.append({"at": one * seconds, "rate": correct / seconds, "p50_ms": float(p50), "p99_ms": float(p99)})
    return found


def part_start(archive: Path, images: KnownImages, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    seconds = []
    for turn in range(STARTS):
        started = time.monotonic()
        with serving([archive], folder / str(turn), ports=Ports.free()) as server:
            Client(server.url, SMALL, server.key()).classify(images.bodies[0])
            seconds.append(time.monotonic() - started)
    return {"seconds": seconds, "median": statistics.median(seconds)}


def part_burst(archive: Path, images: KnownImages, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    wanted, notes = images.requests(8), list[Note]()
    with serving([archive], folder / "server", ports=Ports.free()) as server:
        url, key = f"{server.url}/predictions/{SMALL}", server.key()
        timed(url, key, wanted, CONNECTIONS, 5)
        before = timed(url, key, wanted, CONNECTIONS, 5)[0].requests_per_second
        result, burst = timed(url, key, wanted, CROWD, BURST_SECONDS)
        after = timed(url, key, wanted, CONNECTIONS, 5)[1]
        crowd = Crowd(client_of(server, notes), images, folder / "images")
        crowd.start()
        try:
            time.sleep(1)
            timed(url, key, wanted, CROWD, BURST_SECONDS)
        finally:
            verdict = crowd.verdict()
    took = 1000 * (burst["done"] - burst["sent"])
    refused, good = burst["status"] == 503, burst["correct"] == 1
    p50, p99 = np.percentile(took[refused], [50, 99]) if refused.any() else (0.0, 0.0)
    over = burst["done"].max()
    return {
        "connections": CROWD,
        "before": before,
        "good": float(good.sum() / BURST_SECONDS),
        "good_p99_ms": float(np.percentile(took[good], 99)),
        "responses": len(burst),
        "refused_share": float(refused.mean()),
        "refused_p50_ms": float(p50),
        "refused_p99_ms": float(p99),
        "others": int((~refused & ~good).sum()) + result.failed,
        "full_speed_seconds": full_speed(after["done"][after["correct"] == 1] - over, before),
        "client": {**verdict, "refused": sum(note.status == 503 for note in notes)},
        "series": [
            *speeds(burst["done"][good] - burst["done"].min() - BURST_SECONDS),
            *speeds(after["done"][after["correct"] == 1] - over),
        ],
    }


def speeds(times: np.ndarray) -> list[list[float]]:
    """[second, good responses a second] for each tenth of a second."""
    tenths, counts = np.unique(np.floor(10 * times), return_counts=True)
    return [[float(tenth) / 10, 10.0 * int(count)] for tenth, count in zip(tenths, counts, strict=True)]


def full_speed(times: np.ndarray, before: float) -> float:
    """Seconds until the half second begins that has 90% of the rate before; all those looked at if there is none."""
    for tenth in range(40):
        if ((times >= tenth / 10) & (times < tenth / 10 + 0.5)).sum() >= 0.9 * before * 0.5:
            return tenth / 10
    return 4.0


def part_faults(archive: Path, images: KnownImages, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for number, name in enumerate(FAULTS):
        print(f"  {name} …", flush=True)
        found[name] = suffer(name, archive, images, folder / str(number))
    return found


# The report


PARTS = {
    "sustained": part_sustained,
    "start": part_start,
    "burst": part_burst,
    "faults": part_faults,
    "attacks": part_attacks,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=10, help="of the sustained load (10)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (benchmarks/results)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"--only: no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not shutil.which("wrk"):
        parser.error("wrk is missing, which makes the load: apt-get install wrk")
    logging.getLogger("classify").setLevel(logging.ERROR)  # outages are what is wanted here
    results: dict[str, Any] = {"machine": describe("torchserve", "torch", "onnxruntime", "pillow")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export = make_small(folder)
        images = KnownImages.of(export)
        for part in wanted:
            print(f"{part} …", flush=True)
            work = folder / part
            work.mkdir()
            results[part] = PARTS[part](export / f"{SMALL}.mar", images, work, options)
    print(json.dumps(results["machine"]), table(results), sep="\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "reliability.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier.get("machine") == results["machine"]:
        results = earlier | results
    save(path, results)
    if "sustained" in results and "faults" in results:
        plot(results, options.out / "reliability.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
