"""A server seen from outside: clients that note every request, what its processes take, which workers are ready."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from benchmarks.load import TOLERANCE, Request
from benchmarks.servers import raw
from benchmarks.serving.in_process import InProcess
from benchmarks.serving.workload import SMALL, digits
from clients.python.classify import ClassifierError, Client, Unavailable, classify_files
from launcher import RunningServer

THREADS, TIMEOUT = 32, 60.0  # of the Python client: threads, and seconds for each response (its default)
PROBES, PROBE_SECONDS = 8, 0.1  # threads that try once, again and again, and their pause
SLOW = 1.0  # s: a response that takes longer counts as disturbed


@dataclass(frozen=True)
class KnownImages:
    """JPEG files whose predictions all differ, so that a wrong one is seen."""

    bodies: list[bytes]
    predictions: list[dict[str, float]]  # label to probability, all labels

    @classmethod
    def of(cls, export: Path) -> KnownImages:
        process = InProcess(export, SMALL, "onnx")
        bodies, kept = digits(count=1797), list[int]()
        rows = process.classify(bodies)
        for i, row in enumerate(rows):
            if not kept or np.abs(rows[kept] - row).max(axis=1).min() > 4 * TOLERANCE:
                kept.append(i)
        labels = process.spec.labels
        predictions = [dict(zip(labels, rows[i].tolist(), strict=True)) for i in kept]
        return cls([bodies[i] for i in kept], predictions)

    def is_correct(self, number: int, prediction: Mapping[str, float]) -> bool:
        """Whether it is the prediction for the image of this number; the images repeat without end."""
        known = self.predictions[number % len(self.predictions)]
        off = (abs(known.get(label, 9) - probability) for label, probability in prediction.items())
        return bool(prediction) and all(one <= TOLERANCE for one in off)

    def requests(self, count: int) -> list[Request]:
        best = [max(prediction.items(), key=lambda item: item[1]) for prediction in self.predictions[:count]]
        return [replace(raw(body), best=(one,)) for body, one in zip(self.bodies, best, strict=False)]


# The Python client


@dataclass(frozen=True)
class Note:
    """One request. Times in seconds, monotonic."""

    sent: float
    done: float
    status: int  # 0: no response

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


def client_of(server: RunningServer, notes: list[Note], **options: Any) -> NotingClient:
    client = NotingClient(server.url, SMALL, timeout=TIMEOUT, key_file=server.folder / "key_file.json", **options)
    client.notes = notes
    return client


class Crowd(threading.Thread):
    """The Python client with images without end, each under a name of its own, until `verdict` is asked for."""

    def __init__(self, client: Client, images: KnownImages, folder: Path) -> None:
        super().__init__()
        self._client, self._images, self._folder = client, images, folder
        self._over = threading.Event()
        self._asked = 0
        self._predictions: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._gave_up = ""
        folder.mkdir()
        for number, body in enumerate(images.bodies):
            (folder / f"image{number}").write_bytes(body)

    def run(self) -> None:
        try:
            for row in classify_files(self._client, self._names(), threads=THREADS):
                name = Path(row.image).name
                self._predictions[name] += 1
                if not self._images.is_correct(int(name), row.predictions):
                    self._wrong.append(f"{name}: {row.error or row.predictions}")
        except (ClassifierError, Unavailable) as error:
            self._gave_up = str(error)

    def verdict(self) -> dict[str, Any]:
        """Stops, waits for what is under way, and counts."""
        self._over.set()
        self.join()
        return {
            "images": self._asked,
            "lost": self._asked - len(self._predictions),
            "doubled": sum(count - 1 for count in self._predictions.values()),
            "wrong": len(self._wrong),
            "said": self._gave_up or (self._wrong or [""])[0],
        }

    def _names(self) -> Iterator[Path]:
        for number in itertools.count():
            if self._over.is_set():
                return
            path = self._folder / f"{number:07}"
            os.link(self._folder / f"image{number % len(self._images.bodies)}", path)
            self._asked += 1
            yield path


def is_whole(verdict: Mapping[str, Any]) -> bool:
    return verdict["images"] > 0 and not any(verdict[key] for key in ("lost", "doubled", "wrong", "said"))


@contextmanager
def probing(server: RunningServer, image: bytes) -> Iterator[list[Note]]:
    """Single tries all the time, by the key file of `server`; gives the list that their notes go to."""
    notes: list[Note] = []
    over = threading.Event()
    client = client_of(server, notes, retry_seconds=0)

    def probe() -> None:
        while not over.wait(PROBE_SECONDS):
            with suppress(ClassifierError, Unavailable):
                client.classify(image)

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
def watching(server_of: Callable[[], RunningServer], every: float) -> Iterator[list[dict[str, float]]]:
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


def sample(server: RunningServer) -> dict[str, float]:
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


def family(server: RunningServer) -> list[psutil.Process]:
    with suppress(psutil.Error):
        root = psutil.Process(server.process.pid)
        return [root, *root.children(recursive=True)]
    return []


def workers_of(server: RunningServer) -> list[psutil.Process]:
    found = []
    for process in family(server):
        with suppress(psutil.Error):
            if any(word.endswith("model_service_worker.py") for word in process.cmdline()):
                found.append(process)
    return found


def ready_workers(server: RunningServer) -> int:
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
