"""Replaces the version of a model that TorchServe serves, without losing a request, and undoes it if it fails.

    python -m deploy.rollout digits.mar --to http://127.0.0.1:8081 --key-file key_file.json --store MODEL_STORE

  1. checks the archive and the server; nothing is changed if anything is wrong here
  2. copies the archive into the model store as NAME-VERSION.mar, and registers it next to the version that serves
  3. sends it the golden images of the archive, compares the answers, and goes on until it is warm
  4. makes it the default, which /predictions/NAME answers with; the old version finishes what it has begun
  5. watches for --watch seconds: images of its own, TorchServe's count of failed requests, workers that die
  6. makes NAME.mar in the store the new archive, so that the next start of the server takes it, and drops the old
     version when it can have no request under way

If anything is wrong in 2 to 5, and at Ctrl-C, the old version is the default again, and the new one is removed. In 6
the new version stays, whatever happens. If this program is killed, one of the two goes on serving; the same command
then goes on from there.

The server must allow it: `enable_model_api=true` in its config.properties, with the management port closed to everybody
else. Start it with `--models NAME=NAME.mar`, not with `all`: the store keeps NAME-VERSION.mar of each version, so that

    python -m deploy.rollout STORE/NAME-OLD.mar …

goes back. For the time of a rollout both versions have their workers, and the server needs twice the memory. Requests
that name the old version (/predictions/NAME/OLD) get 404 when it has been dropped; --keep-old keeps it.

Ends with 0 if the new version serves, 1 if it was rolled back (the last line says why), 2 if nothing was tried because
of a mistake or because the server answers what TorchServe would not, 3 if the new version serves but step 6 was not
done (at Ctrl-C, too), and 130 after a Ctrl-C that was rolled back.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import filecmp
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml

CONNECT_SECONDS, ANSWER_SECONDS = 5, 60  # for an answer: above the 30 s after which TorchServe replaces a worker
LOAD_SECONDS = 600  # for registering: a large model on a slow disk
WARM_UP = 32  # requests for each worker
TICK = 0.5  # seconds between two looks during the watch

Say = Callable[[str], None]


class Mistake(ValueError):
    """What was asked for cannot be done, and nothing was changed."""


class Failed(RuntimeError):
    """The new version does not serve. The message says why, and what serves now."""


class Unfinished(RuntimeError):
    """The new version serves, and step 6 could not be done."""


@dataclass(frozen=True)
class Archive:
    path: Path
    name: str
    version: str
    weights: str  # sha256
    labels: list[str]
    images: list[bytes]
    probabilities: list[list[float]]  # a row for each image
    tolerance: float  # of a probability
    workers: int | None  # None: as many as the old version has

    @classmethod
    def read(cls, path: Path) -> Archive:
        """
        Raises:
            Mistake: it is damaged, or not an archive of this project.
        """
        try:
            with zipfile.ZipFile(path) as files:
                if damaged := files.testzip():
                    raise Mistake(f"{path}: {damaged} in it is damaged; copy or export it again")
                model = json.loads(files.read("MAR-INF/MANIFEST.json"))["model"]
                spec, golden = json.loads(files.read("spec.json")), json.loads(files.read("golden.json"))
                settings = yaml.safe_load(files.read("model-config.yaml")) or {}
                archive = cls(
                    path=path,
                    name=model["modelName"],
                    version=model["modelVersion"],
                    weights=spec["weights_sha256"],
                    labels=spec["labels"],
                    images=[base64.b64decode(image["b64"]) for image in golden["images"]],
                    probabilities=golden["probabilities"],
                    tolerance=max(golden["tolerance"].values()),  # what the worker runs on is not known here
                    workers=settings.get("minWorkers"),
                )
        except OSError as error:
            raise Mistake(f"{path}: {error.strerror or error}") from None
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise Mistake(f"{path}: is damaged or no archive ({error}); copy or export it again") from None
        except KeyError as error:
            raise Mistake(
                f"{path}: is no whole archive of `python -m export` ({error.args[0]}); export again"
            ) from None
        except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            if isinstance(error, Mistake):
                raise
            reason = " ".join(str(error).split())  # YAML's has several lines
            raise Mistake(f"{path}: cannot be read ({reason}); make it with `python -m export`") from None
        archive._check()
        return archive

    @property
    def stored(self) -> str:
        """Its file's name in the model store."""
        return f"{self.name}-{self.version}.mar"

    def wrong(self, i: int, reply: requests.Response) -> str:
        """What is wrong with the reply to golden image i; empty if it is right."""
        if reply.status_code != 200:
            return f"golden image {i} is answered with {reply.status_code}: {_message(reply)}"
        got = reply.headers.get("x-model-version"), reply.headers.get("x-model-weights-sha256")
        if got != (self.version, self.weights):
            return f"golden image {i} is answered by version {got[0]}, weights {str(got[1])[:12]}"
        expected = dict(zip(self.labels, self.probabilities[i], strict=True))
        try:
            answer: dict[str, float] = reply.json()
            best = max(answer, key=answer.__getitem__)
            off = max(abs(answer[label] - expected[label]) for label in answer)
            off = max(off, max(expected.values()) - expected[best])
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"golden image {i} has no answer with labels of spec.json: {reply.text[:100]}"
        if not off <= self.tolerance:  # a NaN is wrong
            return f"golden image {i}: a probability is {off:.2g} off, and {self.tolerance:g} is allowed"
        return ""

    def _check(self) -> None:
        if not (isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name)):
            raise Mistake(f"{self.path}: the name {self.name!r} cannot be used; export with --name")
        is_number = isinstance(self.version, str) and re.fullmatch(r"\d+(\.\d+)?", self.version)
        if not is_number or not float(self.version):
            raise Mistake(
                f"{self.path}: the version is {self.version!r}, and TorchServe takes numbers only, like 2 or 2.1; "
                "export with --version"
            )
        if not self.images:
            raise Mistake(f"{self.path}: golden.json holds no images, so nothing can be proven; export again")
        if not self._is_whole():
            raise Mistake(
                f"{self.path}: its files hold values of another kind than `python -m export` writes; export again"
            )

    def _is_whole(self) -> bool:
        """Whether the values from its JSON and YAML files are of the types that this class says, and fit together."""
        rows = self.probabilities if isinstance(self.probabilities, list) else [None]
        return (
            isinstance(self.weights, str)
            and isinstance(self.labels, list)
            and all(isinstance(label, str) for label in self.labels)
            and len(rows) == len(self.images)
            and all(isinstance(row, list) and len(row) == len(self.labels) for row in rows)
            and all(isinstance(value, (int, float)) for row in rows for value in row)
            and isinstance(self.tolerance, (int, float))
            and (self.workers is None or (isinstance(self.workers, int) and self.workers > 0))
        )


