"""What the tests share: one trained and exported run, and one real TorchServe that serves it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

import launcher.process
import train as trainer

# A GPU that happens to be there rounds otherwise. The tests of GPUs: CUDA_VISIBLE_DEVICES=0 pytest -k "gpu or cuda"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from clients.python.classify import Client
from export.package import serving_settings
from export.pipeline import Options, export_run
from export.proof import images, parity
from launcher import Ports, RunningServer, serving
from model import Classifier, load_run
from predictor.pillow_preprocessing import crop, decode
from training.options import TrainOptions
from training.report import write_report

PROJECT = Path(__file__).resolve().parent.parent

settings.register_profile("tests", deadline=None, print_blob=True)  # this machine may stall for seconds
settings.load_profile("tests")

# Where Python is told to keep nothing that it compiles, as some images do, every process that the tests start would
# compile PyTorch and scikit-learn anew, for six seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Processes of as many threads as there are cores spend half of their time waiting for each other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that the tests start

# A shell's background job (`make test &`) ignores Ctrl-C, one of `nohup` a closed terminal. So would the programs that
# the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# The files that take longest come first, so that no process of `make test` ends long after the others; two of the first
# three do not wait for the trained run, which the other one makes meanwhile.
FIRST = (
    *("export", "resume", "fastnet", "client_web", "rollout", "deploy", "readme", "client_batch", "client_cpp"),
    *("distributed", "client_python", "serve_folder", "serve", "handler", "integrity", "faults", "reduced", "runtimes"),
    *("features", "timm", "pixel_rules"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


# Java starts in three quarters of the time where it compiles once and quickly.
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")


@pytest.fixture(scope="session", autouse=True)
def _nothing_takes_its_time() -> Iterator[None]:
    """Which backend is the fastest is luck here anyway, and TorchServe takes four seconds to stop when it is asked to.

    The tests of serve.py, which stops it in a process of its own, do ask it.
    """
    with patch.object(serving_settings, "ROUNDS", 3), patch.object(launcher.process, "STOP_SECONDS", 0):
        yield


@contextlib.contextmanager
def reports(write: Callable[..., None]) -> Iterator[None]:
    """What `train` writes its reports with, for the time of the block."""
    with patch.object(trainer, "write_report", write):
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_reports() -> Iterator[None]:
    """Drawing one takes longer than most trainings here: only some are drawn, in `reports(write_report)`."""
    with reports(lambda folder, *_: folder.mkdir(exist_ok=True)):
        yield


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of this process's own, with what one of the processes of the test run made for all.

    Args:
        make: writes into the folder that it is given, which is named otherwise in the end.
    """
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).exists():
            unfinished = Path(tempfile.mkdtemp(prefix=name, dir=shared))
            make(unfinished)
            unfinished.rename(shared / name)
    return Path(shutil.copytree(shared / name, factory.mktemp(name), dirs_exist_ok=True))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: simplecnn on digits, as the README trains it."""

    def make(folder: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()), reports(write_report):
            trainer.train(TrainOptions(data="digits", arch="simplecnn", out=str(folder / "digits")))

    return made_once(tmp_path_factory, "trained", make) / "digits"


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's export folder, with the archive. Its workers run ONNX Runtime, whatever is fastest on this machine."""

    def make(folder: Path) -> None:
        shutil.copytree(run, folder / "digits", ignore=shutil.ignore_patterns("serve"))
        with contextlib.redirect_stdout(io.StringIO()):
            rows = export_run(folder / "digits", Options(backend="onnx"))
        assert all(row.passed for row in rows)

    made = made_once(tmp_path_factory, "exported", make) / "digits" / "export"
    return Path(shutil.copytree(made, run / "export", dirs_exist_ok=True))


@pytest.fixture(scope="session")
def verify(run: Path, exported: Path) -> Callable[..., list[parity.Row]]:
    """Rows of the named runtimes on the three graphs, on cut-outs of photographs."""
    spec, network = load_run(run)
    classifier = Classifier(network, spec).eval()

    def rows(*names: str) -> list[parity.Row]:
        found = parity.verify(classifier, spec, images.photographs(24), exported, "digits", names)
        return [row for row in found if row.runtime in names]

    return rows


@pytest.fixture(scope="session")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """TorchServe with two models: `digits` as it is exported, and `patient`, whose one worker waits an hour for 32."""
    store = tmp_path_factory.mktemp("store")
    archives = [store / "digits.mar", store / "patient.mar"]
    archives[0].write_bytes((exported / "digits.mar").read_bytes())
    patience = "batchSize: 32\nmaxBatchDelay: 3600000\nresponseTimeout: 60\nminWorkers: 1\nmaxWorkers: 1\n"
    replace_in_archive(archives[0], archives[1], {"model-config.yaml": patience})
    with serving(archives, tmp_path_factory.mktemp("server"), ports=Ports.free()) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Client:
    return Client(server.url, "digits", server.key())


@pytest.fixture(scope="session")
def sample(run: Path) -> bytes:
    """An image file of a seven."""
    return (run / "samples" / "7-0.png").read_bytes()


@pytest.fixture(scope="session")
def label(run: Path, sample: bytes) -> str:
    """The label of `sample`, computed here."""
    return label_of(run, sample)


def label_of(run: Path, body: bytes) -> str:
    """The label that the run's network gives an image in eager PyTorch: every other way must give the same.

    Not the true one: whether a network classifies one image correctly is luck, and may depend on the processor.
    """
    spec, network = load_run(run)
    crops = torch.from_numpy(crop(decode(body), spec.rule)[None].copy())
    with torch.inference_mode():
        probabilities = Classifier(network, spec).eval().classify_crops(crops)
    return spec.labels[int(probabilities.argmax())]


def first_of_five() -> int:
    """The first of five ports in a row that nobody uses: below those that the system gives out by itself."""
    for _ in range(100):
        first = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in vars(Ports.from_first(first)).values():
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no five free ports in a row")


class Clock:
    """Stands for the module `time`: each look at it takes a second."""

    def __init__(self) -> None:
        self._seconds = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self._seconds))


def replace_in_archive(source: Path, target: Path, files: dict[str, str]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, files.get(name, old.read(name)))


@pytest.fixture(scope="session", autouse=True)
def _decoder_may_take_its_time() -> None:
    from predictor import decoder_process

    decoder_process.MOST_BATCH_SECONDS = 60.0  # this machine may stall for seconds
    decoder_process.BATCH_SECONDS = 60.0
