"""Asks a served classifier about pictures. Needs nothing but `requests`.

    python classify.py --url http://127.0.0.1:8080 --model digits --key-file key_file.json PICTURE [PICTURE …]

Prints a line of JSON for each picture. Ends with 1 if any could not be classified.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests


class ClassifierError(RuntimeError):
    """The server refused a picture, or the request. `code` is the HTTP status, `type` the cause."""

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(f"{code} {type}: {message}")
        self.code, self.type = code, type


class Client:
    """One served model. Keeps its connection open; use one client in each thread."""

    def __init__(self, url: str, model: str, token: str = "", timeout: float = 30.0) -> None:
        """timeout: seconds, for connecting and for each answer."""
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy and no .netrc between a client and its own server
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def is_healthy(self) -> bool:
        return self._session.get(f"{self.url}/ping", timeout=self.timeout).ok

    def classify(self, picture: bytes) -> dict[str, float]:
        """The bytes of a picture file to {label: probability}, best first.

        Raises:
            ClassifierError: refused; `type` says why.
        """
        reply = self._session.post(
            f"{self.url}/predictions/{self.model}",
            data=picture,
            headers={"Content-Type": "application/octet-stream"},
            timeout=self.timeout,
        )
        return _read(reply)

    def classify_many(self, pictures: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Several in one request: {name: answer}, where the answer of a refused one is its error.

        The names are the mapping's keys, so none is repeated: TorchServe would keep only the last of them.

        Raises:
            ClassifierError: all were refused.
        """
        if len(pictures) == 1:
            ((name, body),) = pictures.items()
            return {name: self.classify(body)}
        files = {name: ("picture", body, "application/octet-stream") for name, body in pictures.items()}
        return _read(self._session.post(f"{self.url}/predictions/{self.model}", files=files, timeout=self.timeout))


def read_key(path: Path | str) -> str:
    """The inference key from TorchServe's key_file.json. It changes at each start of the server."""
    return json.loads(Path(path).read_text())["inference"]["key"]


def _read(reply: requests.Response) -> dict[str, Any]:
    try:
        values = reply.json()
    except ValueError:
        values = {}
    if reply.ok:
        return values
    message = values.get("message") or reply.reason or "no message"
    raise ClassifierError(reply.status_code, values.get("type", "http"), message)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the server (http://127.0.0.1:8080)")
    parser.add_argument("--model", required=True, help="name of the served model")
    parser.add_argument("--key-file", type=Path, help="TorchServe's key_file.json; or set TORCHSERVE_KEY")
    options = parser.parse_args(arguments)
    try:
        key = read_key(options.key_file) if options.key_file else os.environ.get("TORCHSERVE_KEY", "")
        client = Client(options.url, options.model, key)
        failed = 0
        for path in options.pictures:
            try:
                print(json.dumps({"picture": str(path), "answer": client.classify(path.read_bytes())}))
            except ClassifierError as error:
                failed += 1
                print(json.dumps({"picture": str(path), "error": str(error)}))
    except (OSError, KeyError, ValueError) as error:  # requests' errors are OSErrors
        print(f"classify.py: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
