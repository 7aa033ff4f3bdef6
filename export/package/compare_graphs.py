"""Whether the graphs of an export are of one training: what each computes of the same images.

It runs them, so a signature must have said before from whom they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from export.graphs.exported_program import GRAPHS
from export.output_folder import MANIFEST
from export.package import golden_images
from export.package.findings import noting, read_json
from export.proof import sessions
from export.proof.runtimes import Runtime, run_exported_program, run_onnxruntime, run_torchscript
from predictor import golden_check
from predictor.backends import HALF_TOLERANCE
from predictor.golden_check import FILE as GOLDEN
from predictor.golden_check import Golden
from predictor.pillow_preprocessing import read
from predictor.spec import ModelSpec

TOLERANCE = 1e-4  # of a probability, and of a logit times the largest: that of export/proof/parity.py
IMAGES = 8


def compare_graphs(folder: Path, name: str, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    """The three graphs of NAME.pt against those of the other files, on the same seeded images."""
    script = f"{name}.pt"
    for graph, middle in GRAPHS.items():
        batch = _images(specs[script], graph)
        expected = None
        with noting(script, findings):
            expected = run_torchscript(folder, name, graph, [batch]).outputs[0]
        if expected is None:
            continue
        largest = float(np.abs(expected).max()) if graph == "network" else 1.0
        runs: dict[str, Runtime] = {"onnx": run_onnxruntime, "pt2": run_exported_program}
        for kind, run in runs.items():
            file = f"{name}{middle}.{kind}"
            with noting(file, findings):
                got = run(folder, name, graph, [batch]).outputs[0]
                _compare(file, script, got, expected, TOLERANCE * largest, findings)
    for small, tolerance in (("int8", golden_check.INT8), ("fp16", HALF_TOLERANCE)):
        if {f"{name}.{small}.onnx", f"{name}.crops.{small}.onnx"} <= specs.keys():
            _compare_smaller(folder, name, small, tolerance, specs[script], findings)


def _compare_smaller(
    folder: Path, name: str, small: str, tolerance: float, spec: ModelSpec, findings: list[str]
) -> None:
    """The network of an int8 or fp16 pair against its crop graph, which the golden images judge."""
    file, crops = f"{name}.{small}.onnx", f"{name}.crops.{small}.onnx"
    with noting(file, findings):
        logits = sessions.outputs(folder / file, _images(spec, "network")) / spec.temperature
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected = sessions.outputs(folder / crops, _images(spec, "crops"))
        _compare(file, crops, powers / powers.sum(axis=1, keepdims=True), expected, tolerance, findings)


def compare_golden(folder: Path, name: str, spec: ModelSpec, findings: list[str]) -> None:
    """Each file that could serve against the archive's golden images."""
    seen, found = read_json(folder / MANIFEST)["golden_difference"], Golden(folder)
    crops = np.stack([read(body, spec.rule) for body in found.bodies])
    for file, classify in golden_images.servable(folder, name).items():
        with noting(file, findings):
            tolerance = golden_check.tolerance(file, float(seen.get(file, 0)))
            _compare(file, GOLDEN, classify(crops), found.expected, tolerance, findings)


def _compare(
    file: str, reference: str, got: np.ndarray, expected: np.ndarray, tolerance: float, findings: list[str]
) -> None:
    difference = float(np.abs(expected - got).max()) if got.shape == expected.shape else math.nan
    if not difference <= tolerance:  # nor if it is NaN
        what = f"answers differ by up to {difference:.1e}, and {tolerance:.1e} is allowed"
        findings.append(f"{file}: is of another training than {reference} ({what}); export again")


def _images(spec: ModelSpec, graph: str) -> np.ndarray:
    """Noise around a colour and a contrast for each image, so that they get different answers.

    Returns:
        For `network` float32 (N, 3, H, W), normalised; else uint8 (N, H, W, 3).
    """
    random = np.random.default_rng(0)
    colours = random.uniform(0, 255, (IMAGES, 1, 1, 3))
    contrasts = np.linspace(5, 120, IMAGES).reshape(-1, 1, 1, 1)  # grey levels
    noise = random.standard_normal((IMAGES, spec.height, spec.width, 3))
    pixels = (colours + contrasts * noise).clip(0, 255).astype(np.uint8)
    if graph != "network":
        return pixels
    planes = (pixels / 255 - np.array(spec.mean)) / np.array(spec.std)
    return np.ascontiguousarray(planes.transpose(0, 3, 1, 2), dtype=np.float32)  # (N, 3, H, W)
