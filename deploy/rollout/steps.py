"""The steps of a rollout, and the way back. They report to the logger `rollout`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.rollout.archive import Archive
from deploy.rollout.errors import Failed, Mistake, Unfinished, reason
from deploy.rollout.store import alone, copy_archive, is_same, is_version
from deploy.rollout.torchserve_client import TorchServeClient, message_of
from deploy.rollout.watch import watch_errors

LOAD_SECONDS = 600  # for registering: a large model on a slow disk
WARM_UP = 32  # requests for each worker

log = logging.getLogger("rollout")


def rollout(
    archive: Archive,
    store: Path,
    server: TorchServeClient,
    *,
    watch: float,
    max_errors: float,
    keep_old: bool = False,
) -> None:
    """Brings the archive's version into the server in the steps that `python -m deploy.rollout --help` lists.

    Args:
        store: the server's model store.
        watch: seconds.
        max_errors: share of the requests during the watch that may fail.
        keep_old: leave the old version registered, for requests that name it.

    Raises:
        Mistake: nothing was changed.
        Failed: it was rolled back, or could not be.
        Unfinished: the new version serves, but the old one or its files are left.
    """
    if not store.is_dir():
        raise Mistake(f"--store {store}: no such folder; it is the server's --model-store")
    with _changing_nothing():
        server.check()
    with alone(store):
        with _changing_nothing():
            task = _plan(archive, store, server)
        serves = False
        try:
            pids = _register(task, server)
            _prove(archive, server, len(pids))
            before = server.counters()
            server.set_default(archive.name, archive.version)
            log.info(f"{archive.version} is the default; watching for {watch:g} s")
            watch_errors(archive, server, pids, before, watch, max_errors)
            serves = True
            _finish(task, server, keep_old)
        except BaseException as error:  # Ctrl-C too
            if serves:
                raise Unfinished(
                    f"{archive.name} {archive.version} serves, but the rest was not done: {reason(error)}"
                ) from error
            _roll_back(task, server, error)
            if isinstance(error, (Mistake, KeyboardInterrupt)):
                raise
            raise Failed(reason(error)) from error
        log.info(f"{archive.name} {archive.version} serves")


@dataclass(frozen=True)
class Task:
    """What is to be replaced by what, as it was found before anything was changed."""

    archive: Archive
    store: Path
    old: str  # the version that is to be replaced
    default: str  # the one that serves: the new one if a rollout was killed
    registered: set[float]
    is_copy: bool  # whether the archive must go into the store, and out of it again if this is rolled back

    @property
    def file(self) -> Path:
        return self.store / self.archive.stored

    @property
    def start(self) -> Path:
        """What the next start of the server takes."""
        return self.store / f"{self.archive.name}.mar"


def _plan(archive: Archive, store: Path, server: TorchServeClient) -> Task:
    """Looks, and changes nothing."""
    old, default = _old_version(archive, server), server.default(archive.name)
    file, start = store / archive.stored, store / f"{archive.name}.mar"
    if archive.path.resolve() == start.resolve():
        raise Mistake(f"{start}: the next start takes it, good or not; export elsewhere and pass --store {store}")
    if file.exists() and not is_same(file, archive.path):
        raise Mistake(f"{file}: is another archive of this version; export with another --version, or delete it")
    # One that is there is an earlier version's: it stays if this is rolled back.
    return Task(archive, store, old, default, set(server.versions(archive.name)), is_copy=not file.exists())


def _roll_back(task: Task, server: TorchServeClient, error: BaseException) -> None:
    log.info(f"rolling back: {reason(error)}")
    try:
        _undo(server, task.archive.name, task.old, task.archive.version)
        if task.is_copy:
            task.file.unlink(missing_ok=True)
    except (OSError, Failed, KeyboardInterrupt) as second:
        raise Failed(
            f"{reason(error)}; and rolling back failed: {reason(second)}; do the same again to clean up"
        ) from error
    log.info(f"rolled back, {task.old} serves")


def _finish(task: Task, server: TorchServeClient, keep_old: bool) -> None:
    """The last step: the next start takes the new version, and the old one is dropped."""
    name, kept = task.archive.name, task.store / f"{task.archive.name}-{task.old}.mar"
    if not kept.exists() and is_version(task.start, task.old):  # an export may have written the new one there
        copy_archive(task.start, kept)
    copy_archive(task.file, task.start)
    log.info(f"{task.start} is {task.archive.version} now, for the next start")
    if not keep_old:
        _drop(server, name, task.old)
        log.info(f"{task.old} is dropped")


def _old_version(archive: Archive, server: TorchServeClient) -> str:
    """The version that is to be replaced. One that serves already is no mistake if a killed rollout has left it so."""
    versions = server.versions(archive.name)
    if not versions:
        models = ", ".join(server.models()) or "none"
        raise Mistake(f"{archive.path} is of the model {archive.name}, and the server has {models}")
    default = server.default(archive.name)
    if float(default) != float(archive.version):
        return default
    others = [one.number for number, one in versions.items() if number != float(archive.version)]
    if len(others) != 1:
        raise Mistake(f"{archive.name} {archive.version} is what the server serves; export with another --version")
    return others[0]


def _register(task: Task, server: TorchServeClient) -> set[int]:
    """The process ids of the new version's workers, when all are ready."""
    archive, started = task.archive, time.monotonic()
    if float(task.default) == float(archive.version):
        return server.workers(archive.name, archive.version)
    if float(archive.version) in task.registered:  # left by a rollout that was killed, or by --keep-old
        _drop(server, archive.name, archive.version)
    log.info(f"{archive.name} {task.old} serves; {archive.version} goes into the store as {task.file}")
    if task.is_copy:
        copy_archive(archive.path, task.file)
    workers = archive.workers or len(server.workers(archive.name, task.old))
    # The batch settings are those of the archive's model-config.yaml: TorchServe prefers them to any given here.
    query = f"url={archive.stored}&initial_workers={workers}&synchronous=true"
    response = server.manage("POST", f"/models?{query}", LOAD_SECONDS)
    if response.status_code == 404:
        raise Mistake(f"the server does not find {archive.stored}: --store {task.store} is not its model store")
    if not response.ok:
        raise Failed(f"{archive.version} does not load ({message_of(response)}); the server's model_log.log says why")
    while len(ready := server.workers(archive.name, archive.version)) < workers:
        if time.monotonic() - started > LOAD_SECONDS:
            raise Failed(f"only {len(ready)} of {workers} workers of {archive.version} were ready in {LOAD_SECONDS} s")
        time.sleep(0.1)
    log.info(f"{workers} workers are ready after {time.monotonic() - started:.1f} s")
    return ready


