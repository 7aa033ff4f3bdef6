"""Our archive against stock TorchServe, LitServe and BentoML: same models, images, machine and load, answers checked.

    make bench-serving
    python -m benchmarks.serving --peers .venv-peers/bin/python
    python -m benchmarks.serving --only small,latency --rounds 1

All servers are started before a comparison and rest, stopped, while another one is measured; they take turns, and the
figures are medians of the rounds. The load comes from the same machine. Every answer is compared with the one that the
image gets alone, and that with the crop graph in this process; only right answers count. Peers run the same ONNX crop
graph with Pillow before it (benchmarks/peers), with batching on, once for each of two numbers of workers. Writes
benchmarks/results/serving.json and serving.png.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from PIL import Image

from benchmarks import servers
from benchmarks.load import TOLERANCE, Request, ask, load
from benchmarks.machine import describe, save
from benchmarks.servers import Running
from export.__main__ import export_run
from export.graphs import exported_program, onnx, quantization, torchscript
from export.package import serving_settings
from launcher import Ports, serving
from model import Classifier, ModelSpec, registry
from predictor import backends
from predictor.files import write_text
from predictor.pillow_preprocessing import crop, decode
from train import train
from training.config import TrainConfig

SMALL, LARGE = "small", "large"  # names of the models
CONNECTIONS = (1, 16, 64)  # of the comparison of the small model
LARGE_CONNECTIONS = 16
SEVERAL = 32  # images of one request
DRAINING = 1.0  # seconds after an answer, in which the other worker too ends its batch
WAKING = 1.0  # seconds of load before each that counts: BentoML learns from the clock how long to wait for a batch
GROWTH = {
    "connections": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "image side, px": (32, 128, 256, 512, 1024),
    "batchSize": (1, 4, 16, 32, 64),
    "workers": (1, 2, 4),
}
PEER_WORKERS = (1, 2)

Starts = dict[str, Callable[[], contextlib.AbstractContextManager[Running]]]


# Models and images


def make_small(folder: Path) -> Path:
    """An export of simplecnn, trained on the digits; the large image sizes of the growth part resize to its 32 px."""
    run = folder / SMALL
    with contextlib.redirect_stdout(io.StringIO()):
        train(TrainConfig(data="digits", arch="simplecnn", out=str(run)))
        export_run(run, name=SMALL)
    (run / "export" / "spec.json").write_text((run / "spec.json").read_text())
    return run / "export"


def make_large(folder: Path) -> Path:
    """ResNet-18 at 224 px in fp32 and int8. Its weights are random: nothing here is about accuracy."""
    torch.manual_seed(0)
    mean, std = registry.IMAGENET_MEAN, registry.IMAGENET_STD
    labels = tuple(f"class {i}" for i in range(10))
    spec = ModelSpec(arch="resnet18", labels=labels, size=224, resize=256, mean=mean, std=std)
    classifier = Classifier(registry.build("resnet18", len(labels), spec.size), spec).eval()
    export = folder / LARGE
    export.mkdir()
    torchscript.save(classifier, spec, export / f"{LARGE}.pt")
    onnx.save(exported_program.trace(classifier), spec, export, LARGE)
    crops = np.stack([crop(decode(body), spec.size, spec.resize) for body in photographs(8)])
    quantization.make_int8(spec, export / f"{LARGE}.onnx", crops, export, LARGE)
    spec.save(export / "spec.json")
    write_text(export / "index_to_name.json", json.dumps({str(i): label for i, label in enumerate(labels)}))
    return export


def digits(side: int = 32, count: int = 8) -> list[bytes]:
    """JPEG files of digits, about 1 kB each at 32 px."""
    from sklearn.datasets import load_digits

    images = load_digits().images[:count] / 16 * 255
    return [_jpeg(Image.fromarray(image.astype(np.uint8)).convert("RGB").resize((side, side)), 90) for image in images]


def photographs(count: int) -> list[bytes]:
    """JPEG files of 500×375 px and about 45 kB, cut out of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(image) for image in load_sample_images().images]
    cuts = (images[i % 2].crop((x, y, x + 500, y + 375)) for i in range(count) for x, y in [(17 * i % 140, 6 * i % 52)])
    return [next(body for quality in range(95, 40, -1) if len(body := _jpeg(cut, quality)) <= 46_000) for cut in cuts]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


