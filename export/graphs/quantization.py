"""Smaller ONNX files: int8 for CPUs, half precision (fp16) for GPUs. export/proof/accuracy_gate.py says which are kept.

    python -m export runs/NAME --int8 --fp16

int8 is ONNX Runtime's static quantisation (Jacob et al. 2018): activations uint8, weights int8 with a scale for each
channel, written as QuantizeLinear and DequantizeLinear, which are plain ONNX.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.graphs import exported_program
from export.graphs import onnx as onnx_files
from model.tensor_preprocessing import normalise
from predictor.spec import ModelSpec

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when ONNX Runtime is imported, which the functions do

# What has integer kernels on CPUs and bears rounding. Softmax, normalisation and the sigmoids stay in float: 256 levels
# are few for them, and with them in int8 too mobilenet_v3_small and efficientnet_b0 stayed below ×1.2 of fp32's speed.
OPERATORS = (
    *("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Reshape", "Flatten"),
)


def make_int8(
    spec: ModelSpec, network_onnx: Path, calibration: np.ndarray, folder: Path, name: str, seed: int = 0
) -> None:
    """Writes NAME.int8.onnx and, around the same network, NAME.crops.int8.onnx.

    Args:
        network_onnx: the network graph in fp32.
        calibration: uint8 (N, S, S, 3), RGB: training images, which set the range of each activation.
        seed: of their choice; recorded in the files, not used.

    Raises:
        RuntimeError: it became more than plain ONNX of our opset.
    """
    network = _quantise(network_onnx, _planes(spec, calibration))
    _keep_logits_float(network.graph)
    _tidy(network)
    note = {
        "format": "QDQ",
        "activations": "uint8",
        "weights": "int8, per channel",
        "calibration": "MinMax",
        "images": len(calibration),
        "seed": seed,
        "versions": versions(),
    }
    _write_both(network, spec, folder, f"{name}{{}}.int8.onnx", {"quantisation": json.dumps(note)})


def make_fp16(network: nn.Module, spec: ModelSpec, folder: Path, name: str) -> None:
    """Writes NAME.fp16.onnx and NAME.crops.fp16.onnx: half precision inside, the inputs and outputs of the fp32 files.

    Raises:
        RuntimeError: the network cannot be expressed so.
    """
    half = exported_program.trace_network(_Half(network), spec.height, spec.width)
    _write_both(onnx_files.convert(half), spec, folder, f"{name}{{}}.fp16.onnx", {})


def versions() -> dict[str, str]:
    """Of what made and ran the files."""
    import onnxruntime

    return {module.__name__: str(module.__version__) for module in (onnxruntime, onnx, torch)}


def _write_both(network: onnx.ModelProto, spec: ModelSpec, folder: Path, file: str, notes: dict[str, str]) -> None:
    """
    Args:
        file: its name, with braces for the middle.
    """
    onnx_files.write(network, spec, folder / file.format(""), notes)
    onnx_files.write(onnx_files.crop_graph(network, spec), spec, folder / file.format(".crops"), notes)


class _Half(nn.Module):
    """A network in half precision whose input and output stay float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, planes: Tensor) -> Tensor:
        return self.network(planes.half()).float()


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch}


def _quantise(network_onnx: Path, batches: Iterator[np.ndarray]) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static

    with tempfile.TemporaryDirectory() as temporary:
        prepared, quantised = Path(temporary) / "prepared.onnx", Path(temporary) / "quantised.onnx"
        quant_pre_process(network_onnx, prepared, skip_symbolic_shape=True)  # the exporter wrote all shapes
        quantize_static(
            prepared,
            quantised,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            # int8 activations would be slower than fp32: VNNI multiplies unsigned bytes by signed ones
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=list(OPERATORS),
            # simplecnn on 5,000 test images of CIFAR-10, fp32 65.54%: MinMax and Entropy 65.76%, Percentile 65.62%;
            # the last two keep every activation of every image in memory, gigabytes for 512 images of 224 px
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(quantised)


def _planes(spec: ModelSpec, crops: np.ndarray, batch: int = 16) -> Iterator[np.ndarray]:
    """float32 (n, 3, S, S), normalised."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    for part in torch.from_numpy(crops).split(batch):
        yield normalise(part, mean, std).contiguous().numpy()


def _keep_logits_float(graph: onnx.GraphProto) -> None:
    """Takes the rounding of the output away: nothing computes with it, and 256 levels would make near ties equal."""
    made_by = {output: node for node in graph.node for output in node.output}
    last = made_by["logits"]
    if last.op_type != "DequantizeLinear":
        return
    rounding = made_by[last.input[0]]
    made_by[rounding.input[0]].output[0] = "logits"
    for node in (last, rounding):
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _tidy(network: onnx.ModelProto) -> None:
    """Without the opsets that ONNX Runtime lists because it knows them, and without the shapes of before.

    Raises:
        RuntimeError: it uses another opset than ours.
    """
    domains = {node.domain for node in network.graph.node}
    opsets = [entry for entry in network.opset_import if entry.domain in domains]
    if (found := [(entry.domain, entry.version) for entry in opsets]) != [("", onnx_files.OPSET)]:
        raise RuntimeError(f"quantisation gave operators of {found}, not ONNX's opset {onnx_files.OPSET}")
    del network.opset_import[:], network.graph.value_info[:]
    network.opset_import.extend(opsets)