def _prove(archive: Archive, server: TorchServeClient, workers: int) -> None:
    """Every golden image, then more from several threads: a worker's first requests are slow.

    Raises:
        Failed: a prediction is wrong.
    """

    def predict(i: int) -> None:
        i %= len(archive.images)
        mismatch = archive.mismatch(i, server.predict(f"{archive.name}/{archive.version}", archive.images[i]))
        if mismatch:
            raise Failed(mismatch)

    for i in range(len(archive.images)):
        predict(i)
    with ThreadPoolExecutor(2 * workers) as pool:
        list(pool.map(predict, range(WARM_UP * workers)))
    log.info(f"{len(archive.images)} golden images are predicted correctly, and it is warm")


def _undo(server: TorchServeClient, name: str, old: str, new: str) -> None:
    versions = server.versions(name)
    if float(old) not in versions:
        raise Failed(f"{old} is not registered any more, so {new} is left")
    if float(new) not in versions:
        return
    if float(server.default(name)) == float(new):
        server.set_default(name, old)
        _drop(server, name, new)
    else:
        server.unregister(name, new)


def _drop(server: TorchServeClient, name: str, version: str) -> None:
    """Unregisters a version that is no default, when it can have no request under way; one that is gone stays gone.

    TorchServe 0.12 never responds to what a version has under way when it is unregistered, and does not tell what its
    workers are at. But a batch that has left the queue gets its response within the model's response time-out.
    """
    started = time.monotonic()
    while state := server.versions(name).get(float(version)):
        longest = state.longest
        if not state.pending or time.monotonic() - started >= longest:
            break
        time.sleep(0.1)
    else:
        return
    time.sleep(longest)
    server.unregister(name, version)


@contextmanager
def _changing_nothing() -> Iterator[None]:
    try:
        yield
    except Failed as error:
        raise Mistake(f"nothing was changed: {error}") from None
