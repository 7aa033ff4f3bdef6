"""The programs that load what was exported, each as a function from batches to answers.

To add one: write a function of the type `Runtime` and name it in `RUNTIMES`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # in TF32, the default of cuDNN and TensorRT, factors have 10 bits
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it reports to its maker by default since 1.29: read at import

import numpy as np
import onnxruntime
import torch

from export.graphs import exported_program, torchscript
from export.graphs.exported_program import GRAPHS

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
SECONDS = 900  # for a program of another language to answer all batches

Batch = np.ndarray  # one of the contract's inputs: float32 (N, 3, S, S) or uint8 (N, H, W, 3)


@dataclass(frozen=True)
class Answers:
    outputs: list[np.ndarray]  # float32 (N, C), one for each batch
    seconds: float  # spent in the runtime's own call, over all batches
    version: str


class Missing(RuntimeError):
    """The runtime is not on this machine. The message is what installs it."""


class Crashed(RuntimeError):
    """A program of another language ended as it should not."""


# Of the folder, the model's name, the graph, and the batches. Whatever it raises but `Missing` and `Crashed` means that
# it cannot run the graph, an operator that it lacks for example.
Runtime = Callable[[Path, str, str, list[Batch]], Answers]


def run_torchscript(folder: Path, name: str, graph: str, batches: list[Batch], device: str = "cpu") -> Answers:
    module, _ = torchscript.load(folder / f"{name}.pt", device)
    part: Any = {"network": module.network, "crops": module.classify_crops, "pixels": module}[graph]
    return _with_torch(part, batches, torch.__version__, device)


def run_exported_program(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    module, _ = exported_program.load(folder / f"{name}{GRAPHS[graph]}.pt2")
    return _with_torch(module, batches, torch.__version__)


def run_onnxruntime(
    folder: Path, name: str, graph: str, batches: list[Batch], provider: str = "CPUExecutionProvider"
) -> Answers:
    if provider not in onnxruntime.get_available_providers():
        raise Missing("on a machine with a GPU: pip install onnxruntime-gpu (and tensorrt), then benchmarks/gpu.sh")
    session = onnxruntime.InferenceSession(_onnx(folder, name, graph), providers=[provider])
    if session.get_providers()[0] != provider:
        raise Missing(f"ONNX Runtime fell back to {session.get_providers()[0]}; install what {provider} needs")
    (input,) = session.get_inputs()
    return _timed(lambda batch: session.run(None, {input.name: batch})[0], batches, onnxruntime.__version__)


def run_openvino(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    openvino = _require("openvino", "openvino")
    precision = {"INFERENCE_PRECISION_HINT": "f32"}  # by default it takes bfloat16 where the processor has it
    compiled = openvino.Core().compile_model(_onnx(folder, name, graph), "CPU", precision)
    return _timed(lambda batch: np.array(compiled(batch)[0]), batches, version("openvino"))


def run_opencv(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    cv2 = _require("cv2", "opencv-python-headless")
    net = cv2.dnn.readNetFromONNX(str(_onnx(folder, name, graph)))

    def run(batch: Batch) -> np.ndarray:
        net.setInput(batch)
        return np.array(net.forward())

    return _timed(run, batches, cv2.__version__)


def run_tract(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    """A small engine in Rust, with nothing of Python's libraries in it."""
    tract = _require("tract", "tract")
    runnable = tract.onnx().load(_onnx(folder, name, graph)).into_model().into_runnable()
    return _timed(lambda batch: runnable.run([batch])[0].to_numpy(), batches, version("tract"))