@dataclass(frozen=True)
class Version:
    """A registered version, as TorchServe describes it."""

    number: str  # as it is written; to TorchServe 1, 1.0 and 1.00 are one
    ready: set[int]  # process ids of the workers that are
    pending: int  # requests in its queue
    longest: float  # seconds that a batch may be under way

    @classmethod
    def read(cls, reply: requests.Response) -> dict[float, Version]:
        """
        Raises:
            Failed: the reply is not a list of versions, of one at least.
        """
        found = {}
        with _understanding(reply):
            for state in _json(reply):
                found[float(state["modelVersion"])] = cls(
                    number=str(state["modelVersion"]),
                    ready={int(worker["pid"]) for worker in state["workers"] if worker["status"] == "READY"},
                    pending=int(state["jobQueueStatus"]["pendingRequests"]),
                    longest=float(state["responseTimeout"]) + float(state["maxBatchDelay"]) / 1000,
                )
            min(found)
        return found


class Server:
    """One TorchServe, seen from its three ports."""

    def __init__(self, management: str, inference: str, metrics: str, key_file: Path | None) -> None:
        """
        Raises:
            Mistake: the key file cannot be used.
        """
        self.management, self.inference, self.metrics = management.rstrip("/"), inference.rstrip("/"), metrics
        self._keys = _read_keys(key_file) if key_file else {}
        self._threads = threading.local()

    def manage(self, method: str, path: str, seconds: float = ANSWER_SECONDS) -> requests.Response:
        return self._send(method, f"{self.management}{path}", "management", seconds)

    def ask(self, model: str, image: bytes) -> requests.Response:
        """`model`: NAME, answered by the default version, or NAME/VERSION."""
        return self._send("POST", f"{self.inference}/predictions/{model}", "inference", ANSWER_SECONDS, image)

    def check(self) -> None:
        """
        Raises:
            Mistake: it cannot be reached with these addresses and keys, or does not let models be registered.
        """
        try:
            reply = self.manage("POST", "/models")  # without the model: 400, or 405 where it is not allowed
            ping = self._send("GET", f"{self.inference}/ping", "inference", ANSWER_SECONDS)
        except requests.RequestException as error:
            url = error.request.url if error.request else self.management
            raise Mistake(
                f"no TorchServe at {url}: {type(error).__name__}; is it running, and are --to and --inference right?"
            ) from None
        for kind, answer in (("management", reply), ("inference", ping)):
            if _type(answer) == "InvalidKeyException":
                raise Mistake(f"the {kind} key is refused: name the key_file.json of this server's last start")
        if reply.status_code == 405:
            raise Mistake(
                f"{self.management} does not let models be registered: set enable_model_api=true in its "
                "config.properties and start it again"
            )
        if reply.status_code != 400:
            raise Mistake(f"{self.management} is no management port of TorchServe: it answers {reply.status_code}")

    def models(self) -> list[str]:
        reply = self.manage("GET", "/models")
        with _understanding(reply):
            return [str(one["modelName"]) for one in _json(reply)["models"]]

    def versions(self, name: str) -> dict[float, Version]:
        """Each registered version; empty where there is no such model."""
        reply = self.manage("GET", f"/models/{name}/all")
        return {} if reply.status_code == 404 else Version.read(reply)

    def default(self, name: str) -> str:
        return next(iter(Version.read(self.manage("GET", f"/models/{name}")).values())).number

    def workers(self, name: str, version: str) -> set[int]:
        """The process ids of those that are ready."""
        state = self.versions(name).get(float(version))
        return state.ready if state else set()

    def set_default(self, name: str, version: str) -> None:
        _json(self.manage("PUT", f"/models/{name}/{version}/set-default"))

    def unregister(self, name: str, version: str) -> None:
        _json(self.manage("DELETE", f"/models/{name}/{version}"))

    def counters(self) -> dict[str, float] | None:
        """The series of the metrics port; None where there is none to read."""
        try:
            reply = self._send("GET", self.metrics, "inference", ANSWER_SECONDS)
        except requests.RequestException:
            return None
        found = (
            re.findall(r"^(\w+\{[^}]*\}) (\d[\d.]*(?:[eE][+-]?\d+)?)$", reply.text, re.MULTILINE) if reply.ok else []
        )
        return {series: float(value) for series, value in found} or None

    def _send(self, method: str, url: str, kind: str, seconds: float, body: bytes | None = None) -> requests.Response:
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = self._threads.session = requests.Session()
            session.trust_env = False  # no proxy and no .netrc on the way to one's own server
        headers = {"Authorization": f"Bearer {self._keys[kind]}"} if self._keys else {}
        return session.request(method, url, headers=headers, data=body, timeout=(CONNECT_SECONDS, seconds))


