"""Runs an ONNX file with onnxruntime-web in headless Chromium, for `python -m export` to compare with PyTorch.

    python clients/web/verify.py MODEL.onnx IN_DIR OUT_DIR

Reads every IN_DIR/*.npy, writes the outputs as OUT_DIR/*.npy. The last line of output is {"version": …, "seconds": …}:
of the runtime, and spent in its own call. Ends with 2 on wrong usage, with 3 if something is not installed and with 4
if the runtime cannot run the graph; each with a line that says so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

FOLDER = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    *("--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Missing(RuntimeError):
    """Something is not installed. The message is the command that installs it."""


class Handler(SimpleHTTPRequestHandler):
    """This folder, the model, the inputs; takes the outputs."""

    def __init__(self, *args: Any, model: Path, inputs: Path, outputs: Path, **options: Any) -> None:
        self.model, self.inputs, self.outputs = model, inputs, outputs
        super().__init__(*args, directory=str(FOLDER), **options)

    def translate_path(self, path: str) -> str:
        if path == "/model":
            return str(self.model)
        if path.startswith("/inputs/"):
            return str(self.inputs / Path(unquote(path)).name)
        return super().translate_path(path)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        (self.outputs / Path(unquote(self.path)).name).write_bytes(body)
        self.send_response(204)
        self.end_headers()

    def end_headers(self) -> None:
        # An isolated page has a clock of 5 µs; any other's has 100 µs, longer than a small network takes.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def verify(model: Path, inputs: Path, outputs: Path) -> dict[str, Any]:
    """{"version", "seconds"}, or {"error"} with the runtime's own reason.

    Raises:
        Missing: Playwright, Chromium or onnxruntime-web is not here.
    """
    browser_path = find_browser()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise Missing("pip install playwright") from None
    if not (FOLDER / "node_modules" / "onnxruntime-web").is_dir():
        raise Missing("npm ci --prefix clients/web")
    names = sorted(path.name for path in inputs.glob("*.npy"))
    with (
        _serving(partial(Handler, model=model, inputs=inputs, outputs=outputs)) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=browser_path, args=browser_options())
        try:
            page = browser.new_page()
            page.goto(f"{url}/verify.html")
            return page.evaluate("async names => (await import('/verify.mjs')).verify(names)", names)
        finally:
            browser.close()


def find_browser() -> str:
    """Raises Missing where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise Missing("apt-get install chromium")
    return found


def browser_options() -> list[str]:
    """Without its own traffic, and without its sandbox where it would refuse to start: as root."""
    return [*OPTIONS, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]


@contextmanager
def _serving(handler: Any) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3:
        print("usage: python verify.py MODEL.onnx IN_DIR OUT_DIR", file=sys.stderr)
        return 2
    model, inputs, outputs = map(Path, arguments)
    for path, there in ((model, model.is_file()), (inputs, inputs.is_dir()), (outputs, outputs.is_dir())):
        if not there:
            print(f"{path}: no such file or folder", file=sys.stderr)
            return 2
    try:
        report = verify(model, inputs, outputs)
    except Missing as error:
        print(error, file=sys.stderr)
        return 3
    if "error" in report:
        print(" ".join(report["error"].split()), file=sys.stderr)
        return 4
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
