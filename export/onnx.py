"""ONNX: one file for each graph, opset 18, weights inside, batch (and height and width) open."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch

from export.programs import GRAPHS, Program
from model.files import atomic_write
from model.spec import ModelSpec

OPSET = 18  # the lowest that torch's exporter writes, so the widest to load


def save(programs: Mapping[str, Program], spec: ModelSpec, folder: Path, name: str) -> None:
    """Writes NAME.onnx, NAME.crops.onnx and NAME.pixels.onnx.

    Raises:
        RuntimeError: the exporter cannot express the network, or gave another opset.
    """
    for graph, middle in GRAPHS.items():
        export_graph(programs[graph], spec, folder / f"{name}{middle}.onnx")


def read_spec(path: Path) -> ModelSpec:
    """The spec that travels in the file's metadata."""
    model = onnx.load(path, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return ModelSpec.from_json(properties.get("spec", ""), source=str(path))


def export_graph(traced: Program, spec: ModelSpec, path: Path) -> None:
    """Writes one graph, without what names this machine, and checked by ONNX's own checker.

    Raises:
        RuntimeError: as `save`.
    """
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
