"""TorchScript: one file that holds all three graphs, loadable from Python, C++ and TorchServe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from model.serving_graphs import Classifier
from predictor.files import atomic_write
from predictor.spec import ModelSpec

SPEC_FILE = "spec.json"


def save(classifier: Classifier, spec: ModelSpec, path: Path) -> None:
    """Writes `path`: `forward` is the pixel graph, `classify_crops` the crop graph, `network` the network.

    The network is traced, since a user's own network need not be scriptable; the rest is scripted, so that N, H and W
    stay open.
    """
    example = torch.randn(2, 3, spec.height, spec.width)
    with torch.no_grad(), _quiet():
        network = torch.jit.trace(classifier.network.eval(), example, check_trace=False)  # parity checks it
        module = torch.jit.script(Classifier(network, spec).eval())
    with atomic_write(path) as file, _quiet():
        torch.jit.save(module, file, _extra_files={SPEC_FILE: spec.to_json()})


def load(path: Path, device: str = "cpu") -> tuple[torch.jit.ScriptModule, ModelSpec]:
    """Reads a file written by `save`, with the spec that travels inside it."""
    extra = {SPEC_FILE: ""}
    with _quiet():
        module = torch.jit.load(path, map_location=device, _extra_files=extra)
    text = extra[SPEC_FILE]
    return module.eval(), ModelSpec.from_json(text if isinstance(text, str) else text.decode(), source=str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's warnings, since parity decides, and without torch's on TorchScript's age.

    It is deprecated since torch 2.9, but TorchServe and LibTorch load nothing that is as widely supported.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*", category=DeprecationWarning)
        yield