def rollout(
    archive: Archive,
    store: Path,
    server: Server,
    *,
    watch: float,
    max_errors: float,
    keep_old: bool = False,
    say: Say = print,
) -> None:
    """
    Args:
        store: the server's model store.
        watch: seconds.
        max_errors: share of the requests during the watch that may fail.
        keep_old: leave the old version registered, for requests that name it.

    Raises:
        Mistake: nothing was changed.
        Failed: it was rolled back, or could not be.
    """
    if not store.is_dir():
        raise Mistake(f"--store {store}: no such folder; it is the server's --model-store")
    with _changing_nothing():
        server.check()
    with _alone(store):
        with _changing_nothing():
            task = _plan(archive, store, server)
        serves = False
        try:
            pids = _register(task, server, say)
            _prove(archive, server, len(pids), say)
            before = server.counters()
            server.set_default(archive.name, archive.version)
            say(f"{archive.version} is the default; watching for {watch:g} s")
            _watch(archive, server, pids, before, watch, max_errors, say)
            serves = True
            _finish(task, server, keep_old, say)
        except BaseException as error:  # Ctrl-C too
            if serves:
                raise Unfinished(
                    f"{archive.name} {archive.version} serves, but the rest was not done: {_reason(error)}"
                ) from error
            _roll_back(task, server, error, say)
            if isinstance(error, (Mistake, KeyboardInterrupt)):
                raise
            raise Failed(_reason(error)) from error
        say(f"{archive.name} {archive.version} serves")


