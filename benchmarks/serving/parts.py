"""The parts of the comparison: one question each."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch

from benchmarks import servers
from benchmarks.load import Request, ask
from benchmarks.servers import ServerUnderTest
from benchmarks.serving.comparison import Starts, compare, known
from benchmarks.serving.in_process import InProcess, ceilings
from benchmarks.serving.workload import LARGE, SMALL, digits, photographs
from export.package import serving_settings
from launcher import Ports, serving
from model import ModelSpec
from predictor import backends

CONNECTIONS = (1, 16, 64)  # of the comparison of the small model
LARGE_CONNECTIONS = 16
SEVERAL = 32  # images of one request
GROWTH = {
    "connections": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "image side, px": (32, 128, 256, 512, 1024),
    "batchSize": (1, 4, 16, 32, 64),
    "workers": (1, 2, 4),
}
PEER_WORKERS = (1, 2)
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
    return {"servers": found, "ceiling": ceilings(export, SMALL, "onnx", bodies, (1, 32), options.seconds)}


def part_several(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    bodies = digits(count=SEVERAL)
    expected = tuple(InProcess(export, SMALL, "onnx").best(bodies))

    def requests_of(label: str, _: ServerUnderTest) -> list[Request]:
        if label == "multipart":
            return [replace(servers.multipart({f"{i:02}": b for i, b in enumerate(bodies)}), best=expected)]
        body = json.dumps({"instances": [{"b64": b64encode(body).decode()} for body in bodies]}).encode()
        return [Request(body, "application/json", expected)]

    found: dict[str, Any] = {}
    for label in ("multipart", "instances"):
        starts: Starts = {label: lambda: servers.ours(export, SMALL, folder / "ours", bodies[0], backend="onnx")}
        found |= compare(starts, requests_of, (8,), options.rounds, options.seconds, images=SEVERAL)
    return {"servers": found, "ceiling": ceilings(export, SMALL, "onnx", bodies, (32,), options.seconds)}


def part_large(export: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    bodies = photographs(8)
    expected = {name: InProcess(export, LARGE, name).best(bodies) for name in ("onnx", "onnx-int8")}
    if len({f"{value:.2f}" for _, value in expected["onnx"]}) < 2:
        raise RuntimeError("the images all get the same prediction: nothing would be checked")
    rows = {row.backend: row for row in serving_settings.measure(export, LARGE, ModelSpec.load(export))}

    def our(label: str, name: str) -> contextlib.AbstractContextManager[ServerUnderTest]:
        size = serving_settings.batch_size(rows[name])  # as export would set it
        return servers.ours(export, LARGE, folder / label, bodies[0], backend=name, batchSize=size)

    starts: Starts = {
        "ours, fp32": partial(our, "fp32", "onnx"),
        "ours, int8": partial(our, "int8", "onnx-int8"),
        "stock TorchServe": lambda: servers.stock(export, LARGE, folder / "stock", bodies[0], STOCK),
        **peers_of(export, folder, bodies[0], options.peers),
    }

    def requests_of(label: str, server: ServerUnderTest) -> list[Request]:
        return known(server, bodies, expected["onnx-int8" if label == "ours, int8" else "onnx"])

    # Java compiles for 2,000 requests, which are seconds of the small model and half a minute of this one.
    seconds, warm_up = 2 * options.seconds, 6 * options.seconds
    found = compare(starts, requests_of, (LARGE_CONNECTIONS,), options.rounds, seconds, warm_up=warm_up)
    limits = {name: ceilings(export, LARGE, name, bodies, (1, 8), 2 * options.seconds) for name in expected}
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
    """From starting TorchServe to its first response, and the first requests beside the hundredth; one by one."""
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
            work = Path(temporary)
            starts: Starts = {"ours": lambda: servers.ours(export, SMALL, work, bodies[0], backend="onnx", **settings)}
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

    # Half precision, and other kernels for other batches: a server's own predictions are the known ones, roughly.
    def requests_of(_: str, server: ServerUnderTest) -> list[Request]:
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


def peers_of(export: Path, folder: Path, probe: bytes, python: Path | None) -> Starts:
    if python is None:
        return {}
    found: Starts = {}
    for workers in PEER_WORKERS:
        for label, start in (("LitServe", servers.litserve), ("BentoML", servers.bentoml)):
            named = f"{label}, {workers} worker{'s' * (workers > 1)}"
            found[named] = partial(start, export, python, folder / named.replace(" ", ""), probe, workers)
    return found


PARTS = {
    "small": part_small,
    "several": part_several,
    "large": part_large,
    "latency": part_latency,
    "start": part_start,
    "growth": part_growth,
    "gpu": part_gpu,
}