class InProcess:
    """The work that no server can avoid: decode, crop, forward pass, in this process, on one thread."""

    def __init__(self, export: Path, name: str, backend: str) -> None:
        self.spec = json.loads((export / "spec.json").read_text())
        self.run = backends.load(backend, export, name)

    def classify(self, bodies: Sequence[bytes]) -> np.ndarray:
        """Probabilities float32 (N, C)."""
        return self.run(np.stack([crop(decode(body), self.spec["size"], self.spec["resize"]) for body in bodies]))

    def best(self, bodies: Sequence[bytes]) -> list[tuple[str, float]]:
        rows = self.classify(bodies)
        return [(self.spec["labels"][int(row.argmax())], float(row.max())) for row in rows]


def ceiling(export: Path, name: str, backend: str, bodies: list[bytes], batch: int, seconds: float) -> float:
    """Images a second of one such process for each core, and nothing else on the machine."""
    context = multiprocessing.get_context("spawn")
    count = os.cpu_count() or 1
    barrier, results = context.Barrier(count), context.Queue()
    given = (export, name, backend, (bodies * batch)[:batch], seconds, barrier, results)
    workers = [context.Process(target=_work, args=given) for _ in range(count)]
    for worker in workers:
        worker.start()
    rates = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    return float(sum(rates))


def _work(
    export: Path, name: str, backend: str, bodies: list[bytes], seconds: float, barrier: Any, results: Any
) -> None:
    process = InProcess(export, name, backend)
    process.classify(bodies)
    barrier.wait(60)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        process.classify(bodies)
        count += len(bodies)
    results.put(count / (time.perf_counter() - started))


# Comparisons


def known(server: Running, bodies: Sequence[bytes], expected: Sequence[tuple[str, float]]) -> list[Request]:
    """The requests with their answers, which are those of the same graph in this process."""
    found = []
    with server.awake():
        for body, (label, value) in zip(bodies, expected, strict=True):
            request = server.body(body)
            best = ask(server.url, server.key, request)
            if len(best) != 1 or best[0][0] != label or abs(best[0][1] - value) > TOLERANCE:
                raise RuntimeError(f"{server.url} answers {best}, the graph in this process {label}: {value:.4f}")
            found.append(replace(request, best=best))
    return found


