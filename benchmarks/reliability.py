"""What our server withstands: minutes of load, far too much of it, and faults under load. Every answer is checked.

    python -m benchmarks.reliability
    python -m benchmarks.reliability --only sustained --minutes 0.5

sustained   80% of the peak for --minutes. wrk sends the requests at fixed times, whatever the answers take, and writes
            down every answer (benchmarks/load.lua); whether the rate was held is part of the result. A request that had
            to wait for its connection counts from when it was due.
start       from starting TorchServe to the first answer.
burst       400 connections, each asking again at once: far more than the queue holds. Then the same with the Python
            client (clients/python) beside it.
faults      each on a fresh server, asked by the Python client about pictures whose answers differ, each under a name of
            its own: none may be lost, answered twice or wrongly. Probes that try once only tell how long a fault is
            felt. Where nothing recovers by itself the server is started anew, as a supervisor would.

Needs wrk; the full disk needs root, for a small tmpfs. Writes benchmarks/results/reliability.json and reliability.png.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from benchmarks.load import TOLERANCE, Request, timed
from benchmarks.machine import describe
from benchmarks.servers import raw
from benchmarks.serving import SMALL, InProcess, digits, make_small
from clients.python.classify import ClassifierError, Client, Unavailable, classify_files
from model.files import write_text
from serve import Ports, Server, serving, stop

CONNECTIONS, SHARE = 64, 0.8  # of the sustained load: connections, and its share of the peak
WINDOWS, LAPS = 60, 10  # that it is divided into: 10 s each and a minute each, of 10 minutes
CROWD, BURST_SECONDS = 400, 10  # connections of the burst, and how long it lasts
STARTS = 5
THREADS, TIMEOUT = 32, 60.0  # of the Python client: threads, and seconds for each answer (its default)
PROBES, PROBE_SECONDS = 8, 0.1  # threads that try once, again and again, and their pause
SLOW = 1.0  # s: an answer that takes longer counts as disturbed
CALM = 3.0  # s without a disturbance: recovered
PATIENCE = 75.0  # s until a fault counts as one that does not recover; a stopped worker is noticed after 30

GOALS: dict[str, dict[str, Callable[[Mapping[str, Any]], bool]]] = {
    "sustained": {
        "no errors": lambda found: found["wrong"] + found["failed"] == 0,
        "rate held within 2% in each window": lambda found: found["least_rate"] >= 0.98 * found["rate"],
        "p99 of the last lap at most 1.25 times the second's": lambda found: found["p99_growth"] <= 1.25,
        "memory grows by less than 5% after the first lap": lambda found: found["memory_growth"] < 0.05,
    },
    "burst": {
        "p99 of the 503s within 100 ms": lambda found: found["refused_p99_ms"] <= 100,
        "full speed again within 2 s": lambda found: found["full_speed_seconds"] <= 2,
        "nothing but good answers and 503s": lambda found: found["others"] == 0,
        "the Python client is answered, once and rightly": lambda found: is_whole(found["client"]),
    },
    "faults": {
        "the Python client is answered, once and rightly": lambda found: all(
            is_whole(one["client"]) for one in found.values() if "skipped" not in one
        ),
    },
}


@dataclass(frozen=True)
class Pictures:
    """JPEG files whose answers all differ, so that a wrong one is seen."""

    bodies: list[bytes]
    answers: list[dict[str, float]]  # label to probability, all labels

    @classmethod
    def of(cls, export: Path) -> Pictures:
        process = InProcess(export, SMALL, "onnx")
        bodies, kept = digits(count=1797), list[int]()
        rows = process.classify(bodies)
        for i, row in enumerate(rows):
            if not kept or np.abs(rows[kept] - row).max(axis=1).min() > 4 * TOLERANCE:
                kept.append(i)
        labels = process.spec["labels"]
        answers = [dict(zip(labels, rows[i].tolist(), strict=True)) for i in kept]
        return cls([bodies[i] for i in kept], answers)

    def are_right(self, number: int, answer: Mapping[str, float]) -> bool:
        """Whether it is the answer to the picture of this number; the pictures repeat without end."""
        known = self.answers[number % len(self.answers)]
        return bool(answer) and all(abs(known.get(label, 9) - value) <= TOLERANCE for label, value in answer.items())

    def requests(self, count: int) -> list[Request]:
        best = [max(answer.items(), key=lambda item: item[1]) for answer in self.answers[:count]]
        return [replace(raw(body), best=(one,)) for body, one in zip(self.bodies, best, strict=False)]


# The Python client


@dataclass(frozen=True)
class Note:
    """One request. Times in seconds, monotonic."""

    sent: float
    done: float
    status: int  # 0: no answer

    @property
    def is_good(self) -> bool:
        return self.status == 200 and self.done - self.sent <= SLOW


class NotingClient(Client):
    """Notes every request that it sends, the repeated ones too."""

    notes: list[Note]

    def _send(self, method: str, path: str, **body: Any) -> requests.Response:
        sent, status = time.monotonic(), 0
        try:
            reply = super()._send(method, path, **body)
            status = reply.status_code
            return reply
        finally:
            self.notes.append(Note(sent, time.monotonic(), status))


def client_of(server: Server, notes: list[Note], **options: Any) -> NotingClient:
    client = NotingClient(server.url, SMALL, timeout=TIMEOUT, key_file=server.folder / "key_file.json", **options)
    client.notes = notes
    return client


class Crowd(threading.Thread):
    """The Python client with pictures without end, each under a name of its own, until `verdict` is asked for."""

    def __init__(self, client: Client, pictures: Pictures, folder: Path) -> None:
        super().__init__()
        self._client, self._pictures, self._folder = client, pictures, folder
        self._over = threading.Event()
        self._asked = 0
        self._answers: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._gave_up = ""
        folder.mkdir()
        for number, body in enumerate(pictures.bodies):
            (folder / f"picture{number}").write_bytes(body)

    def run(self) -> None:
        try:
            for row in classify_files(self._client, self._names(), threads=THREADS):
                name = Path(row.picture).name
                self._answers[name] += 1
                if not self._pictures.are_right(int(name), row.answer):
                    self._wrong.append(f"{name}: {row.error or row.answer}")
        except (ClassifierError, Unavailable) as error:
            self._gave_up = str(error)

    def verdict(self) -> dict[str, Any]:
        """Stops, waits for what is under way, and counts."""
        self._over.set()
        self.join()
        return {
            "pictures": self._asked,
            "lost": self._asked - len(self._answers),
            "doubled": sum(count - 1 for count in self._answers.values()),
            "wrong": len(self._wrong),
            "said": self._gave_up or (self._wrong or [""])[0],
        }

    def _names(self) -> Iterator[Path]:
        for number in itertools.count():
            if self._over.is_set():
                return
            path = self._folder / f"{number:07}"
            os.link(self._folder / f"picture{number % len(self._pictures.bodies)}", path)
            self._asked += 1
            yield path


def is_whole(verdict: Mapping[str, Any]) -> bool:
    return verdict["pictures"] > 0 and not any(verdict[key] for key in ("lost", "doubled", "wrong", "said"))


@contextmanager
def probing(server: Server, picture: bytes) -> Iterator[list[Note]]:
    """Single tries all the time, by the key file of `server`; gives the list that their notes go to."""
    notes: list[Note] = []
    over = threading.Event()
    client = client_of(server, notes, retry_seconds=0)

    def probe() -> None:
        while not over.wait(PROBE_SECONDS):
            with suppress(ClassifierError, Unavailable):
                client.classify(picture)

    threads = [threading.Thread(target=probe) for _ in range(PROBES)]
    for thread in threads:
        thread.start()
    try:
        yield notes
    finally:
        over.set()
        for thread in threads:
            thread.join()


# The server, seen from outside


@contextmanager
def watching(server_of: Callable[[], Server], every: float) -> Iterator[list[dict[str, float]]]:
    """What the server takes, every so many seconds."""
    samples: list[dict[str, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every):
            samples.append(sample(server_of()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def sample(server: Server) -> dict[str, float]:
    """Sums over all its processes; `mebibytes` is PSS: what they share counts once. `logs` in MiB; `ready` workers."""
    found: Counter[str] = Counter()
    for process in family(server):
        with suppress(psutil.Error), process.oneshot():
            memory, descriptors, threads = process.memory_full_info().pss, process.num_fds(), process.num_threads()
            found += Counter(mebibytes=memory, descriptors=descriptors, threads=threads)
    logs = sum(path.stat().st_size for path in (server.folder / "logs").iterdir())
    return {
        "at": time.monotonic(),
        "mebibytes": found["mebibytes"] / 2**20,
        "descriptors": found["descriptors"],
        "threads": found["threads"],
        "logs": logs / 2**20,
        "ready": ready_workers(server),
    }


def family(server: Server) -> list[psutil.Process]:
    with suppress(psutil.Error):
        root = psutil.Process(server.process.pid)
        return [root, *root.children(recursive=True)]
    return []


def workers_of(server: Server) -> list[psutil.Process]:
    found = []
    for process in family(server):
        with suppress(psutil.Error):
            if any(word.endswith("model_service_worker.py") for word in process.cmdline()):
                found.append(process)
    return found


def ready_workers(server: Server) -> int:
    """Those that TorchServe calls ready, and that are neither dead nor stopped, which it may not have noticed yet."""
    try:
        headers = {"Authorization": f"Bearer {server.key('management')}"}
        (state,) = requests.get(f"{server.management_url}/models/{SMALL}", headers=headers, timeout=5).json()
        pids = {worker["pid"] for worker in state["workers"] if worker["status"] == "READY"}
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    asleep = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    with suppress(psutil.Error):
        return sum(process.pid in pids and process.status() not in asleep for process in workers_of(server))
    return 0


# Faults


@dataclass
class Scene:
    """A server of its own for one fault, which may be started anew."""

    archive: Path
    folder: Path
    stack: ExitStack
    ports: Ports = field(default_factory=Ports.free)
    remarks: list[str] = field(default_factory=list)
    server: Server = field(init=False)
    workers: int = field(init=False)

    def start(self) -> None:
        self.server = self.stack.enter_context(serving([self.archive], self.folder / "server", ports=self.ports))
        self.workers = len(workers_of(self.server))

    def wait_until_whole(self, seconds: float) -> float | None:
        """Seconds until all workers are ready; None if they were not in time."""
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            if ready_workers(self.server) >= self.workers:
                return time.monotonic() - started
            time.sleep(0.05)
        return None


def kill_a_worker(scene: Scene) -> None:
    workers_of(scene.server)[0].kill()


def kill_all_workers(scene: Scene) -> None:
    for worker in workers_of(scene.server):
        worker.kill()


def kill_a_worker_again_and_again(scene: Scene) -> None:
    """TorchServe waits longer before each further try, unless the worker had been ready in between."""
    times = []
    for _ in range(5):
        kill_a_worker(scene)
        seconds = scene.wait_until_whole(30)
        times.append("never" if seconds is None else f"{seconds:.1f}")
    scene.remarks.append(f"five times; whole again after {', '.join(times)} s")


def stop_a_worker(scene: Scene) -> None:
    workers_of(scene.server)[0].suspend()


def kill_the_server(scene: Scene) -> None:
    workers = workers_of(scene.server)
    workers[0].parent().kill()  # type: ignore[union-attr]
    scene.server.process.wait(30)
    killed = time.monotonic()
    scene.start()
    left = psutil.wait_procs(workers, timeout=10)[1]
    scene.remarks.append(f"started anew at once, ready after {time.monotonic() - killed:.1f} s")
    scene.remarks.append(f"{len(left)} workers of the killed one left over")


def fill_the_disk(scene: Scene) -> None:
    """Of the logs; for five seconds."""
    logs = scene.server.folder / "logs"
    access, filler = logs / "access_log.log", logs / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    full = access.stat().st_size
    time.sleep(5)
    grown = access.stat().st_size - full
    filler.unlink()
    deadline = time.monotonic() + 10
    while access.stat().st_size <= full + grown and time.monotonic() < deadline:
        time.sleep(0.1)
    again = "is written again once there is room" if access.stat().st_size > full + grown else "stays silent for ever"
    scene.remarks.append(f"the access log grew by {grown} bytes while the disk was full, and {again}")


def remove_the_archive(scene: Scene) -> None:
    """The one in the model store; and a worker, which must be loaded without it."""
    scene.archive.unlink()
    kill_a_worker(scene)


def remove_the_unpacked_model(scene: Scene) -> None:
    """What the workers were loaded from; and all of them, so that they have to be loaded again."""
    folder = Path(workers_of(scene.server)[0].cwd())
    shutil.rmtree(folder)
    kill_a_worker(scene)
    time.sleep(5)
    answers = "are still answered" if ready_workers(scene.server) else "fail"
    scene.remarks.append(f"with one worker killed requests {answers}; then the others were killed too")
    kill_all_workers(scene)


def small_disk(scene: Scene) -> None:
    """A tmpfs of 8 MiB for the logs.

    Raises:
        PermissionError: this user, or this container, may not mount.
    """
    logs = scene.folder / "server" / "logs"
    logs.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(logs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(errno.EPERM, done.stderr.strip() or "mount failed")
    scene.stack.callback(subprocess.run, ["umount", "--lazy", str(logs)], check=True)


FAULTS: dict[str, Callable[[Scene], None]] = {
    "a worker killed": kill_a_worker,
    "all workers killed": kill_all_workers,
    "a worker killed again and again": kill_a_worker_again_and_again,
    "the server killed": kill_the_server,
    "a worker stopped": stop_a_worker,
    "the disk of the logs full": fill_the_disk,
    "the archive removed, a worker killed": remove_the_archive,
    "the unpacked model removed, workers killed": remove_the_unpacked_model,
}


def suffer(name: str, archive: Path, pictures: Pictures, folder: Path) -> dict[str, Any]:
    """One fault on a fresh server under the load of the Python client."""
    (folder / "store").mkdir(parents=True)
    own = Path(shutil.copy(archive, folder / "store"))
    with ExitStack() as stack:
        scene = Scene(own, folder, stack)
        if FAULTS[name] is fill_the_disk:
            try:
                small_disk(scene)
            except (OSError, FileNotFoundError) as error:
                return {"skipped": f"no tmpfs can be mounted: {error.strerror}"}
        scene.start()
        samples = stack.enter_context(watching(lambda: scene.server, 0.2))
        probes = stack.enter_context(probing(scene.server, pictures.bodies[0]))
        notes: list[Note] = []
        crowd = Crowd(client_of(scene.server, notes, retry_seconds=PATIENCE + 30), pictures, folder / "pictures")
        crowd.start()
        try:
            time.sleep(CALM)
            at = time.monotonic()
            FAULTS[name](scene)
            found = recovery(scene, at, samples, lambda: [*notes, *probes])
            if not found["by_itself"]:
                again = time.monotonic()
                stop(scene.server.process)
                scene.start()
                scene.remarks.append(f"cured by a new start, {time.monotonic() - again:.1f} s")
                time.sleep(CALM)
        finally:
            verdict = crowd.verdict()
        everything = [*notes, *probes]  # before the server is taken away from the probes
        return {
            **found,
            **disturbance([note for note in everything if note.done > at], at),
            "client": verdict,
            "remarks": scene.remarks,
            "series": series(everything, samples, at),
        }


def disturbance(notes: list[Note], at: float) -> dict[str, Any]:
    """What clients felt of the fault `at`, over all requests that ended after it, a new start by us included.

    Returns:
        In seconds: `silent`, the longest time without any good answer, and `calm`, from the fault to the end of the
        last disturbed request. `failed`, requests by status; `slow`, answered but late; `hung`, never answered, so
        that only the client's own time-out ended them: TorchServe forgets what it was putting together into a batch
        when the worker dies.
    """
    good = [at, *sorted(note.done for note in notes if note.is_good)]
    return {
        "silent": max((late - early for early, late in itertools.pairwise(good)), default=None),
        "calm": max((note.done - at for note in notes if not note.is_good), default=0.0),
        "failed": dict(Counter(str(note.status or "no answer") for note in notes if note.status != 200)),
        "slow": sum(note.status == 200 and not note.is_good for note in notes),
        "hung": sum(note.status == 0 and note.done - note.sent > TIMEOUT - 1 for note in notes),
    }


def recovery(
    scene: Scene, at: float, samples: Sequence[Mapping[str, float]], notes_of: Callable[[], list[Note]]
) -> dict[str, Any]:
    """Waits until all workers are ready and requests have been answered well for a while.

    Returns:
        `by_itself`; `whole`, seconds from the fault `at` to all workers being ready (None: never); `unhealthy`, whether
        /ping ever said so.
    """
    client = Client(scene.server.url, SMALL, key_file=scene.server.folder / "key_file.json")
    unhealthy, is_over = False, False
    while not is_over and time.monotonic() < at + PATIENCE:
        time.sleep(0.1)
        now = time.monotonic()
        unhealthy |= not client.is_healthy()
        is_calm = now - at > CALM and all(note.is_good for note in notes_of() if note.done > now - CALM)
        is_over = is_calm and samples[-1]["ready"] >= scene.workers
    broken = [one["at"] for one in samples if one["at"] > at and one["ready"] < scene.workers]
    ready = [one["at"] for one in samples if one["at"] > max(broken, default=at)]
    return {
        "by_itself": is_over,
        "whole": (ready[0] - at if ready else None) if broken else 0.0,
        "unhealthy": unhealthy,
    }


def series(notes: Sequence[Note], samples: Sequence[Mapping[str, float]], at: float) -> list[list[float | None]]:
    """[second, good answers, p99 in ms, MiB] of each second; seconds from the fault `at`."""
    rows: list[list[float | None]] = []
    done = np.array([note.done - at for note in notes])
    took = np.array([1000 * (note.done - note.sent) for note in notes])
    good = np.array([note.status == 200 for note in notes])
    for second in range(int(np.floor(done.min())), int(done.max()) + 1):
        inside = (done >= second) & (done < second + 1)
        memory = [one["mebibytes"] for one in samples if second <= one["at"] - at < second + 1]
        p99 = float(np.percentile(took[inside], 99)) if inside.any() else None
        rows.append([second, int((inside & good).sum()), p99, statistics.median(memory) if memory else None])
    return rows


# The parts


def part_sustained(archive: Path, pictures: Pictures, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    wanted, seconds = pictures.requests(8), max(WINDOWS // 2, round(60 * options.minutes))
    with serving([archive], folder, ports=Ports.free()) as server:
        url, key = f"{server.url}/predictions/{SMALL}", server.key()
        timed(url, key, wanted, CONNECTIONS, 5)  # Java optimises
        peak = timed(url, key, wanted, CONNECTIONS, 10)[0].requests_per_second
        rate = SHARE * peak
        with watching(lambda: server, seconds / WINDOWS) as samples:
            result, answers = timed(url, key, wanted, CONNECTIONS, seconds + 2, rate)
    started = answers["due"].min()
    answers = answers[answers["due"] < started + seconds]  # the last window is whole
    windows = windows_of(answers, started, seconds / WINDOWS)
    laps = windows_of(answers, started, seconds / LAPS)
    samples = [{**one, "at": one["at"] - started} for one in samples if one["at"] - started < seconds]
    of_lap = [
        [one["mebibytes"] for one in samples if lap <= LAPS * one["at"] / seconds < lap + 1] for lap in range(LAPS)
    ]
    return {
        "peak": peak,
        "rate": rate,
        "seconds": seconds,
        "answers": len(answers),
        "least_rate": min(window["rate"] for window in windows),
        "late_p99_ms": 1000 * float(np.percentile(answers["sent"] - answers["due"], 99)),
        "wrong": result.wrong,
        "failed": result.failed,
        "said": result.said,
        "laps": laps,
        "p99_growth": laps[-1]["p99_ms"] / laps[1]["p99_ms"],
        "memory_growth": statistics.median(of_lap[-1]) / statistics.median(of_lap[1]) - 1,
        "windows": windows,
        "samples": samples,
    }


def windows_of(answers: np.ndarray, started: float, seconds: float) -> list[dict[str, float]]:
    """By when requests were sent; milliseconds from when they were due or sent, whichever came first."""
    took = 1000 * (answers["done"] - np.minimum(answers["due"], answers["sent"]))
    number = ((answers["sent"] - started) / seconds).astype(int)
    found = []
    for one in range(round((answers["due"].max() - started) / seconds)):
        inside = number == one
        p50, p99 = np.percentile(took[inside], [50, 99])
        right = int(answers["right"][inside].sum())
        found.append({"at": one * seconds, "rate": right / seconds, "p50_ms": float(p50), "p99_ms": float(p99)})
    return found


def part_start(archive: Path, pictures: Pictures, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    seconds = []
    for turn in range(STARTS):
        started = time.monotonic()
        with serving([archive], folder / str(turn), ports=Ports.free()) as server:
            Client(server.url, SMALL, server.key()).classify(pictures.bodies[0])
            seconds.append(time.monotonic() - started)
    return {"seconds": seconds, "median": statistics.median(seconds)}


def part_burst(archive: Path, pictures: Pictures, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    wanted, notes = pictures.requests(8), list[Note]()
    with serving([archive], folder / "server", ports=Ports.free()) as server:
        url, key = f"{server.url}/predictions/{SMALL}", server.key()
        timed(url, key, wanted, CONNECTIONS, 5)
        before = timed(url, key, wanted, CONNECTIONS, 5)[0].requests_per_second
        result, burst = timed(url, key, wanted, CROWD, BURST_SECONDS)
        after = timed(url, key, wanted, CONNECTIONS, 5)[1]
        crowd = Crowd(client_of(server, notes), pictures, folder / "pictures")
        crowd.start()
        try:
            time.sleep(1)
            timed(url, key, wanted, CROWD, BURST_SECONDS)
        finally:
            verdict = crowd.verdict()
    took = 1000 * (burst["done"] - burst["sent"])
    refused, good = burst["status"] == 503, burst["right"] == 1
    p50, p99 = np.percentile(took[refused], [50, 99]) if refused.any() else (0.0, 0.0)
    over = burst["done"].max()
    return {
        "before": before,
        "good": float(good.sum() / BURST_SECONDS),
        "good_p99_ms": float(np.percentile(took[good], 99)),
        "answers": len(burst),
        "refused_share": float(refused.mean()),
        "refused_p50_ms": float(p50),
        "refused_p99_ms": float(p99),
        "others": int((~refused & ~good).sum()) + result.failed,
        "full_speed_seconds": full_speed(after["done"][after["right"] == 1] - over, before),
        "client": {**verdict, "refused": sum(note.status == 503 for note in notes)},
        "series": [
            *speeds(burst["done"][good] - burst["done"].min() - BURST_SECONDS),
            *speeds(after["done"][after["right"] == 1] - over),
        ],
    }


def speeds(times: np.ndarray) -> list[list[float]]:
    """[second, good answers a second] for each tenth of a second."""
    tenths, counts = np.unique(np.floor(10 * times), return_counts=True)
    return [[float(tenth) / 10, 10.0 * int(count)] for tenth, count in zip(tenths, counts, strict=True)]


def full_speed(times: np.ndarray, before: float) -> float:
    """Seconds until the half second begins that has 90% of the rate before; all those looked at if there is none."""
    for tenth in range(40):
        if ((times >= tenth / 10) & (times < tenth / 10 + 0.5)).sum() >= 0.9 * before * 0.5:
            return tenth / 10
    return 4.0


def part_faults(archive: Path, pictures: Pictures, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for number, name in enumerate(FAULTS):
        print(f"  {name} …", flush=True)
        found[name] = suffer(name, archive, pictures, folder / str(number))
    return found


# The report


def table(results: Mapping[str, Any]) -> str:
    lines = []
    if found := results.get("sustained"):
        first, last, samples = found["laps"][1], found["laps"][-1], found["samples"]
        lines += [
            "",
            f"sustained: {found['seconds']} s at {found['rate']:.0f}/s, {SHARE:.0%} of {found['peak']:.0f}/s; "
            f"{found['answers']} answers, {found['wrong']} wrong {found['said'][:100]}, {found['failed']} failed; "
            f"slowest window {found['least_rate']:.0f}/s",
            f"  second lap: p50 {first['p50_ms']:.2f} ms, p99 {first['p99_ms']:.2f} ms; "
            f"last: p50 {last['p50_ms']:.2f} ms, p99 {last['p99_ms']:.2f} ms",
            f"  memory {found['memory_growth']:+.1%} from the second lap to the last",
        ]
        lines += [
            f"  {name:12}" + " ".join(f"{samples[i][name]:7.0f}" for i in range(0, len(samples), len(samples) // 8))
            for name in ("mebibytes", "descriptors", "threads", "logs")
        ]
    if found := results.get("start"):
        lines += ["", f"start: median {found['median']:.2f} s of {', '.join(f'{one:.2f}' for one in found['seconds'])}"]
    if found := results.get("burst"):
        lines += [
            "",
            f"burst: {CROWD} connections; {found['refused_share']:.1%} of {found['answers']} answers are 503, "
            f"p50 {found['refused_p50_ms']:.1f} ms, p99 {found['refused_p99_ms']:.1f} ms; "
            f"{found['good']:.0f} good/s (before: {found['before']:.0f}/s), p99 {found['good_p99_ms']:.0f} ms; "
            f"{found['others']} others; full speed after {found['full_speed_seconds']:.1f} s",
            f"  the Python client beside it: {said(found['client'])}, {found['client']['refused']} times 503",
        ]
    if found := results.get("faults"):
        lines += ["", "faults: by itself? s without any good answer, to the last disturbed one, to all workers ready"]
        lines += [line for name, one in found.items() for line in fault_lines(name, one)]
    lines += [""]
    for part in [part for part in GOALS if part in results]:
        lines += [
            f"{'reached' if is_reached(results[part]) else 'MISSED '}  {part}: {goal}"
            for goal, is_reached in GOALS[part].items()
        ]
    return "\n".join(lines)


def fault_lines(name: str, found: Mapping[str, Any]) -> list[str]:
    if "skipped" in found:
        return [f"  {name:44} skipped: {found['skipped']}"]
    times = [found["silent"], found["calm"], found["whole"]]
    hung = f", {found['hung']} hung" if found["hung"] else ""
    shown = " ".join("  never" if one is None else f"{one:7.1f}" for one in times)
    failed = ", ".join(f"{count} × {status}" for status, count in found["failed"].items()) or "none failed"
    ping = "; /ping said unhealthy" if found["unhealthy"] else ""
    return [
        f"  {name:44} {'yes' if found['by_itself'] else 'NO '} {shown}   {failed}, {found['slow']} slow{hung}{ping}",
        f"  {'':44} client: {said(found['client'])}",
        *(f"  {'':44} {remark}" for remark in found["remarks"]),
    ]


def said(verdict: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{verdict[key]} {key}" for key in ("lost", "doubled", "wrong"))
    return f"{verdict['pictures']} pictures, {counts} {verdict['said'][:150]}".strip()


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Throughput, p99 and memory over time; the faults one after the other, each marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, 2, figsize=(15, 8), sharex="col", width_ratios=(2, 3), layout="constrained", squeeze=False
    )
    sustained, faults = results["sustained"], results["faults"]
    minutes = [window["at"] / 60 for window in sustained["windows"]]
    axes[0, 0].plot(minutes, [window["rate"] for window in sustained["windows"]])
    for name in ("p50_ms", "p99_ms"):
        axes[1, 0].plot(minutes, [window[name] for window in sustained["windows"]], label=name.removesuffix("_ms"))
    axes[2, 0].plot(
        [one["at"] / 60 for one in sustained["samples"]], [one["mebibytes"] for one in sustained["samples"]]
    )
    axes[0, 0].set_title(f"{sustained['rate']:.0f} requests/s, {SHARE:.0%} of the peak", fontsize=10)
    axes[1, 0].legend(fontsize=8)
    axes[2, 0].set_xlabel("minutes")
    start = 0.0
    for number, found in enumerate(faults.values(), 1):
        if "skipped" in found:
            continue
        rows = np.array(found["series"], dtype=float)
        at = start - rows[0, 0]
        for row in range(3):
            axes[row, 1].plot(rows[:, 0] + at, rows[:, row + 1], color="#1f5fa8", lw=1)
            axes[row, 1].axvline(at, color="#c0562b", ls="--", lw=1)
        axes[0, 1].annotate(str(number), (at, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        start = at + rows[-1, 0] + 3
    axes[2, 1].set_xlabel("s; " + "; ".join(f"{number} {name}" for number, name in enumerate(faults, 1)), wrap=True)
    axes[0, 0].set_ylabel("good answers/s")
    axes[1, 0].set_ylabel("ms")
    axes[2, 0].set_ylabel("memory of the server, MiB (PSS)")
    axes[1, 1].set_yscale("log")
    for axis in (*axes[0], *axes[2], axes[1, 0]):
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


PARTS = {"sustained": part_sustained, "start": part_start, "burst": part_burst, "faults": part_faults}


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
        pictures = Pictures.of(export)
        for part in wanted:
            print(f"{part} …", flush=True)
            place = folder / part
            place.mkdir()
            results[part] = PARTS[part](export / f"{SMALL}.mar", pictures, place, options)
    print(json.dumps(results["machine"]), table(results), sep="\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "reliability.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier.get("machine") == results["machine"]:
        results = earlier | results
    write_text(path, json.dumps(results, indent=1) + "\n")
    if "sustained" in results and "faults" in results:
        plot(results, options.out / "reliability.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
