"""How far each runtime's resize is from Pillow's: every filter and fit, as the graph that an export holds.

    python -m benchmarks.pixel_rules

Resizes cut-outs of photographs, and noise of the same sizes, to 224×224 and 160×224 px. Says for each runtime, filter
and fit the share of values (three for each pixel) that differ from Pillow's, and by how many grey levels at most.
"OpenVINO, no hint" goes without INFERENCE_PRECISION_HINT=f32: it computes in bfloat16 where the processor does.
Writes benchmarks/results/pixel_rules.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import describe, keep
from export.graphs import exported_program
from export.graphs import onnx as onnx_files
from export.graphs.exported_program import GRAPHS, Program
from export.proof.images import photographs
from export.proof.runtimes import RUNTIMES, Batch
from model.tensor_preprocessing import Resize
from predictor.pillow_preprocessing import crop
from predictor.spec import FITS, INTERPOLATIONS, PixelRule

SHAPES = ((224, 224), (224, 160))  # height, width of the network's input, px
FILL = (9, 99, 199)
MODEL = "net"
FILE = f"{MODEL}{GRAPHS['pixels']}.onnx"  # where the runtimes look for what takes whole images
PYTORCH, DEFAULT = "PyTorch", "OpenVINO, no hint"
NAMES = (PYTORCH, "ONNX Runtime", "tract", "OpenVINO", DEFAULT, "OpenCV DNN")


def rules() -> dict[str, list[PixelRule]]:
    """By filter and fit."""
    found: dict[str, list[PixelRule]] = {}
    for interpolation in INTERPOLATIONS:
        for fit in FITS:
            for height, width in SHAPES:
                least = min(height, width)
                resize = least * 8 // 7 if fit == "crop" else least
                rule = PixelRule(
                    height=height, width=width, resize=resize, interpolation=interpolation, fit=fit, fill=FILL
                )
                found.setdefault(f"{interpolation} {fit}", []).append(rule)
    return found


def batches(count: int) -> list[Batch]:
    """uint8 (1, H, W, 3): photographs, and noise of their sizes."""
    chance = np.random.default_rng(0)
    pixels = [np.asarray(image)[None] for _, image in photographs(count)]
    return pixels + [chance.integers(0, 256, one.shape, dtype=np.uint8) for one in pixels]


def trace(rule: PixelRule) -> Program:
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    example = torch.zeros(2, rule.height + 9, rule.width + 14, 3, dtype=torch.uint8)
    dimensions = {0: torch.export.Dim("batch"), 1: height, 2: width}
    return exported_program._trace(Resize(rule), example, dimensions, "images", "crops")


def run(name: str, rule: PixelRule, folder: Path, images: list[Batch]) -> list[np.ndarray]:
    """uint8 (1, height, width, 3) of each image. Whatever the runtime raises means that it cannot run the graph."""
    if name == PYTORCH:
        return [Resize(rule)(torch.from_numpy(image.copy())).numpy() for image in images]
    if name != DEFAULT:
        return RUNTIMES[name](folder, MODEL, "pixels", images).outputs
    compiled = import_module("openvino").Core().compile_model(folder / FILE, "CPU")
    return [np.array(compiled(image)[0]) for image in images]


def compare(wanted: list[np.ndarray], got: list[np.ndarray]) -> dict[str, float]:
    levels = np.abs(np.concatenate(wanted).astype(int) - np.concatenate(got))
    return {"share": float((levels > 0).mean()), "levels": int(levels.max()), "values": levels.size}


def measure(rule: PixelRule, images: list[Batch]) -> dict[str, dict[str, Any]]:
    """One rule in each runtime; `error` where it cannot run the graph."""
    wanted = [crop(Image.fromarray(image[0]), rule)[None] for image in images]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = onnx_files.convert(trace(rule))
        (folder / FILE).write_bytes(model.SerializeToString())
        for name in NAMES:
            try:
                rows[name] = compare(wanted, run(name, rule, folder, images))
            except Exception as error:  # a runtime raises whatever it trips over; the table tells
                rows[name] = {"error": f"cannot run it ({type(error).__name__})"}
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="photographs, and as many of noise (24)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/pixel_rules.json"))
    options = parser.parse_args(arguments)
    machine = describe("torch", "pillow", "onnxruntime", "openvino", "tract", "opencv-python-headless")
    images = batches(options.images)
    for kind, alike in rules().items():
        for rule in alike:
            title = f"{kind}, {rule.width}×{rule.height}"
            rows = measure(rule, images)
            keep(options.json, machine, title, rows)
            for name, row in rows.items():
                said = row.get("error") or f"{row['share']:.5%} of values, at most {row['levels']}"
                print(f"{title:26} {name:22} {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
