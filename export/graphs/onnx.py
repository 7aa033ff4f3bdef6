"""ONNX: one file for each graph, opset 18, weights inside, batch (and height and width) open.

The network comes from torch's exporter. What stands around it in the crop graph is written here once, by `crop_graph`,
for a network of any precision.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from export.graphs.exported_program import GRAPHS, Program
from predictor.files import atomic_write
from predictor.spec import ModelSpec

OPSET = 18  # the lowest that torch's exporter writes, so the widest to load


def save(traced: Mapping[str, Program], spec: ModelSpec, folder: Path, name: str) -> None:
    """Writes NAME.onnx, NAME.crops.onnx and NAME.pixels.onnx.

    Raises:
        RuntimeError: the exporter cannot express the network, or gave another opset.
    """
    network = convert(traced["network"])
    crops = crop_graph(network, spec)
    resize = onnx.compose.add_prefix(convert(traced["resize"]), "resize.", rename_inputs=False, rename_outputs=False)
    for graph, model in {"network": network, "crops": crops, "pixels": _join(resize, crops)}.items():
        write(model, spec, folder / f"{name}{GRAPHS[graph]}.onnx")


def crop_graph(network: onnx.ModelProto, spec: ModelSpec) -> onnx.ModelProto:
    """`Classifier.classify_crops` around a network graph in fp32, fp16 or int8: normalisation and softmax are in float.

    Args:
        network: `input` float32 (N, 3, H, W), normalised, of the spec's size, to `logits` float32 (N, C).

    Returns:
        `images` uint8 (N, H, W, 3) to `probabilities` float32 (N, C). `network` is left as it is.
    """
    std, mean = np.array(spec.std, np.float32), np.array(spec.mean, np.float32)
    # Repeated for a whole row of pixels: ONNX Runtime moves the Transpose away, since its int8 convolution takes NHWC,
    # and a broadcast whose inner loop is 3 long would take a tenth of int8 ResNet-18's time at 224 px.
    values = {
        "crops.scale": np.tile(1 / (255 * std), (spec.width, 1)),
        "crops.shift": np.tile(mean / std, (spec.width, 1)),
        "crops.temperature": np.array([spec.temperature], np.float32),
    }
    make, float32 = onnx.helper.make_node, onnx.TensorProto.FLOAT
    before = [
        make("Cast", ["images"], ["crops.pixels"], "crops.cast", to=float32),
        make("Mul", ["crops.pixels", "crops.scale"], ["crops.scaled"], "crops.mul"),
        make("Sub", ["crops.scaled", "crops.shift"], ["crops.normalised"], "crops.sub"),
        make("Transpose", ["crops.normalised"], ["input"], "crops.transpose", perm=[0, 3, 1, 2]),
    ]
    after = [
        make("Div", ["logits", "crops.temperature"], ["crops.logits"], "crops.div"),
        make("Softmax", ["crops.logits"], ["probabilities"], "crops.softmax", axis=1),
    ]
    model = copy.deepcopy(network)
    graph, declare = model.graph, onnx.helper.make_tensor_value_info
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, key) for key, value in values.items())
    graph.input.append(declare("images", onnx.TensorProto.UINT8, ("batch", spec.height, spec.width, 3)))
    graph.output.append(declare("probabilities", float32, ("batch", len(spec.labels))))
    return model


def read_spec(path: Path) -> ModelSpec:
    """The spec that travels in the file's metadata."""
    model = onnx.load(path, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return ModelSpec.from_json(properties.get("spec", ""), source=str(path))


def convert(traced: Program) -> onnx.ModelProto:
    """One graph as ONNX, without what names this machine.

    Raises:
        RuntimeError: as `save`.
    """
    from onnxscript.rewriter import rewrite  # late: only torch.onnx.export needs onnxscript, and seconds to import it
    from onnxscript.rewriter.pattern import RewriteRule

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it narrates its steps
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced.program,
            (traced.example,),
            dynamo=True,
            dynamic_shapes=(dict(traced.open_dimensions),),
            input_names=[traced.input],
            output_names=[traced.output],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = rewrite(program.model_proto, [RewriteRule(_gelu_of_the_exporter, _gelu)])
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset != OPSET:
        raise RuntimeError(f"the exporter gave opset {opset}, not {OPSET}; use another torch or onnxscript")
    _strip_notes(model.graph)
    model.producer_name = "torch"
    return model


def write(model: onnx.ModelProto, spec: ModelSpec, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Checks the model and writes it with the spec inside, and the notes beside that."""
    onnx.helper.set_model_props(model, {"spec": spec.to_json(), **(notes or {})})
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as file:
        file.write(model.SerializeToString(deterministic=True))


def _join(first: onnx.ModelProto, second: onnx.ModelProto) -> onnx.ModelProto:
    """The first one's output becomes the second one's input."""
    edge = (first.graph.output[0].name, second.graph.input[0].name)
    joined = onnx.compose.merge_models(first, second, io_map=[edge])
    del joined.opset_import[:]  # it is there once for each of the two
    joined.opset_import.extend(first.opset_import)
    joined.producer_name = first.producer_name
    return joined


def _gelu_of_the_exporter(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    """OpenCV 5.0.0 takes this for one operator, and crashes where it follows a convolution."""
    return op.Mul(x, op.Mul(half, op.Add(op.Erf(op.Div(x, root)), one)))


def _gelu(op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
    """The same bits, as halving is exact, in the order that ONNX Runtime takes for one operator."""
    return op.Mul(op.Mul(x, half), op.Add(op.Erf(op.Div(x, root)), one))


def _strip_notes(graph: onnx.GraphProto) -> None:
    """Drops the exporter's stack traces: they name folders of this machine and can outweigh a small network."""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del graph.metadata_props[:]