def compare(
    starts: Starts,
    requests_of: Callable[[str, Running], list[Request]],
    connections: Sequence[int],
    rounds: int,
    seconds: float,
    images: int = 1,
    warm_up: float | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Each server under each load, by turns; medians.

    Args:
        images: of one request.
        warm_up: seconds of load for each server before the first turn; by default as many as of a turn.
        tolerance: of a probability.
    """
    results: dict[str, dict[int, list[dict[str, float]]]] = {}
    with ExitStack() as stack:
        running = {label: stack.enter_context(start()) for label, start in starts.items()}
        wanted = {label: requests_of(label, server) for label, server in running.items()}
        for label, server in running.items():
            with server.awake():  # Java and TorchScript optimise
                load(server.url, server.key, wanted[label], max(connections), warm_up or seconds)
                _drain(server, wanted[label][0])
        for _ in range(rounds):
            for label, server in running.items():
                for number in connections:
                    found = _measure(server, wanted[label], number, seconds, images, tolerance)
                    results.setdefault(label, {}).setdefault(number, []).append(found)
        memory = {label: server.mebibytes() for label, server in running.items()}
        ready = {label: server.ready_seconds for label, server in running.items()}
    return {
        label: {
            "loads": {str(number): _medians(found) for number, found in by_number.items()},
            "mebibytes": memory[label],
            "ready_seconds": ready[label],
        }
        for label, by_number in results.items()
    }


def _measure(
    server: Running, wanted: list[Request], number: int, seconds: float, images: int, tolerance: float
) -> dict[str, float]:
    with server.awake():
        load(server.url, server.key, wanted, number, WAKING)
        _drain(server, wanted[0])
        before = server.cpu_seconds()
        found = load(server.url, server.key, wanted, number, seconds, tolerance)
        spent = server.cpu_seconds() - before
        _drain(server, wanted[0])
    if found.wrong:
        print(f"    {found.wrong} wrong, e.g. {found.said[:150]}")
    rate = found.requests_per_second * images
    return {
        "images_per_second": rate,
        "p50_ms": found.p50,
        "p99_ms": found.p99,
        "wrong": found.wrong,
        "failed": found.failed,
        "cpu_seconds_per_1000": 1000 * spent / max(rate * seconds, 1),
    }


def _drain(server: Running, request: Request) -> None:
    """Waits for what wrk left behind: it would fill a queue of 100, and a server that rests would time out on it, and
    spend the beginning of its next turn on a new worker."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            ask(server.url, server.key, request)
            time.sleep(DRAINING)
            return
        time.sleep(0.2)


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    totals = ("wrong", "failed")
    return {key: (sum if key in totals else statistics.median)(row[key] for row in rows) for key in rows[0]}


def peers_of(export: Path, folder: Path, probe: bytes, python: Path | None) -> Starts:
    if python is None:
        return {}
    found: Starts = {}
    for workers in PEER_WORKERS:
        for label, start in (("LitServe", servers.litserve), ("BentoML", servers.bentoml)):
            named = f"{label}, {workers} worker{'s' * (workers > 1)}"
            found[named] = partial(start, export, python, folder / named.replace(" ", ""), probe, workers)
    return found


STOCK = str(servers.PEERS / "stock_handler.py")


def part_small(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    bodies = digits()
    expected = InProcess(export, SMALL, "onnx").best(bodies)
    starts: Starts = {
        "ours": lambda: servers.ours(export, SMALL, folder / "ours", bodies[0], backend="onnx"),
        "stock TorchServe": lambda: servers.stock(export, SMALL, folder / "stock", bodies[0], STOCK),
        **peers_of(export, folder, bodies[0], options.peers),
    }
    found = compare(starts, lambda _, s: known(s, bodies, expected), CONNECTIONS, options.rounds, options.seconds)
    return {"servers": found, "ceiling": _ceilings(export, SMALL, "onnx", bodies, (1, 32), options.seconds)}


def part_several(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    bodies = digits(count=SEVERAL)
    expected = tuple(InProcess(export, SMALL, "onnx").best(bodies))

    def requests_of(label: str, _: Running) -> list[Request]:
        if label == "multipart":
            return [replace(servers.multipart({f"{i:02}": b for i, b in enumerate(bodies)}), best=expected)]
        body = json.dumps({"instances": [{"b64": b64encode(body).decode()} for body in bodies]}).encode()
        return [Request(body, "application/json", expected)]

    found: dict[str, Any] = {}
    for label in ("multipart", "instances"):
        starts: Starts = {label: lambda: servers.ours(export, SMALL, folder / "ours", bodies[0], backend="onnx")}
        found |= compare(starts, requests_of, (8,), options.rounds, options.seconds, images=SEVERAL)
    return {"servers": found, "ceiling": _ceilings(export, SMALL, "onnx", bodies, (32,), options.seconds)}


def part_large(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    bodies = photographs(8)
    expected = {name: InProcess(export, LARGE, name).best(bodies) for name in ("onnx", "onnx-int8")}
    if len({f"{value:.2f}" for _, value in expected["onnx"]}) < 2:
        raise RuntimeError("the images all get the same answer: nothing would be checked")
    rows = {row.backend: row for row in serving_settings.measure(export, LARGE, ModelSpec.load(export))}

    def our(label: str, name: str) -> contextlib.AbstractContextManager[Running]:
        size = serving_settings.batch_size(rows[name])  # as export would set it
        return servers.ours(export, LARGE, folder / label, bodies[0], backend=name, batchSize=size)

    starts: Starts = {
        "ours, fp32": partial(our, "fp32", "onnx"),
        "ours, int8": partial(our, "int8", "onnx-int8"),
        "stock TorchServe": lambda: servers.stock(export, LARGE, folder / "stock", bodies[0], STOCK),
        **peers_of(export, folder, bodies[0], options.peers),
    }

    def requests_of(label: str, server: Running) -> list[Request]:
        return known(server, bodies, expected["onnx-int8" if label == "ours, int8" else "onnx"])

    # Java compiles for 2,000 requests, which are seconds of the small model and half a minute of this one.
    seconds, warm_up = 2 * options.seconds, 6 * options.seconds
    found = compare(starts, requests_of, (LARGE_CONNECTIONS,), options.rounds, seconds, warm_up=warm_up)
    limits = {name: _ceilings(export, LARGE, name, bodies, (1, 8), 2 * options.seconds) for name in expected}
    return {"servers": found, "ceiling": limits}


def part_latency(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a lone client waits beyond the work itself."""
    bodies = digits()
    process = InProcess(export, SMALL, "onnx")
    alone = []
    for turn in range(600):
        started = time.perf_counter()
        process.classify([bodies[turn % len(bodies)]])
        alone.append(1000 * (time.perf_counter() - started))
    return {"in_process_ms": statistics.median(alone[100:])}


def part_start(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """From starting TorchServe to its first answer, and the first requests beside the hundredth; one by one."""
    bodies, ready, first, hundredth = digits(), [], [], []
    for turn in range(max(3, options.rounds)):
        with servers.ours(export, SMALL, folder / f"start{turn}", bodies[0], backend="onnx") as server, server.awake():
            ready.append(server.ready_seconds)
    archive = folder / "start0" / f"{SMALL}.mar"
    for turn in range(max(3, options.rounds)):
        with serving([archive], folder / f"first{turn}", ports=Ports.free()) as running, requests.Session() as session:
            session.headers["Authorization"] = f"Bearer {running.key()}"
            times = []
            for _ in range(110):
                started = time.perf_counter()
                session.post(f"{running.url}/predictions/{SMALL}", data=bodies[0], timeout=60).raise_for_status()
                times.append(1000 * (time.perf_counter() - started))
            first.append(times[0])
            hundredth.append(statistics.median(times[90:]))
    return {"ready_seconds": ready, "first_ms": first, "hundredth_ms": hundredth}


def part_growth(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Our server with the small model, one thing changed at a time; the others: 64 connections, 32 px, as shipped."""
    process, found = InProcess(export, SMALL, "onnx"), {}

    def one(bodies: list[bytes], connections: Sequence[int], **settings: object) -> dict[str, Any]:
        expected = process.best(bodies)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            place = Path(temporary)
            starts: Starts = {"ours": lambda: servers.ours(export, SMALL, place, bodies[0], backend="onnx", **settings)}
            runs = compare(starts, lambda _, s: known(s, bodies, expected), connections, 1, options.seconds)
        return dict(runs["ours"]["loads"])

    found["connections"] = one(digits(), GROWTH["connections"])
    found["image side, px"] = {str(side): one(digits(side), (64,))["64"] for side in GROWTH["image side, px"]}
    found["batchSize"] = {str(size): one(digits(), (64,), batchSize=size)["64"] for size in GROWTH["batchSize"]}
    found["workers"] = {
        str(count): one(digits(), (64,), minWorkers=count, maxWorkers=count)["64"] for count in GROWTH["workers"]
    }
    return found


def part_gpu(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Workers on the GPU, where TorchServe finds one: ours, stock TorchServe, and the bare forward pass."""
    gpu = 0 if torch.cuda.is_available() else None
    bodies = decided(photographs(8), InProcess(export, LARGE, "torchscript"))
    starts: Starts = {
        "ours": lambda: servers.ours(export, LARGE, folder / "ours", bodies[0], backend="torchscript"),
        "stock TorchServe": lambda: servers.stock(export, LARGE, folder / "stock", bodies[0], STOCK),
    }

    # Half precision, and other kernels for other batches: a server's own answers are the known ones, roughly.
    def requests_of(_: str, server: Running) -> list[Request]:
        with server.awake():
            sent = [server.body(body) for body in bodies]
            return [replace(request, best=ask(server.url, server.key, request)) for request in sent]

    connections = (1, 16, 64, 128) if gpu == 0 else (1, 2)
    tolerance = backends.HALF_TOLERANCE
    found = compare(starts, requests_of, connections, options.rounds, options.seconds, tolerance=tolerance)
    classify, forward = backends.load("torchscript", export, LARGE, gpu=gpu), {}
    for batch in backends.GPU_BATCHES:
        crops = np.zeros((batch, 224, 224, 3), np.uint8)
        times = []
        for _ in range(8):
            started = time.perf_counter()
            classify(crops)
            times.append(time.perf_counter() - started)
        forward[str(batch)] = batch / statistics.median(times[3:])
    device = torch.cuda.get_device_name(0) if gpu == 0 else "none: this ran on the CPU"
    return {"device": device, "servers": found, "ceiling": forward}


def decided(bodies: list[bytes], process: InProcess) -> list[bytes]:
    """Those whose best label leads by more than what half precision may be off."""
    rows = np.sort(process.classify(bodies), axis=1)
    found = [body for body, row in zip(bodies, rows, strict=True) if row[-1] - row[-2] > 2 * backends.HALF_TOLERANCE]
    if not found:
        raise RuntimeError("no image has a best label that half precision could not change: nothing can be checked")
    return found


def _ceilings(
    export: Path, name: str, backend: str, bodies: list[bytes], batches: Sequence[int], seconds: float
) -> dict[str, float]:
    return {str(batch): ceiling(export, name, backend, bodies, batch, seconds) for batch in batches}


# The report


def table(results: Mapping[str, Any]) -> str:
    lines = []
    for part in ("small", "several", "large", "gpu"):
        if part not in results:
            continue
        lines += ["", f"{part}: images/s, p50 and p99 in ms, CPU s per 1,000 images; MiB (PSS)"]
        for label, found in results[part]["servers"].items():
            loads = "   ".join(
                f"{number:>3} conn. {row['images_per_second']:7.0f}/s {row['p50_ms']:7.2f} {row['p99_ms']:7.2f} "
                f"{row['cpu_seconds_per_1000']:6.2f}" + (f" ({row['wrong']:.0f} WRONG)" if row["wrong"] else "")
                for number, row in found["loads"].items()
            )
            lines.append(f"  {label:22} {loads}   {found['mebibytes']['pss']:6.0f} MiB")
        lines.append(f"  ceiling in process, by batch: {json.dumps(results[part]['ceiling'])}")
    for part in ("latency", "start"):
        if part in results:
            lines += ["", f"{part}: {json.dumps(results[part])}"]
    for name, rows in results.get("growth", {}).items():
        lines += ["", f"ours, by {name}:"]
        lines += [
            f"  {key:>5} {row['images_per_second']:7.0f}/s  p99 {row['p99_ms']:8.2f} ms" for key, row in rows.items()
        ]
    return "\n".join(lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Throughput and p99 against what grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 6.5), sharey="row", layout="constrained")
    for column, (name, rows) in enumerate(results["growth"].items()):
        places, values = [int(key) for key in rows], list(rows.values())
        for axis, key in zip(axes[:, column], ("images_per_second", "p99_ms"), strict=True):
            axis.plot(places, [row[key] for row in values], "o-", color="#1f5fa8", label="ours")
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, [str(place) for place in places])
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
        if name == "connections" and "small" in results:
            _plot_peers(axes[:, column], results["small"]["servers"])
    axes[0, 0].set_ylabel("images/s")
    axes[1, 0].set_ylabel("p99, ms")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_yscale("log")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Serving simplecnn at 32 px; where not said otherwise 64 connections, 1 kB JPEG files, as shipped")
    figure.savefig(path, dpi=80)


def _plot_peers(axes: Any, found: Mapping[str, Any]) -> None:
    colours = iter(("#8a8a8a", "#c0562b", "#e0a072", "#4d8b57", "#9cc5a1"))
    for label, server in sorted(found.items(), key=lambda item: item[0] != "stock TorchServe"):
        if label == "ours":
            continue
        style = {"color": next(colours), "label": label, "ms": 4}
        places = [int(number) for number in server["loads"]]
        for axis, key in zip(axes, ("images_per_second", "p99_ms"), strict=True):
            axis.plot(places, [row[key] for row in server["loads"].values()], "s--", **style)


PARTS = {
    "small": part_small,
    "several": part_several,
    "large": part_large,
    "latency": part_latency,
    "start": part_start,
    "growth": part_growth,
    "gpu": part_gpu,
}
ALL = [part for part in PARTS if part != "gpu"]  # which runs only if it is named


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="python of the environment of benchmarks/peers/requirements.lock")
    parser.add_argument("--only", default=",".join(ALL), help=f"parts, of {','.join(PARTS)} (all but gpu)")
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison (3)")
    parser.add_argument("--seconds", type=float, default=5, help="of each load; twice that for the large model (5)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (benchmarks/results)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left, resting
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"--only: no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    options.peers = options.peers and options.peers.absolute()
    results: dict[str, Any] = {"machine": _machine(options.peers)}
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "serving.json"
    results = results | _earlier(kept, results["machine"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        of_large = {"large", "gpu"}
        small = make_small(folder) if set(wanted) - of_large else folder
        large = make_large(folder) if set(wanted) & of_large else folder
        for part in wanted:
            print(f"{part} …", flush=True)
            place = folder / f"part-{part}"
            place.mkdir()
            results[part] = PARTS[part](large if part in of_large else small, place, options)
            save(kept, results)  # at once: a run takes half an hour
            print(table({part: results[part]}), flush=True)
    print(json.dumps(results["machine"]))
    if "growth" in wanted:
        plot(results, options.out / "serving.png")
    return 0


def _earlier(path: Path, machine: dict[str, str]) -> dict[str, Any]:
    """The parts that the file holds already, if they are of the same machine and versions, as far as both are known."""
    found = json.loads(path.read_text()) if path.exists() else {}
    known = found.get("machine", {})
    if any(known[key] != machine[key] for key in known.keys() & machine.keys()):
        return {}
    return found | {"machine": known | machine} if known else {}


def _machine(peers: Path | None) -> dict[str, str]:
    found = describe("torchserve", "torch", "onnxruntime", "pillow")
    if peers:
        code = "import importlib.metadata as m; print(*(m.version(p) for p in ('litserve', 'bentoml', 'onnxruntime')))"
        said = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        found |= dict(zip(("litserve", "bentoml", "onnxruntime of the peers"), said, strict=True))
    return found


if __name__ == "__main__":
    sys.exit(main())
