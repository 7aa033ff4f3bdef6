"""Waiting for a TorchServe that has been started: is it ready, warm, or gone, and what did its logs say?"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import requests
from urllib3.exceptions import InsecureRequestWarning

from launcher.errors import ServerError
from launcher.server import RunningServer

WARM_UP, WARM_UP_SECONDS = 30, 2  # requests, and when to leave it at fewer: a large model, or a patient batch
IMAGE = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"  # of one pixel
DIED = "Backend worker process died"
TRACEBACK_SECONDS = 10  # TorchServe logs a traceback line by line: how long it is waited for
NO_REASONS = (  # how lines of the console begin that may come after the reason
    "Error: Could not create the Java Virtual Machine.",
    "Error: A fatal exception has occurred. Program will exit.",
    "Warning: TorchServe is using non-default JVM parameters",  # its command prints this first and flushes it last
    "NOTE: Picked up JDK_JAVA_OPTIONS",
)


def wait_until_ready(server: RunningServer, models: list[str], seconds: float) -> None:
    deadline, waiting = time.monotonic() + seconds, list(models)
    while waiting:
        if _is_ready(server, waiting[0]):
            waiting.pop(0)
            continue
        if server.process.poll() is not None:
            raise ServerError(f"TorchServe ended: {last_words(server)}")
        if DIED in _logged(server, "model_log.log"):
            _wait_for_the_whole_traceback(server)
            raise ServerError(f"the worker of {waiting[0]} died while loading: {last_words(server)}")
        if time.monotonic() > deadline:
            raise ServerError(f"{waiting[0]} was not ready after {seconds:g} s: {last_words(server)}")
        time.sleep(0.1)


def warm_up(server: RunningServer, model: str) -> None:
    """Java loads its classes when they are first used: the first client would wait four times as long as the 100th."""
    deadline = time.monotonic() + WARM_UP_SECONDS
    with suppress(requests.RequestException), loopback_session(server.key()) as session:  # it serves all the same
        for _ in range(WARM_UP):
            session.post(f"{server.url}/predictions/{model}", data=IMAGE, timeout=WARM_UP_SECONDS)
            if time.monotonic() > deadline:
                return


def _wait_for_the_whole_traceback(server: RunningServer) -> None:
    """Until the log rests on the line of an exception, which comes last and is the only one that is not indented."""
    deadline, before = time.monotonic() + TRACEBACK_SECONDS, ""
    while time.monotonic() < deadline:
        logged = _logged(server, "model_log.log")
        if logged == before and re.search(r"MODEL_LOG - \S*(Error|Exception)\b.*$", logged.split(DIED)[-1].strip()):
            return
        before = logged
        time.sleep(0.5)


@contextmanager
def loopback_session(key: str) -> Iterator[requests.Session]:
    """For requests to our own server, over loopback: past any proxy, which must not see the key, and whatever name its
    certificate has."""
    with requests.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureRequestWarning)
        session.trust_env = session.verify = False
        session.headers["Authorization"] = f"Bearer {key}"
        yield session


def _is_ready(server: RunningServer, model: str) -> bool:
    try:
        with loopback_session(server.key("management")) as session:
            (state,) = session.get(f"{server.management_url}/models/{model}", timeout=5).json()
        workers: list[dict[str, Any]] = state["workers"]
    except (OSError, ValueError, KeyError, TypeError):  # not listening, or its key is not written, or it says an error
        return False
    return len(workers) >= max(1, state["minWorkers"]) and all(worker["status"] == "READY" for worker in workers)


def last_words(server: RunningServer) -> str:
    """What the logs say last, since this start: errors before anything else, and the worker's own words first."""
    said = {name: _logged(server, name).strip().splitlines() for name in ("model_log.log", "ts_log.log", "console.log")}
    said["console.log"] = [line for line in said["console.log"] if not line.startswith(NO_REASONS)]
    for pattern in (r"^(?!Caused by: ).*\b\w*(Error|Exception)\b", r"\b(ERROR|FATAL)\b", ""):
        for name, lines in said.items():
            if found := [line for line in lines if re.search(pattern, line)]:
                return f"{found[-1][-500:]} (see {server.folder / 'logs' / name})"
    return f"see {server.folder / 'logs'}"


def _logged(server: RunningServer, log: str) -> str:
    """What stands in the log since this start."""
    path = server.folder / "logs" / log
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(server.earlier.get(log, 0))
        return file.read().decode(errors="replace")