@dataclass(frozen=True)
class Task:
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


def _plan(archive: Archive, store: Path, server: Server) -> Task:
    """Looks, and changes nothing."""
    old, default = _old_version(archive, server), server.default(archive.name)
    file, start = store / archive.stored, store / f"{archive.name}.mar"
    if archive.path.resolve() == start.resolve():
        raise Mistake(f"{start}: the next start takes it, good or not; export elsewhere and pass --store {store}")
    if file.exists() and not _same(file, archive.path):
        raise Mistake(f"{file}: is another archive of this version; export with another --version, or delete it")
    # One that is there is an earlier version's: it stays if this is rolled back.
    return Task(archive, store, old, default, set(server.versions(archive.name)), is_copy=not file.exists())


def _roll_back(task: Task, server: Server, error: BaseException, say: Say) -> None:
    say(f"rolling back: {_reason(error)}")
    try:
        _undo(server, task.archive.name, task.old, task.archive.version)
        if task.is_copy:
            task.file.unlink(missing_ok=True)
    except (OSError, Failed, KeyboardInterrupt) as second:
        raise Failed(
            f"{_reason(error)}; and rolling back failed: {_reason(second)}; do the same again to clean up"
        ) from error
    say(f"rolled back, {task.old} serves")


def _finish(task: Task, server: Server, keep_old: bool, say: Say) -> None:
    """Step 6."""
    name, kept = task.archive.name, task.store / f"{task.archive.name}-{task.old}.mar"
    if not kept.exists() and _is_version(task.start, task.old):  # an export may have written the new one there
        _copy(task.start, kept)
    _copy(task.file, task.start)
    say(f"{task.start} is {task.archive.version} now, for the next start")
    if not keep_old:
        _drop(server, name, task.old)
        say(f"{task.old} is dropped")


def _old_version(archive: Archive, server: Server) -> str:
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


def _register(task: Task, server: Server, say: Say) -> set[int]:
    """The process ids of the new version's workers, when all are ready."""
    archive, started = task.archive, time.monotonic()
    if float(task.default) == float(archive.version):
        return server.workers(archive.name, archive.version)
    if float(archive.version) in task.registered:  # left by a rollout that was killed, or by --keep-old
        _drop(server, archive.name, archive.version)
    say(f"{archive.name} {task.old} serves; {archive.version} goes into the store as {task.file}")
    if task.is_copy:
        _copy(archive.path, task.file)
    workers = archive.workers or len(server.workers(archive.name, task.old))
    # The batch settings are those of the archive's model-config.yaml: TorchServe prefers them to any given here.
    query = f"url={archive.stored}&initial_workers={workers}&synchronous=true"
    reply = server.manage("POST", f"/models?{query}", LOAD_SECONDS)
    if reply.status_code == 404:
        raise Mistake(f"the server does not find {archive.stored}: --store {task.store} is not its model store")
    if not reply.ok:
        raise Failed(f"{archive.version} does not load ({_message(reply)}); the server's model_log.log says why")
    while len(ready := server.workers(archive.name, archive.version)) < workers:
        if time.monotonic() - started > LOAD_SECONDS:
            raise Failed(f"only {len(ready)} of {workers} workers of {archive.version} were ready in {LOAD_SECONDS} s")
        time.sleep(0.1)
    say(f"{workers} workers are ready after {time.monotonic() - started:.1f} s")
    return ready


