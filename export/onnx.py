"""ONNX: one file for each graph, opset 18, weights inside, batch (and height and width) open."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from model.classifier import Classifier, CropGraph
from model.files import atomic_write
from model.spec import ModelSpec

OPSET = 18  # the lowest that torch's exporter writes, so the widest to load


def save(classifier: Classifier, spec: ModelSpec, folder: Path, name: str) -> None:
    """Writes NAME.onnx, NAME.crops.onnx and NAME.pixels.onnx.

    Raises:
        RuntimeError: the exporter cannot express the network, or gave another opset.
    """
    batch, height, width = Dim("batch"), Dim("height"), Dim("width")
    size = spec.size
    pixels = torch.randint(0, 256, (2, size + 9, size + 14, 3), dtype=torch.uint8)
    crops = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    planes = torch.randn(2, 3, size, size)
    _export(classifier.network, planes, {0: batch}, "input", "logits", spec, folder / f"{name}.onnx")
    _export(CropGraph(classifier), crops, {0: batch}, "images", "probabilities", spec, folder / f"{name}.crops.onnx")
    shapes = {0: batch, 1: height, 2: width}
    _export(classifier, pixels, shapes, "images", "probabilities", spec, folder / f"{name}.pixels.onnx")


def read_spec(path: Path) -> ModelSpec:
    """The spec that travels in the file's metadata."""
    model = onnx.load(path, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return ModelSpec.from_json(properties.get("spec", ""), source=str(path))


def _export(
    module: nn.Module, example: Tensor, shapes: dict[int, Any], input: str, output: str, spec: ModelSpec, path: Path
) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it narrates its steps
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=[input],
            output_names=[output],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset != OPSET:
        raise RuntimeError(
            f"{path.name}: the exporter gave opset {opset}, not {OPSET}; use another torch or onnxscript"
        )
    _strip_notes(model.graph)
    model.producer_name = "torch"
    onnx.helper.set_model_props(model, {"spec": spec.to_json()})
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as file:
        file.write(model.SerializeToString())


def _strip_notes(graph: onnx.GraphProto) -> None:
    """Drops the exporter's stack traces: they name folders of this machine and can outweigh a small network."""
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del graph.metadata_props[:]
