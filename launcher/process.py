"""Starting TorchServe in a process group of its own, and stopping all of it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.environment import environment
from launcher.errors import ServerError
from launcher.ports import Ports, addresses, check_ports
from launcher.properties import read_properties, write_properties
from launcher.readiness import last_words, wait_until_ready, warm_up
from launcher.server import RunningServer
from launcher.work_folder import locked, make_temporary_folder, note_owner

CONFIG = Path(__file__).resolve().parents[1] / "config.properties"
LOGGING = CONFIG.with_name("log4j2.xml")
FILES = {"metrics_config", "certificate_file", "private_key_file", "keystore"}  # properties that are paths
READY_SECONDS = 120  # a large model on a slow disk; a small one is ready in 5
STOP_SECONDS = 20  # from asking TorchServe to stop to killing it

# Starts TorchServe as its command `torchserve` does, and ends it with the process that holds the other end of the pipe:
# a killed serve.py (SIGKILL, out of memory) cannot do so itself, and its server would run on and keep the ports.
START = """
import os, signal, sys, threading
sys.path.remove("")
from ts.model_server import start

def end_with_parent(pipe=int(sys.argv.pop(1))):
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_parent, daemon=True).start()
start()
"""


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
) -> Iterator[RunningServer]:
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
    properties, ports = _resolve(config, ports, settings or {})
    _check(archives, properties, config)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    with locked(folder, ports) as lock:
        check_ports(ports)
        (folder / "key_file.json").unlink(missing_ok=True)
        write_properties(folder / "config.properties", properties)
        earlier = {path.name: path.stat().st_size for path in (folder / "logs").iterdir() if path.name != "console.log"}
        with _started(archives, folder, logging, console, lock) as process:
            note_owner(lock, ports, process.pid)
            server = RunningServer(process, folder, ports, properties, earlier)
            wait_until_ready(server, [archive.stem for archive in archives], ready_seconds)
            warm_up(server, archives[0].stem)
            yield server


@contextmanager
def _started(
    archives: Sequence[Path], folder: Path, logging: Path | None, console: int | None, lock: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The process; at the end nothing is left of it, its workers and its temporary files."""
    temporary = make_temporary_folder(folder)
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
            yield process
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


def wait(server: RunningServer) -> str:
    """Waits until TorchServe ends by itself, and says why it did."""
    server.process.wait()
    return f"TorchServe ended: {last_words(server)}"


def exit_on_signals() -> None:
    """Ends this program in order, and the server with it, when it is told to stop or its terminal is closed.

    A signal that is ignored stays so: `nohup` has it that way.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(0))


def _resolve(config: Path, ports: Ports | None, settings: dict[str, str]) -> tuple[dict[str, str], Ports]:
    """What TorchServe's config.properties will hold: `config`, then `settings`, then the ports."""
    properties = read_properties(config)
    ports = ports or Ports.of_config(properties)
    for name in FILES.intersection(properties):  # beside the configuration, as when TorchServe is started there
        properties[name] = str((config.parent / properties[name]).resolve())
    properties |= settings
    return properties | addresses(ports, properties), ports


def _check(archives: Sequence[Path], properties: dict[str, str], config: Path) -> None:
    for archive in archives:
        if not archive.is_file():
            command = f"python -m export {shlex.quote(str(archive.parent.parent))}"
            raise ServerError(f"{archive}: no such archive; make it with `{command}`")
    for name in sorted(FILES.intersection(properties)):
        if not Path(properties[name]).is_file():
            raise ServerError(f"{config}: {name} is {properties[name]}, and there is no such file")
    if properties.get("enable_grpc_ssl") == "true" and not {"certificate_file", "private_key_file"} <= set(properties):
        raise ServerError(
            f"{config}: enable_grpc_ssl=true needs certificate_file and private_key_file, as TorchServe's gRPC cannot "
            "read a keystore; name them too, or leave enable_grpc_ssl out"
        )


def _command(archives: Sequence[Path], folder: Path, logging: Path | None, pipe: int) -> list[str]:
    return [
        *(sys.executable, "-c", START, str(pipe)),
        *("--start", "--foreground", "--ncs"),
        *("--ts-config", str(folder.resolve() / "config.properties")),
        *(("--log-config", str(logging.resolve())) if logging else ()),
        *("--model-store", str(archives[0].resolve().parent)),
        *("--models", *(f"{archive.stem}={archive.name}" for archive in archives)),
    ]