def _prove(archive: Archive, server: Server, workers: int, say: Say) -> None:
    """Every golden image, then more from several threads: a worker's first requests are slow.

    Raises:
        Failed: an answer is wrong.
    """

    def ask(i: int) -> None:
        i %= len(archive.images)
        wrong = archive.wrong(i, server.ask(f"{archive.name}/{archive.version}", archive.images[i]))
        if wrong:
            raise Failed(wrong)

    for i in range(len(archive.images)):
        ask(i)
    with ThreadPoolExecutor(2 * workers) as pool:
        list(pool.map(ask, range(WARM_UP * workers)))
    say(f"{len(archive.images)} golden images are answered right, and it is warm")


def _watch(
    archive: Archive,
    server: Server,
    pids: set[int],
    before: dict[str, float] | None,
    seconds: float,
    max_errors: float,
    say: Say,
) -> None:
    """
    A few failures weigh little until the watch's own requests would outweigh them: of the first two requests one that
    fails would be half of them.

    Raises:
        Failed: more requests failed than `max_errors` allows, an answer was wrong, or a worker has died.
    """
    if before is None:
        say("there are no metrics to read: only images of its own and the workers are watched; see --metrics")
    started = time.monotonic()
    own = own_failed = lost = 0
    last = ""
    while True:
        i = own % len(archive.images)
        own += 1
        try:
            reply = server.ask(archive.name, archive.images[i])
            wrong = archive.wrong(i, reply)
            if wrong and reply.ok:
                raise Failed(wrong)
            own_failed += bool(wrong)
            last = wrong or last
        except requests.RequestException as error:
            lost, last = lost + 1, _reason(error)
        if server.workers(archive.name, archive.version) != pids:
            raise Failed(f"a worker of {archive.version} has died")
        now = server.counters()
        errors, total = own_failed + lost, own
        if before and now:
            errors = lost + round(_grown(before, now, "Requests5XX{"))
            total = max(own, round(_grown(before, now, f'ts_inference_requests_total{{model_name="{archive.name}"')))
        if errors > max_errors * max(total, seconds / TICK):
            example = f", the last of its own: {last}" if last else ""
            raise Failed(f"{errors} of {total} requests failed, and --max-errors is {max_errors:g}{example}")
        left = started + seconds - time.monotonic()
        if left <= 0:
            say(f"{errors} of {total} requests failed")
            return
        time.sleep(min(TICK, left))


def _undo(server: Server, name: str, old: str, new: str) -> None:
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


def _drop(server: Server, name: str, version: str) -> None:
    """Unregisters a version that is no default, when it can have no request under way; one that is gone stays gone.

    TorchServe 0.12 never answers what a version has under way when it is unregistered, and does not tell what its
    workers are at. But a batch that has been taken from the queue is answered within the model's response time-out.
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


def _grown(before: dict[str, float], after: dict[str, float], prefix: str) -> float:
    return sum(value - before.get(series, 0.0) for series, value in after.items() if series.startswith(prefix))


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """One rollout at a time in a store. The lock goes with the process that holds it, however that ends."""
    folder = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Mistake(f"{store}: another rollout is under way") from None
    finally:
        os.close(folder)


def _is_version(path: Path, version: str) -> bool:
    try:
        return float(Archive.read(path).version) == float(version)
    except Mistake:  # it is not there, or not whole
        return False


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all; nobody reads half of an archive."""
    try:
        shutil.copyfile(source, _part(target))
        _part(target).replace(target)
    finally:
        _part(target).unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Hidden, so that no server that loads all archives of a folder takes it for one."""
    return path.with_name(f".{path.name.removeprefix('.')}.part")


def _same(a: Path, b: Path) -> bool:
    return a.samefile(b) or filecmp.cmp(a, b, shallow=False)


def _read_keys(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
        keys = {kind: content[kind]["key"] for kind in ("management", "inference")}
        if not all(re.fullmatch(r"[!-~]+", key) for key in keys.values()):
            raise ValueError
        return keys
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}; it lies in the folder where TorchServe was started") from None
    except (ValueError, KeyError, TypeError):
        raise Mistake(f"{path}: holds no management and inference keys; name TorchServe's key_file.json") from None


def _json(reply: requests.Response) -> Any:
    if not reply.ok:
        raise Failed(f"{reply.request.method} {reply.request.path_url} is answered with {_message(reply)}")
    return reply.json()


@contextmanager
def _understanding(reply: requests.Response) -> Iterator[None]:
    """Raises Failed where the block finds something else in the reply than it looks for."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError):
        text = " ".join(reply.text[:100].split())
        raise Failed(f"{reply.request.method} {reply.url} is answered as TorchServe never does: {text}") from None