def run_libtorch(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    """clients/cpp, built here with CMake against the installed torch."""
    needed = "apt-get install cmake g++ libjpeg-dev liblcms2-dev libpng-dev nlohmann-json3-dev"
    cmake = shutil.which("cmake")
    if not cmake:
        raise Missing(needed)
    source, build = CLIENTS / "cpp", CLIENTS / "cpp" / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configured = subprocess.run([cmake, "-S", source, "-B", build, prefix], capture_output=True, text=True)
    if configured.returncode:
        raise Missing(f"{needed} ({_last_line(configured.stderr)})")
    built = subprocess.run([cmake, "--build", build], capture_output=True, text=True)
    if built.returncode:
        raise Crashed(f"clients/cpp cannot be built: {_last_line(built.stderr)}")
    return _external([str(build / "verify"), str(folder / f"{name}.pt"), graph], batches)


def run_node(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    if not shutil.which("node"):
        raise Missing("apt-get install nodejs npm")
    return _external(["node", str(CLIENTS / "node" / "verify.mjs"), str(_onnx(folder, name, graph))], batches)


def run_browser(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    """onnxruntime-web in headless Chromium."""
    return _external([sys.executable, str(CLIENTS / "web" / "verify.py"), str(_onnx(folder, name, graph))], batches)


def run_torchscript_cuda(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    if not torch.cuda.is_available():
        raise Missing("on a machine with a GPU: benchmarks/gpu.sh")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    return run_torchscript(folder, name, graph, batches, "cuda")


def run_onnxruntime_cuda(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    return run_onnxruntime(folder, name, graph, batches, "CUDAExecutionProvider")


def run_tensorrt(folder: Path, name: str, graph: str, batches: list[Batch]) -> Answers:
    return run_onnxruntime(folder, name, graph, batches, "TensorrtExecutionProvider")


RUNTIMES: dict[str, Runtime] = {
    "TorchScript": run_torchscript,
    "torch.export": run_exported_program,
    "ONNX Runtime": run_onnxruntime,
    "OpenVINO": run_openvino,
    "OpenCV DNN": run_opencv,
    "tract": run_tract,
    "LibTorch C++": run_libtorch,
    "ONNX Runtime Node": run_node,
    "ONNX Runtime browser": run_browser,
    "TorchScript CUDA": run_torchscript_cuda,
    "ONNX Runtime CUDA": run_onnxruntime_cuda,
    "TensorRT": run_tensorrt,
}
INSTALLED = ("TorchScript", "torch.export", "ONNX Runtime")  # what this project itself needs: never skipped


def _with_torch(module: Any, batches: list[Batch], found: str, device: str = "cpu") -> Answers:
    def run(batch: Batch) -> np.ndarray:
        return module(torch.from_numpy(batch).to(device)).cpu().numpy()

    with torch.inference_mode():
        return _timed(run, batches, found)


def _timed(run: Callable[[Batch], np.ndarray], batches: list[Batch], found: str) -> Answers:
    outputs, seconds = [], 0.0
    run(batches[0])  # the first call of most runtimes optimises
    for batch in batches:
        started = time.perf_counter()
        outputs.append(run(batch))
        seconds += time.perf_counter() - started
    return Answers(outputs, seconds, found)


def _external(command: list[str], batches: list[Batch]) -> Answers:
    """Another program, which reads a folder of .npy files and writes one.

    Its exit code is 0, 3 where something is not installed, or 4 where it cannot run the graph; its last line of output
    is {"version": …, "seconds": …}, or of errors the reason.
    """
    with tempfile.TemporaryDirectory() as temporary:
        inputs, outputs = Path(temporary) / "inputs", Path(temporary) / "outputs"
        inputs.mkdir()
        outputs.mkdir()
        names = [f"{i:05}.npy" for i in range(len(batches))]
        for file, batch in zip(names, batches, strict=True):
            np.save(inputs / file, batch)
        done = subprocess.run([*command, inputs, outputs], capture_output=True, text=True, timeout=SECONDS)
        reason = _last_line(done.stderr)
        if done.returncode == 3:
            raise Missing(reason)
        if done.returncode == 4:
            raise RuntimeError(reason)
        if done.returncode:
            raise Crashed(f"{Path(command[0]).name} ended with {done.returncode}: {reason}")
        report = json.loads(_last_line(done.stdout))
        return Answers([np.load(outputs / file) for file in names], report["seconds"], report["version"])


def _require(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise Missing(f"pip install {package}") from None


def _onnx(folder: Path, name: str, graph: str) -> Path:
    return folder / f"{name}{GRAPHS[graph]}.onnx"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
