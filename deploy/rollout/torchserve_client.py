"""One TorchServe, seen from its management, inference and metrics ports."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from deploy.rollout.errors import Failed, Mistake

CONNECT_SECONDS = 5
RESPONSE_SECONDS = 60  # above the 30 s after which TorchServe replaces a worker


class TorchServeClient:
    """Asks as the holder of a key file does; may be shared by threads."""

    def __init__(self, management: str, inference: str, metrics: str, key_file: Path | None) -> None:
        """
        Raises:
            Mistake: the key file cannot be used.
        """
        self.management, self.inference, self.metrics = management.rstrip("/"), inference.rstrip("/"), metrics
        self._keys = _read_keys(key_file) if key_file else {}
        self._threads = threading.local()

    def manage(self, method: str, path: str, seconds: float = RESPONSE_SECONDS) -> requests.Response:
        return self._send(method, f"{self.management}{path}", "management", seconds)

    def predict(self, model: str, image: bytes) -> requests.Response:
        """`model`: NAME, which the default version predicts, or NAME/VERSION."""
        return self._send("POST", f"{self.inference}/predictions/{model}", "inference", RESPONSE_SECONDS, image)

    def check(self) -> None:
        """
        Raises:
            Mistake: it cannot be reached with these addresses and keys, or does not let models be registered.
        """
        try:
            response = self.manage("POST", "/models")  # without the model: 400, or 405 where it is not allowed
            ping = self._send("GET", f"{self.inference}/ping", "inference", RESPONSE_SECONDS)
        except requests.RequestException as error:
            url = error.request.url if error.request else self.management
            raise Mistake(
                f"no TorchServe at {url}: {type(error).__name__}; is it running, and are --to and --inference correct?"
            ) from None
        for kind, refused in (("management", response), ("inference", ping)):
            if _type_of(refused) == "InvalidKeyException":
                raise Mistake(f"the {kind} key is refused: name the key_file.json of this server's last start")
        if response.status_code == 405:
            raise Mistake(
                f"{self.management} does not let models be registered: set enable_model_api=true in its "
                "config.properties and start it again"
            )
        if response.status_code != 400:
            raise Mistake(f"{self.management} is no management port of TorchServe: it returned {response.status_code}")

    def models(self) -> list[str]:
        response = self.manage("GET", "/models")
        with understanding(response):
            return [str(one["modelName"]) for one in json_of(response)["models"]]

    def versions(self, name: str) -> dict[float, RegisteredVersion]:
        """Each registered version; empty where there is no such model."""
        response = self.manage("GET", f"/models/{name}/all")
        return {} if response.status_code == 404 else RegisteredVersion.read(response)

    def default(self, name: str) -> str:
        return next(iter(RegisteredVersion.read(self.manage("GET", f"/models/{name}")).values())).number

    def workers(self, name: str, version: str) -> set[int]:
        """The process ids of those that are ready."""
        state = self.versions(name).get(float(version))
        return state.ready if state else set()

    def set_default(self, name: str, version: str) -> None:
        json_of(self.manage("PUT", f"/models/{name}/{version}/set-default"))

    def unregister(self, name: str, version: str) -> None:
        json_of(self.manage("DELETE", f"/models/{name}/{version}"))

    def counters(self) -> dict[str, float] | None:
        """The series of the metrics port; None where there is none to read."""
        try:
            response = self._send("GET", self.metrics, "inference", RESPONSE_SECONDS)
        except requests.RequestException:
            return None
        text = response.text if response.ok else ""
        found = re.findall(r"^(\w+\{[^}]*\}) (\d[\d.]*(?:[eE][+-]?\d+)?)$", text, re.MULTILINE)
        return {series: float(value) for series, value in found} or None

    def _send(self, method: str, url: str, kind: str, seconds: float, body: bytes | None = None) -> requests.Response:
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = self._threads.session = requests.Session()
            session.trust_env = False  # no proxy and no .netrc on the way to one's own server
        headers = {"Authorization": f"Bearer {self._keys[kind]}"} if self._keys else {}
        return session.request(method, url, headers=headers, data=body, timeout=(CONNECT_SECONDS, seconds))


@dataclass(frozen=True)
class RegisteredVersion:
    """A registered version, as TorchServe describes it."""

    number: str  # as it is written; to TorchServe 1, 1.0 and 1.00 are one
    ready: set[int]  # process ids of the workers that are
    pending: int  # requests in its queue
    longest: float  # seconds that a batch may be under way

    @classmethod
    def read(cls, response: requests.Response) -> dict[float, RegisteredVersion]:
        """
        Raises:
            Failed: the response is not a list of versions, of one at least.
        """
        found = {}
        with understanding(response):
            for state in json_of(response):
                found[float(state["modelVersion"])] = cls(
                    number=str(state["modelVersion"]),
                    ready={int(worker["pid"]) for worker in state["workers"] if worker["status"] == "READY"},
                    pending=int(state["jobQueueStatus"]["pendingRequests"]),
                    longest=float(state["responseTimeout"]) + float(state["maxBatchDelay"]) / 1000,
                )
            min(found)
        return found


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


def json_of(response: requests.Response) -> Any:
    if not response.ok:
        raise Failed(f"{response.request.method} {response.request.path_url} returned {message_of(response)}")
    return response.json()


@contextmanager
def understanding(response: requests.Response) -> Iterator[None]:
    """Raises Failed where the block finds something else in the response than it looks for."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError):
        text = " ".join(response.text[:100].split())
        raise Failed(f"{response.request.method} {response.url} returned what TorchServe never does: {text}") from None


def _body(response: requests.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _type_of(response: requests.Response) -> str:
    return str(_body(response).get("type", ""))


def message_of(response: requests.Response) -> str:
    return f"{response.status_code} {_body(response).get('message') or response.reason}"
