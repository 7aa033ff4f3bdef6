"""The work that no server can avoid, in processes of our own: what is predicted, and the ceiling of throughput."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from predictor import backends
from predictor.pillow_preprocessing import crop, decode
from predictor.spec import ModelSpec


class InProcess:
    """The work that no server can avoid: decode, crop, forward pass, in this process, on one thread."""

    def __init__(self, export: Path, name: str, backend: str) -> None:
        self.spec = ModelSpec.load(export)
        self.run = backends.load(backend, export, name)

    def classify(self, bodies: Sequence[bytes]) -> np.ndarray:
        """Probabilities float32 (N, C)."""
        return self.run(np.stack([crop(decode(body), self.spec.rule) for body in bodies]))

    def best(self, bodies: Sequence[bytes]) -> list[tuple[str, float]]:
        rows = self.classify(bodies)
        return [(self.spec.labels[int(row.argmax())], float(row.max())) for row in rows]


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


def ceilings(
    export: Path, name: str, backend: str, bodies: list[bytes], batches: Sequence[int], seconds: float
) -> dict[str, float]:
    return {str(batch): ceiling(export, name, backend, bodies, batch, seconds) for batch in batches}


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
