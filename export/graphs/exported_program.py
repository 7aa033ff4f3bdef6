"""torch.export: each of the three graphs as an ExportedProgram, kept as `.pt2` and the source of the ONNX files."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.serving_graphs import Classifier, CropGraph
from predictor.files import atomic_write
from predictor.spec import ModelSpec

GRAPHS = {"network": "", "crops": ".crops", "pixels": ".pixels"}  # the middle of a file's name
SPEC_FILE = "spec.json"


@dataclass(frozen=True)
class Program:
    """One graph as torch.export sees it, with the example that it was traced with."""

    program: ExportedProgram
    example: Tensor
    open_dimensions: Mapping[int, Any]  # of the input: axis to Dim
    input: str
    output: str


def trace(classifier: Classifier) -> dict[str, Program]:
    """The three graphs by name, and `resize`, which stands before the crop graph in the pixel graph.

    The batch is open, and of images height and width too.

    Raises:
        RuntimeError: torch.export cannot express the network; the message is its own.
    """
    height, width, batch = classifier.height, classifier.width, Dim("batch")
    crops = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    pixels = torch.randint(0, 256, (2, height + 9, width + 14, 3), dtype=torch.uint8)
    image_dimensions = {0: batch, 1: Dim("height"), 2: Dim("width")}
    return {
        "resize": _trace(classifier.resize, pixels, image_dimensions, "images", "crops"),
        "network": trace_network(classifier.network, height, width),
        "crops": _trace(CropGraph(classifier), crops, {0: batch}, "images", "probabilities"),
        "pixels": _trace(classifier, pixels, image_dimensions, "images", "probabilities"),
    }


def trace_network(network: nn.Module, height: int, width: int) -> Program:
    """The network alone: normalised float32 (N, 3, height, width) to logits (N, C).

    Raises:
        RuntimeError: as `trace`.
    """
    return _trace(network, torch.randn(2, 3, height, width), {0: Dim("batch")}, "input", "logits")


def save(programs: Mapping[str, Program], spec: ModelSpec, folder: Path, name: str) -> None:
    """Writes NAME.pt2, NAME.crops.pt2 and NAME.pixels.pt2, with the spec inside."""
    for graph, middle in GRAPHS.items():
        body = io.BytesIO()  # a path would become part of the file
        with _quiet():
            torch.export.save(programs[graph].program, body, extra_files={SPEC_FILE: spec.to_json()})
        with atomic_write(folder / f"{name}{middle}.pt2") as file:
            file.write(body.getbuffer())


def load(path: Path) -> tuple[nn.Module, ModelSpec]:
    """The graph of a file written by `save`, with the spec that travels inside it."""
    extra = {SPEC_FILE: ""}
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # it would run code of a pickle in the file
    with _quiet():
        module = torch.export.load(path, extra_files=extra).module()
    return module, ModelSpec.from_json(extra[SPEC_FILE], source=str(path))


def _trace(module: nn.Module, example: Tensor, dimensions: dict[int, Any], input: str, output: str) -> Program:
    with _quiet(), torch.no_grad():
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=(dimensions,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return Program(program, example, dimensions, input, output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own insides: parity decides whether the result is correct."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
