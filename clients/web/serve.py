"""Serves the page of this folder on loopback and, at its own address, forwards questions to one TorchServe.

    python clients/web/serve.py runs/digits/export/digits.pixels.onnx --torchserve http://127.0.0.1:8080

The page cannot ask TorchServe directly: a browser's preflight request carries no key, and TorchServe refuses it for
that, whatever its cors_… settings are. Here both have one origin; only `POST /predictions/NAME` is forwarded. A
TorchServe with https and a certificate of its own is trusted by --cacert FILE.
"""

from __future__ import annotations

import argparse
import json
import re
import ssl
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import requests

FOLDER = Path(__file__).resolve().parent
LARGEST_BODY = 10_485_760  # bytes: max_request_size of config.properties
LARGEST_ANSWER = 4_000_000  # bytes
SECONDS = 60  # for TorchServe to answer

# By the suffix, and not as this machine's own tables say: a browser runs no module and no WebAssembly of another type.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}


@cache
def policy() -> str:
    """The page's own Content-Security-Policy, for the header: there it holds for the worker too."""
    found = re.search(r'"Content-Security-Policy" content="([^"]+)"', (FOLDER / "index.html").read_text("utf-8"))
    assert found
    return f"{found[1]}; frame-ancestors 'none'"


class Handler(SimpleHTTPRequestHandler):
    """The files of TYPES in this folder, the model beside them, and POST /predictions/NAME."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS  # a connection that says nothing ends

    def __init__(
        self, *args: Any, model: Path | None, torchserve: str, cacert: Path | None = None, **options: Any
    ) -> None:
        self.model, self.torchserve, self.cacert = model, torchserve, cacert
        super().__init__(*args, directory=str(FOLDER), **options)

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        if not self._is_ours():
            return None
        if path.suffix not in TYPES and path != FOLDER:
            return self.send_error(404)
        return super().send_head()

    def translate_path(self, path: str) -> str:
        if self.model and unquote(urlsplit(path).path) == f"/{self.model.name}":
            return str(self.model)
        return super().translate_path(path)

    def guess_type(self, path: Any) -> str:
        return TYPES.get(Path(path).suffix, "application/octet-stream")

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", policy())
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def do_POST(self) -> None:
        self.close_connection = True  # a body that is refused is not read
        length = self.headers.get("Content-Length", "")
        if not self._is_ours():
            return
        if not re.fullmatch(r"/predictions/[A-Za-z0-9_-][A-Za-z0-9_.-]*", self.path):
            self._answer(404, "not_found", "only POST /predictions/NAME is forwarded")
        elif not self.torchserve:
            self._answer(502, "no_torchserve", "start this server with --torchserve http://127.0.0.1:8080")
        elif not length.isdecimal():
            self._answer(411, "no_length", "a body needs a Content-Length")
        elif int(length) > LARGEST_BODY:
            self._answer(413, "too_large", f"at most {LARGEST_BODY:,} bytes are forwarded")
        else:
            self._forward(self.rfile.read(int(length)))

    def _forward(self, body: bytes) -> None:
        headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
        session = requests.Session()
        session.trust_env = False  # no proxy and no .netrc on the way
        session.verify = str(self.cacert) if self.cacert else True
        try:
            url = self.torchserve + self.path
            with session.post(
                url, data=body, headers=headers, timeout=SECONDS, allow_redirects=False, stream=True
            ) as reply:
                self._send(reply.status_code, _content(reply))
        except requests.RequestException as error:
            self._answer(502, "unreachable", f"{self.torchserve} does not answer ({type(error).__name__})")

    def _is_ours(self) -> bool:
        """Refuses other sites: their pages' requests, and their names made to point here (DNS rebinding)."""
        host, own = self.headers.get("Host", ""), self.connection.getsockname()[1]
        origin = self.headers.get("Origin", f"http://{host}")
        if host in (f"127.0.0.1:{own}", f"localhost:{own}") and origin == f"http://{host}":
            return True
        self._answer(403, "foreign", "only this server's own page, on loopback, is answered")
        return False

    def _answer(self, code: int, type: str, message: str) -> None:
        self._send(code, json.dumps({"code": code, "type": type, "message": message}).encode())

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _content(reply: requests.Response) -> bytes:
    """
    Raises:
        requests.RequestException: it is longer than an answer, or takes too long.
    """
    content, end = bytearray(), time.monotonic() + SECONDS
    for part in reply.iter_content(1 << 16):
        content += part
        if len(content) > LARGEST_ANSWER or time.monotonic() > end:
            raise requests.RequestException
    return bytes(content)


def create(
    port: int = 0, *, model: Path | None = None, torchserve: str = "", cacert: Path | None = None
) -> ThreadingHTTPServer:
    """A server on loopback that is not running yet; port 0 takes a free one.

    Args:
        model: an ONNX file, served as /ITS_NAME.
        torchserve: the one address that is forwarded to; without it, nothing is.
        cacert: a PEM file with the certificate of its https, or of the authority that signed it.
    """
    handler = partial(Handler, model=model and model.resolve(), torchserve=torchserve.rstrip("/"), cacert=cacert)
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="NAME.pixels.onnx, for the page to open with")
    parser.add_argument("--torchserve", default="", metavar="URL", help="e.g. http://127.0.0.1:8080")
    parser.add_argument("--cacert", type=Path, metavar="FILE", help="PEM file with the certificate of its https")
    parser.add_argument("--port", type=int, default=8000, help="of the page (8000)")
    options = parser.parse_args(arguments)
    if options.model and not (options.model.is_file() and options.model.suffix == ".onnx"):
        print(f"serve.py: {options.model}: no such .onnx file; make it with `python -m export RUN`", file=sys.stderr)
        return 2
    if options.torchserve and urlsplit(options.torchserve).scheme not in ("http", "https"):
        print(f"serve.py: --torchserve {options.torchserve}: must begin with http:// or https://", file=sys.stderr)
        return 2
    try:
        if options.cacert:
            ssl.create_default_context(cafile=options.cacert)
    except OSError as error:
        said = error.strerror or error
        print(f"serve.py: {options.cacert}: {said}; name a PEM file with TorchServe's certificate", file=sys.stderr)
        return 2
    try:
        server = create(options.port, model=options.model, torchserve=options.torchserve, cacert=options.cacert)
    except OSError as error:
        print(f"serve.py: port {options.port} cannot be used ({error.strerror}); choose another", file=sys.stderr)
        return 2
    query = f"?model=/{quote(options.model.name)}" if options.model else ""
    with server:
        print(f"http://127.0.0.1:{server.server_port}/{query}\nCtrl-C stops it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
