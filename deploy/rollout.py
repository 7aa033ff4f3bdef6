"""Replaces the version of a model that TorchServe serves, without losing a request, and undoes it if it fails.

    python -m deploy.rollout digits.mar --to http://127.0.0.1:8081 --key-file key_file.json --store MODEL_STORE

  1. checks the archive and the server; nothing is changed if anything is wrong here
  2. copies the archive into the model store as NAME-VERSION.mar, and registers it next to the version that serves
  3. sends it the golden pictures of the archive, compares the answers, and goes on until it is warm
  4. makes it the default, which /predictions/NAME answers with; the old version finishes what it has begun
  5. watches for --watch seconds: pictures of its own, TorchServe's count of failed requests, workers that die
  6. makes NAME.mar in the store the new archive, so that the next start of the server takes it, and drops the old
     version when it can have no request under way

If anything is wrong in 2 to 5, and at Ctrl-C, the old version is the default again, and the new one is removed. If this
program is killed, one of the two goes on serving; the same command then goes on from there.

The server must allow it: `enable_model_api=true` in its config.properties, with the management port closed to everybody
else. Start it with `--models NAME=NAME.mar`, not with `all`: the store keeps NAME-VERSION.mar of each version, so that

    python -m deploy.rollout STORE/NAME-OLD.mar …

goes back. For the time of a rollout both versions have their workers, and the server needs twice the memory. Requests
that name the old version (/predictions/NAME/OLD) get 404 when it has been dropped; --keep-old keeps it.

Ends with 0 if the new version serves, 1 if it was rolled back (the last line says why), 2 if nothing was tried because
of a mistake, 3 if the new version serves but step 6 could not be done, and 130 after Ctrl-C.
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
    pictures: list[bytes]
    probabilities: list[list[float]]  # a row for each picture
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
                    pictures=[base64.b64decode(picture["b64"]) for picture in golden["pictures"]],
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
        except (ValueError, TypeError, yaml.YAMLError) as error:
            if isinstance(error, Mistake):
                raise
            raise Mistake(f"{path}: cannot be read ({error}); make it with `python -m export`") from None
        archive._check()
        return archive

    @property
    def stored(self) -> str:
        """Its file's name in the model store."""
        return f"{self.name}-{self.version}.mar"

    def wrong(self, i: int, reply: requests.Response) -> str:
        """What is wrong with the reply to golden picture i; empty if it is right."""
        if reply.status_code != 200:
            return f"golden picture {i} is answered with {reply.status_code}: {_message(reply)}"
        got = reply.headers.get("x-model-version"), reply.headers.get("x-model-weights-sha256")
        if got != (self.version, self.weights):
            return f"golden picture {i} is answered by version {got[0]}, weights {str(got[1])[:12]}"
        expected = dict(zip(self.labels, self.probabilities[i], strict=True))
        try:
            answer: dict[str, float] = reply.json()
            best = max(answer, key=answer.__getitem__)
            off = max(abs(answer[label] - expected[label]) for label in answer)
            off = max(off, max(expected.values()) - expected[best])
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"golden picture {i} has no answer with labels of spec.json: {reply.text[:100]}"
        if not off <= self.tolerance:  # a NaN is wrong
            return f"golden picture {i}: a probability is {off:.2g} off, and {self.tolerance:g} is allowed"
        return ""

    def _check(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise Mistake(f"{self.path}: the name {self.name!r} cannot be used; export with --name")
        if not re.fullmatch(r"\d+(\.\d+)?", self.version) or not float(self.version):
            raise Mistake(
                f"{self.path}: the version is {self.version!r}, and TorchServe takes numbers only, like 2 or 2.1; "
                "export with --version"
            )
        if not self.pictures:
            raise Mistake(f"{self.path}: golden.json holds no pictures, so nothing can be proven; export again")


class Server:
    """One TorchServe, seen from its three ports. A version is a number: to TorchServe 1, 1.0 and 1.00 are one."""

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

    def ask(self, model: str, picture: bytes) -> requests.Response:
        """`model`: NAME, answered by the default version, or NAME/VERSION."""
        return self._send("POST", f"{self.inference}/predictions/{model}", "inference", ANSWER_SECONDS, picture)

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

    def versions(self, name: str) -> dict[float, dict[str, Any]]:
        """TorchServe's description of each registered version; empty where there is no such model."""
        reply = self.manage("GET", f"/models/{name}/all")
        return {} if reply.status_code == 404 else {float(one["modelVersion"]): one for one in _json(reply)}

    def default(self, name: str) -> str:
        return str(_json(self.manage("GET", f"/models/{name}"))[0]["modelVersion"])

    def workers(self, name: str, version: str) -> set[int]:
        """The process ids of those that are ready."""
        state = self.versions(name).get(float(version), {"workers": []})
        return {worker["pid"] for worker in state["workers"] if worker["status"] == "READY"}

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
        found = re.findall(r"^(\w+\{[^}]*\}) (\S+)$", reply.text, re.MULTILINE) if reply.ok else []
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
    server.check()
    with _alone(store):
        name, new, file = archive.name, archive.version, store / archive.stored
        old, start = _old_version(archive, server), store / f"{name}.mar"
        if archive.path.resolve() == start.resolve():
            raise Mistake(f"{start}: the next start takes it, good or not; export elsewhere and pass --store {store}")
        if not file.exists():
            is_copy = True
        elif _same(file, archive.path):
            is_copy = False  # an earlier version's: it stays if this is rolled back
        else:
            raise Mistake(f"{file}: is another archive of this version; export with another --version, or delete it")
        try:
            if float(server.default(name)) == float(new):
                pids = server.workers(name, new)
            else:
                if float(new) in server.versions(name):  # left by a rollout that was killed, or by --keep-old
                    _drop(server, name, new)
                say(f"{name} {old} serves; {new} goes into the store as {file}")
                if is_copy:
                    _copy(archive.path, file)
                pids = _register(archive, server, archive.workers or len(server.workers(name, old)), store, say)
            _prove(archive, server, len(pids), say)
            before = server.counters()
            server.set_default(name, new)
            say(f"{new} is the default; watching for {watch:g} s")
            _watch(archive, server, pids, before, watch, max_errors, say)
        except BaseException as error:  # Ctrl-C too
            say(f"rolling back: {_reason(error)}")
            try:
                _undo(server, name, old, new)
                if is_copy:
                    file.unlink(missing_ok=True)
            except (OSError, Failed) as second:
                raise Failed(
                    f"{_reason(error)}; and rolling back failed: {_reason(second)}; do the same again to clean up"
                ) from error
            say(f"rolled back, {old} serves")
            if isinstance(error, (Mistake, KeyboardInterrupt)):
                raise
            raise Failed(_reason(error)) from error
        try:
            kept = store / f"{name}-{old}.mar"
            if not kept.exists() and _is_version(start, old):  # an export may have written the new one there
                _copy(start, kept)
            _copy(file, start)
            say(f"{start} is {new} now, for the next start")
            if not keep_old:
                _drop(server, name, old)
                say(f"{old} is dropped")
        except (OSError, Failed) as error:
            raise Unfinished(f"{name} {new} serves, but the rest was not done: {_reason(error)}") from error
        say(f"{name} {new} serves")


def _old_version(archive: Archive, server: Server) -> str:
    """The version that is to be replaced. One that serves already is no mistake if a killed rollout has left it so."""
    versions = server.versions(archive.name)
    if not versions:
        models = ", ".join(one["modelName"] for one in _json(server.manage("GET", "/models"))["models"]) or "none"
        raise Mistake(f"{archive.path} is of the model {archive.name}, and the server has {models}")
    default = server.default(archive.name)
    if float(default) != float(archive.version):
        return default
    others = [one["modelVersion"] for number, one in versions.items() if number != float(archive.version)]
    if len(others) != 1:
        raise Mistake(f"{archive.name} {archive.version} is what the server serves; export with another --version")
    return str(others[0])


def _register(archive: Archive, server: Server, workers: int, store: Path, say: Say) -> set[int]:
    """The process ids of the new version's workers, when all are ready."""
    started = time.monotonic()
    # The batch settings are those of the archive's model-config.yaml: TorchServe prefers them to any given here.
    query = f"url={archive.stored}&initial_workers={workers}&synchronous=true"
    reply = server.manage("POST", f"/models?{query}", LOAD_SECONDS)
    if reply.status_code == 404:
        raise Mistake(f"the server does not find {archive.stored}: --store {store} is not its model store")
    if not reply.ok:
        raise Failed(f"{archive.version} does not load ({_message(reply)}); the server's model_log.log says why")
    while len(ready := server.workers(archive.name, archive.version)) < workers:
        if time.monotonic() - started > LOAD_SECONDS:
            raise Failed(f"only {len(ready)} of {workers} workers of {archive.version} were ready in {LOAD_SECONDS} s")
        time.sleep(0.1)
    say(f"{workers} workers are ready after {time.monotonic() - started:.1f} s")
    return ready


def _prove(archive: Archive, server: Server, workers: int, say: Say) -> None:
    """Every golden picture, then more from several threads: a worker's first requests are slow.

    Raises:
        Failed: an answer is wrong.
    """

    def ask(i: int) -> None:
        i %= len(archive.pictures)
        wrong = archive.wrong(i, server.ask(f"{archive.name}/{archive.version}", archive.pictures[i]))
        if wrong:
            raise Failed(wrong)

    for i in range(len(archive.pictures)):
        ask(i)
    with ThreadPoolExecutor(2 * workers) as pool:
        list(pool.map(ask, range(WARM_UP * workers)))
    say(f"{len(archive.pictures)} golden pictures are answered right, and it is warm")


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
        say("there are no metrics to read: only pictures of its own and the workers are watched; see --metrics")
    started = time.monotonic()
    own = own_failed = lost = 0
    last = ""
    while True:
        i = own % len(archive.pictures)
        own += 1
        try:
            reply = server.ask(archive.name, archive.pictures[i])
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
        longest = state["responseTimeout"] + state["maxBatchDelay"] / 1000  # seconds
        if not state["jobQueueStatus"]["pendingRequests"] or time.monotonic() - started >= longest:
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
        return {kind: content[kind]["key"] for kind in ("management", "inference")}
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}; it lies in the folder where TorchServe was started") from None
    except (ValueError, KeyError, TypeError):
        raise Mistake(f"{path}: holds no management and inference keys; name TorchServe's key_file.json") from None


def _json(reply: requests.Response) -> Any:
    if not reply.ok:
        raise Failed(f"{reply.request.method} {reply.request.path_url} is answered with {_message(reply)}")
    return reply.json()


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
    return str(error) or type(error).__name__


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # is undone as Ctrl-C is
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
            say=lambda line: print(line, flush=True),
        )
    except (Mistake, OSError) as error:
        print(f"rollout: {_reason(error)}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"rollout: {error}", file=sys.stderr)
        return 1
    except Unfinished as error:
        print(f"rollout: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("rollout: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
