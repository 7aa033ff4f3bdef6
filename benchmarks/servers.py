"""The servers that `benchmarks.serving` compares: ours, stock TorchServe, LitServe and BentoML, with the same model.

All are started once and rest, stopped by SIGSTOP, while another one is measured.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

from benchmarks.load import Request, ask
from launcher import Ports, serving, stop
from predictor.backends import FILES

PEERS = Path(__file__).parent / "peers"
READY_SECONDS = 120


@dataclass(frozen=True)
class ServerUnderTest:
    """A server under test."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    body: Callable[[bytes], Request]  # of one image file, as this server wants it
    ready_seconds: float  # from the start of the process to the first response

    @contextmanager
    def awake(self) -> Iterator[None]:
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def mebibytes(self) -> dict[str, float]:
        """Resident memory of all its processes: `pss` counts what they share once, `rss` for each of them."""
        found = [process.memory_full_info() for process in self.family()]
        return {"pss": sum(one.pss for one in found) / 2**20, "rss": sum(one.rss for one in found) / 2**20}

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.family())


def raw(body: bytes) -> Request:
    return Request(body, "image/jpeg")


def multipart(fields: dict[str, bytes]) -> Request:
    boundary = "5f0c1b7e9d"
    parts = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n".encode()
        + body
        + b"\r\n"
        for name, body in fields.items()
    )
    return Request(b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}")


@contextmanager
def ours(export: Path, name: str, folder: Path, probe: bytes, **settings: object) -> Iterator[ServerUnderTest]:
    """This project's archive; `settings` replace lines of its model-config.yaml."""
    files = [export / f"{name}.pt", export / FILES[str(settings.get("backend", "onnx"))].format(name)]
    archive = _archive(export, name, folder, handler="handler/classifier_handler.py", files=files, settings=settings)
    with _torchserve(archive, folder, probe) as running:
        yield running


@contextmanager
def stock(export: Path, name: str, folder: Path, probe: bytes, handler: str) -> Iterator[ServerUnderTest]:
    """TorchServe with its defaults. `handler`: image_classifier, or a file."""
    archive = _archive(export, name, folder, handler=handler, files=[export / f"{name}.pt"], settings=None)
    defaults = folder / "defaults.properties"
    defaults.write_text("")
    with _torchserve(archive, folder, probe, config=defaults, logging=None) as running:
        yield running


@contextmanager
def litserve(export: Path, python: Path, folder: Path, probe: bytes, workers: int) -> Iterator[ServerUnderTest]:
    port = Ports.free().inference
    line = [str(python), "litserve_app.py", str(port), str(workers)]
    with _peer(line, export, folder, f"http://127.0.0.1:{port}/predict", "request", probe, workers) as running:
        yield running


@contextmanager
def bentoml(export: Path, python: Path, folder: Path, probe: bytes, workers: int) -> Iterator[ServerUnderTest]:
    port = Ports.free().inference
    command = str(python.with_name("bentoml"))
    line = [command, "serve", "bentoml_app:Classifier", "--host", "127.0.0.1", "--port", str(port)]
    with _peer(line, export, folder, f"http://127.0.0.1:{port}/classify", "images", probe, workers) as running:
        yield running


@contextmanager
def _torchserve(
    archive: Path, folder: Path, probe: bytes, config: Path | None = None, logging: Path | None = None
) -> Iterator[ServerUnderTest]:
    started = time.perf_counter()
    given = {} if config is None else {"config": config, "logging": logging}
    with serving([archive], folder, ports=Ports.free(), **given) as server:  # type: ignore[arg-type]
        url = f"{server.url}/predictions/{archive.stem}"
        ask(url, server.key(), raw(probe))
        yield from _resting(server.process, url, server.key(), raw, time.perf_counter() - started)


@contextmanager
def _peer(
    line: Sequence[str], export: Path, folder: Path, url: str, field: str, probe: bytes, workers: int
) -> Iterator[ServerUnderTest]:
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"EXPORT": str(export.resolve()), "WORKERS": str(workers), "BENTOML_DO_NOT_TRACK": "True"}
    variables |= {"BENTOML_HOME": str(folder / "bentoml"), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            line,
            cwd=PEERS,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while True:
            try:
                ask(url, "", multipart({field: probe}))
                break
            except requests.RequestException as error:
                if process.poll() is not None or time.perf_counter() - started > READY_SECONDS:
                    raise RuntimeError(f"{' '.join(line)}: no response ({error}); see {folder / 'log'}") from None
                time.sleep(0.05)
        seconds = time.perf_counter() - started
        yield from _resting(process, url, "", lambda body: multipart({field: body}), seconds)
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        stop(process)


def _resting(
    process: subprocess.Popen[bytes], url: str, key: str, body: Callable[[bytes], Request], seconds: float
) -> Iterator[ServerUnderTest]:
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield ServerUnderTest(process, url, key, body, seconds)
    finally:
        os.killpg(process.pid, signal.SIGCONT)


def _archive(
    export: Path, name: str, folder: Path, *, handler: str, files: list[Path], settings: dict[str, object] | None
) -> Path:
    """NAME.mar in `folder`, made by torch-model-archiver."""
    from export.package.archive import HANDLER, PROJECT, stage_code

    folder.mkdir(parents=True, exist_ok=True)
    serialized, *extra = dict.fromkeys(files)
    extra += [export / "spec.json", export / "index_to_name.json"]
    extra += [PEERS / "pixels.py"] if settings is None else []
    line = ["--model-name", name, "--version", "1.0", "--handler", handler, "--serialized-file", str(serialized)]
    if settings is not None:
        stage_code(folder / "archive")
        extra.append(folder / "archive")
        config = folder / "model-config.yaml"
        old = (HANDLER / "model-config.yaml").read_text().splitlines()
        kept = [text for text in old if text.split(":")[0] not in settings]
        config.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in settings.items())]) + "\n")
        line += ["--config-file", str(config)]
    command = [str(Path(sys.executable).with_name("torch-model-archiver")), *line, "--force"]
    command += ["--extra-files", ",".join(map(str, extra)), "--export-path", str(folder)]
    temporary = {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    subprocess.run(command, cwd=PROJECT, env={**os.environ, **temporary}, check=True, capture_output=True)
    return folder / f"{name}.mar"
