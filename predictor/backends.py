"""How a worker computes: crops uint8 (N, S, S, 3), RGB, to probabilities float32 (N, C), both NumPy arrays.

`backend` in model-config.yaml names one for workers on the CPU:

    onnx         NAME.crops.onnx in ONNX Runtime
    onnx-int8    NAME.crops.int8.onnx in ONNX Runtime
    torchscript  NAME.pt in PyTorch
    pt2          NAME.crops.pt2 in PyTorch

The archive holds the files that it was exported for. A worker on a GPU runs TorchScript, whatever is named: in half
precision, channels last, on a few batch sizes that are recorded once as CUDA graphs and replayed.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a worker that runs ONNX Runtime never loads it
    import torch

Classify = Callable[[np.ndarray], np.ndarray]

FILES = {
    "onnx": "{}.crops.onnx",
    "onnx-int8": "{}.crops.int8.onnx",
    "torchscript": "{}.pt",
    "pt2": "{}.crops.pt2",
}
GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64)  # images; a batch is filled up to the next of them
STICKY = 70  # exit status of a worker whose CUDA failed
HALF_TOLERANCE = 0.02  # of a probability, between half and full precision, when a GPU worker starts


def load(backend: str, folder: Path, name: str, *, threads: int = 1, gpu: int | None = None) -> Classify:
    """A function from crops to probabilities.

    Args:
        backend: one of FILES.
        folder: where the files lie.
        name: of the model, as its files have it.
        threads: of one worker, on the CPU.
        gpu: number of the worker's GPU, or None for a worker on the CPU.

    Raises:
        ValueError: no such backend, or its file is not there.
    """
    if backend not in FILES:
        raise ValueError(f"model-config.yaml: 'backend' is {backend!r}; it must be one of {', '.join(FILES)}")
    if gpu is not None and backend != "torchscript":
        logging.info("GPU %d runs torchscript; %s is for workers on the CPU", gpu, backend)
        backend = "torchscript"
    path = folder / FILES[backend].format(name)
    if not path.is_file():
        raise ValueError(
            f"model-config.yaml: 'backend' is {backend}, and {path.name} is not in the archive; "
            f"export again with `--backend {backend}`"
        )
    if backend.startswith("onnx"):
        return _onnx(path, threads)
    import torch

    torch.set_num_threads(threads)
    if gpu is not None:
        torch.cuda.set_device(gpu)  # else a CUDA graph takes memory on the first GPU too
        return surviving(_on_gpu(_torchscript(path, f"cuda:{gpu}"), f"cuda:{gpu}"))
    return _on_cpu(_torchscript(path, "cpu").classify_crops if backend == "torchscript" else _program(path))


def _onnx(path: Path, threads: int) -> Classify:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it reports to its maker by default since 1.29
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other workers need the cores
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda crops: session.run(None, {"images": crops})[0]


def _torchscript(path: Path, device: str) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*", category=DeprecationWarning)
        return torch.jit.load(str(path), map_location=device).eval()


def _program(path: Path) -> Any:
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # torch.export.load would run code of a pickle in it
    import torch

    return torch.export.load(str(path)).module()


def _on_cpu(classify: Any) -> Classify:
    import torch

    def run(crops: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return classify(torch.from_numpy(crops)).numpy()

    return run


def _on_gpu(module: Any, device: str) -> Classify:
    """Half precision where it agrees with full precision on this GPU, and CUDA graphs where they can be recorded."""
    import torch

    torch._C._jit_set_texpr_fuser_enabled(False)  # it compiles for each batch size, for seconds
    size = (module.height, module.width) if hasattr(module, "height") else (module.size, module.size)  # spec version 1
    probe = torch.randint(0, 256, (4, *size, 3), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        expected = module.classify_crops(probe)
        reason = ""
        try:
            classify = in_half(module)
            difference = float((classify(probe) - expected).abs().max())
            if not difference <= HALF_TOLERANCE:
                reason = f"it is {difference:.3f} of a probability off"
        except RuntimeError as error:  # a trace may hold constants in full precision
            reason = str(error).strip().splitlines()[-1]
        if reason:
            logging.warning("no half precision (%s); this worker runs in full precision", reason)
            classify = module.classify_crops
        try:
            classify = _Recorded(classify, size, device)
        except RuntimeError as error:
            logging.warning("no CUDA graph of this network (%s); it runs without", str(error).splitlines()[0])

    def run(crops: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            filled = fill_up(crops, GPU_BATCHES)
            return classify(torch.from_numpy(filled).to(device, non_blocking=True))[: len(crops)].cpu().numpy()

    return run


def surviving(classify: Classify) -> Classify:
    """Halves a batch for which a GPU has no memory, and ends the process where CUDA can do nothing any more.

    After an illegal address or a failed assertion each further call of the process fails. TorchServe would keep the
    worker and let it fail; when it ends, it gets a new one.
    """
    import torch

    def run(crops: np.ndarray) -> np.ndarray:
        try:
            return classify(crops)
        except RuntimeError as error:  # TorchScript makes one of whatever is raised within it
            text = str(error)
            if is_out_of_memory(error):
                torch.cuda.empty_cache()
                if len(crops) == 1:
                    raise MemoryError("the GPU has no memory for one image") from None  # TorchServe answers 507
            elif "CUDA error" in text or "device-side assert" in text:
                logging.critical("this worker's CUDA has failed for good, so it ends: %s", text.splitlines()[0])
                logging.shutdown()
                os._exit(STICKY)
            else:
                raise
        half = len(crops) // 2
        return np.concatenate([run(crops[:half]), run(crops[half:])])

    return run


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had no memory; TorchScript makes a plain RuntimeError of PyTorch's own."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error)


def in_half(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """`classify_crops` of a TorchScript file, with the network in half precision and channels last.

    What is around the network stays in float32.
    """
    import torch

    network = copy.deepcopy(module.network).half().to(memory_format=torch.channels_last)

    def classify(images: torch.Tensor) -> torch.Tensor:
        planes = module.to_planes(images).half().contiguous(memory_format=torch.channels_last)
        return module.to_probabilities(network(planes).float())

    return classify


def fill_up(crops: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """`crops` and zeros behind them, so that their number is one of `sizes`, or as it is above the largest."""
    wanted = next((size for size in sizes if size >= len(crops)), len(crops))
    if wanted == len(crops):
        return crops
    return np.concatenate([crops, np.zeros((wanted - len(crops), *crops.shape[1:]), crops.dtype)])


class _Recorded:
    """Replays a CUDA graph for each of GPU_BATCHES: one launch instead of one for each layer."""

    def __init__(self, classify: Callable[[torch.Tensor], torch.Tensor], size: tuple[int, int], device: str) -> None:
        import torch

        self._classify = classify
        self._graphs: dict[int, tuple[Any, torch.Tensor, torch.Tensor]] = {}
        stream = torch.cuda.Stream(device)
        for count in reversed(GPU_BATCHES):  # the largest first: the others use its memory
            images = torch.zeros((count, *size, 3), dtype=torch.uint8, device=device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(3):  # TorchScript optimises in its first calls, cuDNN chooses its kernels
                    classify(images)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                probabilities = classify(images)
            self._graphs[count] = graph, images, probabilities

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) not in self._graphs:
            return self._classify(images)
        graph, buffer, probabilities = self._graphs[len(images)]
        buffer.copy_(images)
        graph.replay()
        return probabilities
