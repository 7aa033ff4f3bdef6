"""ONNX Runtime on one file: what calibration, the accuracy gate and the checks of an export ask it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when ONNX Runtime is imported, which `open_session` does

THREADS = 1  # as a TorchServe worker runs


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The crop graph of a file as a function from crops uint8 (N, S, S, 3) to probabilities (N, C), on the CPU."""
    return partial(probabilities, open_session(path, threads=THREADS))


def outputs(path: Path, batch: np.ndarray) -> np.ndarray:
    """What a graph of one input and one output gives for the batch, on the CPU."""
    session = open_session(path, threads=THREADS)
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def probabilities(session: Any, crops: np.ndarray) -> np.ndarray:
    """Of a session of a crop graph: crops uint8 (N, S, S, 3) to float32 (N, C)."""
    return session.run(["probabilities"], {"images": crops})[0]


def open_session(path: Path, provider: str = "CPUExecutionProvider", threads: int = 0) -> Any:
    """
    Args:
        threads: 0 is one for each core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=[provider])
