"""ONNX: one file for each graph, opset 18, weights inside, batch (and height and width) open."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from export.graphs.exported_program import GRAPHS, PARTS, Program
from predictor.files import atomic_write
from predictor.spec import ModelSpec

OPSET = 18  # the lowest that torch's exporter writes, so the widest to load


def save(traced: Mapping[str, Program], spec: ModelSpec, folder: Path, name: str) -> None:
    """Writes NAME.onnx, NAME.crops.onnx and NAME.pixels.onnx.

    Raises:
        RuntimeError: the exporter cannot express the network, or gave another opset.
    """
    for graph, model in build(traced).items():
        write(model, spec, folder / f"{name}{GRAPHS[graph]}.onnx")


def build(traced: Mapping[str, Program]) -> dict[str, onnx.ModelProto]:
    """The three graphs: the network, converted once since that takes longest, and the others put around it.

    Raises:
        RuntimeError: as `save`.
    """
    network = convert(traced["network"])
    resize, normalise, softmax = (_with_names_of_its_own(convert(traced[part]), part) for part in PARTS)
    crops = _join(normalise, network, softmax)
    pixels = _join(resize, crops)
    _rename_input(crops, "images")
    return {"network": network, "crops": crops, "pixels": pixels}


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
    return model


def write(model: onnx.ModelProto, spec: ModelSpec, path: Path) -> None:
    """Checks the model and writes it with the spec inside."""
    model.producer_name = "torch"
    onnx.helper.set_model_props(model, {"spec": spec.to_json()})
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as file:
        file.write(model.SerializeToString())


def _join(*models: onnx.ModelProto) -> onnx.ModelProto:
    """Each model's output becomes the next one's input, which has the same name."""
    joined, *rest = models
    for model in rest:
        edge = model.graph.input[0].name
        joined = onnx.compose.merge_models(joined, model, io_map=[(edge, edge)])
    del joined.opset_import[:]  # it is there once for each part
    joined.opset_import.extend(models[0].opset_import)
    return joined


def _with_names_of_its_own(model: onnx.ModelProto, part: str) -> onnx.ModelProto:
    """So that they never meet those of the network, which keep the state_dict's."""
    return onnx.compose.add_prefix(model, f"{part}.", rename_inputs=False, rename_outputs=False)


def _rename_input(model: onnx.ModelProto, name: str) -> None:
    old, model.graph.input[0].name = model.graph.input[0].name, name
    for node in model.graph.node:
        node.input[:] = [name if value == old else value for value in node.input]


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