@contextmanager
def _changing_nothing() -> Iterator[None]:
    try:
        yield
    except Failed as error:
        raise Mistake(f"nothing was changed: {error}") from None


def _body(reply: requests.Response) -> dict[str, Any]:
    try:
        body = reply.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _type(reply: requests.Response) -> str:
    return str(_body(reply).get("type", ""))


def _message(reply: requests.Response) -> str:
    return f"{reply.status_code} {_body(reply).get('message') or reply.reason}"


def _reason(error: BaseException) -> str:
    if isinstance(error, requests.RequestException):
        return f"{error.request.url if error.request else 'the server'} does not answer ({type(error).__name__})"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) or type(error).__name__


def _say(line: str, *, is_error: bool = False) -> None:
    """Whoever reads the output may be gone (`| head`, a closed terminal); what is under way is done all the same."""
    stream = sys.stderr if is_error else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:  # what was not written would be tried again when Python ends, and the exit code be 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _neighbour(management: str, step: int) -> str:
    """The address whose port is `step` from the management port: 8080, 8081 and 8082, or those of `serve.py --port`."""
    parts = urlsplit(management)
    return f"{parts.scheme}://{parts.hostname}:{(parts.port or 8081) + step}"


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be a share from 0 to below 1, like 0.01")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError("must be a number of seconds, 0 or more")
    return value


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError("must be like http://127.0.0.1:8081")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, metavar="NAME.mar", help="made by `python -m export RUN --version …`")
    parser.add_argument("--store", type=Path, metavar="DIR", help="the server's model store (the archive's folder)")
    parser.add_argument(
        "--to", type=_url, default="http://127.0.0.1:8081", metavar="URL", help="management (http://127.0.0.1:8081)"
    )
    parser.add_argument("--inference", type=_url, metavar="URL", help="inference (the port before that of --to)")
    parser.add_argument("--metrics", type=_url, metavar="URL", help="metrics (/metrics at the port after that of --to)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="TorchServe's key_file.json; none without keys")
    parser.add_argument("--watch", type=_seconds, default=30, metavar="S", help="seconds after the switch (30)")
    parser.add_argument("--keep-old", action="store_true", help="leave the old version registered, under its number")
    parser.add_argument(
        "--max-errors",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="share of the requests during the watch, of all models, that may fail with a 5xx status (0.01)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, signal.default_int_handler)  # is undone as Ctrl-C is
    try:
        server = Server(
            options.to,
            options.inference or _neighbour(options.to, -1),
            options.metrics or f"{_neighbour(options.to, 1)}/metrics",
            options.key_file,
        )
        rollout(
            Archive.read(options.archive),
            options.store or options.archive.parent,
            server,
            watch=options.watch,
            max_errors=options.max_errors,
            keep_old=options.keep_old,
            say=_say,
        )
    except (Mistake, OSError) as error:
        _say(f"rollout: {_reason(error)}", is_error=True)
        return 2
    except Failed as error:
        _say(f"rollout: {error}", is_error=True)
        return 1
    except Unfinished as error:
        _say(f"rollout: {error}", is_error=True)
        return 3
    except KeyboardInterrupt:
        _say("rollout: interrupted", is_error=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
