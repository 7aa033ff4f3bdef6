"""How fast the int8 crop graph is against fp32, in ONNX Runtime, on one thread; random weights, so nothing of accuracy.

    python -m benchmarks.reduced --arch resnet18 --size 224

The two take turns, and the figures are medians. What int8 costs in accuracy, `python -m export RUN --int8` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe, save
from export.graphs import exported_program, onnx, quantization
from export.proof import accuracy_gate, sessions
from model import Classifier, ModelSpec, registry

BATCHES = (1, 8)


def measure(arch: str, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a call by batch size, as {"1": {"fp32": …, "int8": …}, …}."""
    torch.manual_seed(0)
    mean, std = registry.IMAGENET_MEAN, registry.IMAGENET_STD
    labels = tuple(f"class {i}" for i in range(10))
    spec = ModelSpec(arch=arch, labels=labels, height=size, width=size, resize=size, mean=mean, std=std)
    classifier = Classifier(registry.build(arch, len(labels), size), spec).eval()
    crops = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        onnx.save(exported_program.trace(classifier), spec, folder, "net")
        quantization.make_int8(spec, folder / "net.onnx", crops, folder, "net")
        files = {"fp32": folder / "net.crops.onnx", "int8": folder / "net.crops.int8.onnx"}
        return {str(batch): accuracy_gate.milliseconds(files, crops[:batch], rounds=rounds) for batch in BATCHES}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=224, help="px (224)")
    parser.add_argument("--rounds", type=int, default=accuracy_gate.ROUNDS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/reduced.json"))
    options = parser.parse_args(arguments)
    results = measure(options.arch, options.size, options.rounds)
    machine = describe("onnxruntime", "onnx", "torch") | {"vnni": str(accuracy_gate.has_vnni())}
    report = {"machine": machine, "arch": options.arch, "size": options.size, "threads": sessions.THREADS}
    save(options.json, {**report, "milliseconds": results})
    print(json.dumps(machine))
    for batch, took in results.items():
        speedup = took["fp32"] / took["int8"]
        print(f"batch {batch:>2}: fp32 {took['fp32']:.1f} ms, int8 {took['int8']:.1f} ms, ×{speedup:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
