"""Faults under load: each on a fresh server that the Python client asks, and how long clients feel it."""

from __future__ import annotations

import errno
import itertools
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.probes import TIMEOUT, Crowd, KnownImages, Note, client_of, probing, ready_workers, watching, workers_of
from benchmarks.serving.workload import SMALL
from clients.python.classify import Client
from launcher import Ports, RunningServer, serving, stop

CALM = 3.0  # s without a disturbance: recovered
PATIENCE = 75.0  # s until a fault counts as one that does not recover; a stopped worker is noticed after 30


@dataclass
class Scene:
    """A server of its own for one fault, which may be started anew."""

    archive: Path
    folder: Path
    stack: ExitStack
    ports: Ports = field(default_factory=Ports.free)
    remarks: list[str] = field(default_factory=list)
    server: RunningServer = field(init=False)
    workers: int = field(init=False)
    _serving: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        """Starts the server, or another one in the folder of the one that has ended."""
        self._serving.close()
        self._serving = self.stack.enter_context(ExitStack())
        self.server = self._serving.enter_context(serving([self.archive], self.folder / "server", ports=self.ports))
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
    responses = "still succeed" if ready_workers(scene.server) else "fail"
    scene.remarks.append(f"with one worker killed requests {responses}; then the others were killed too")
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


def suffer(name: str, archive: Path, images: KnownImages, folder: Path) -> dict[str, Any]:
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
        probes = stack.enter_context(probing(scene.server, images.bodies[0]))
        notes: list[Note] = []
        crowd = Crowd(client_of(scene.server, notes, retry_seconds=PATIENCE + 30), images, folder / "images")
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
        In seconds: `silent`, the longest time without any good response, and `calm`, from the fault to the end of the
        last disturbed request. `failed`, requests by status; `slow`, late; `hung`, no response, so
        that only the client's own time-out ended them: TorchServe forgets what it was putting together into a batch
        when the worker dies.
    """
    good = [at, *sorted(note.done for note in notes if note.is_good)]
    return {
        "silent": max((late - early for early, late in itertools.pairwise(good)), default=None),
        "calm": max((note.done - at for note in notes if not note.is_good), default=0.0),
        "failed": dict(Counter(str(note.status or "no response") for note in notes if note.status != 200)),
        "slow": sum(note.status == 200 and not note.is_good for note in notes),
        "hung": sum(note.status == 0 and note.done - note.sent > TIMEOUT - 1 for note in notes),
    }


def recovery(
    scene: Scene, at: float, samples: Sequence[Mapping[str, float]], notes_of: Callable[[], list[Note]]
) -> dict[str, Any]:
    """Waits until all workers are ready and requests have succeeded for a while.

    Returns:
        `by_itself`; `whole`, seconds from the fault `at` to all workers being ready (None: never); `unhealthy`, whether
        /ping ever said so.
    """
    client = Client(scene.server.url, SMALL, key_file=scene.server.folder / "key_file.json")
    unhealthy, has_recovered = False, False
    while not has_recovered and time.monotonic() < at + PATIENCE:
        time.sleep(0.1)
        now = time.monotonic()
        unhealthy |= not client.is_healthy()
        is_calm = now - at > CALM and all(note.is_good for note in notes_of() if note.done > now - CALM)
        has_recovered = is_calm and samples[-1]["ready"] >= scene.workers
    broken = [one["at"] for one in samples if one["at"] > at and one["ready"] < scene.workers]
    ready = [one["at"] for one in samples if one["at"] > max(broken, default=at)]
    return {
        "by_itself": has_recovered,
        "whole": (ready[0] - at if ready else None) if broken else 0.0,
        "unhealthy": unhealthy,
    }


def series(notes: Sequence[Note], samples: Sequence[Mapping[str, float]], at: float) -> list[list[float | None]]:
    """[second, good responses, p99 in ms, MiB] of each second; seconds from the fault `at`."""
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
