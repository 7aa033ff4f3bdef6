"""Which families of networks export, and how far the exported graphs are from PyTorch; random weights, small images.

    python -m benchmarks.architectures
    python -m benchmarks.architectures --only ViT "DINOv2 ViT-S"

Each network becomes a run folder and goes through the stages of `python -m export` as far as parity: TorchScript,
torch.export, ONNX, then every graph against eager PyTorch in the runtimes that are always installed. Writes
benchmarks/results/architectures.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.machine import describe, keep
from export.graphs.exported_program import GRAPHS
from export.pipeline import Export
from export.proof import images
from model import Classifier, ModelSpec, checkpoint, load_run, registry
from predictor.files import sha256

# Of each family a small member, and a size that it takes, px.
FAMILIES = {
    "ResNet": ("timm/resnet18", 64),
    "ConvNeXt": ("timm/convnext_atto", 64),
    "EfficientNet": ("timm/efficientnet_b0", 64),
    "EfficientNet-Lite": ("timm/tf_efficientnet_lite0", 64),
    "MobileNetV3": ("timm/mobilenetv3_small_050", 64),
    "MobileNetV4": ("timm/mobilenetv4_conv_small_035", 64),
    "ViT": ("timm/vit_tiny_patch16_224", 64),
    "DeiT": ("timm/deit_tiny_patch16_224", 64),
    "DeiT, distilled": ("timm/deit_tiny_distilled_patch16_224", 64),
    "Swin": ("timm/swin_tiny_patch4_window7_224", 112),
    "RegNet": ("timm/regnetx_002", 64),
    "EdgeNeXt": ("timm/edgenext_xx_small", 64),
    "FastViT": ("timm/fastvit_t8", 64),
    "DINOv2 ViT-S": ("timm/vit_small_patch14_dinov2", 56),
}
LABELS = ("a", "b", "c")


@dataclass(frozen=True)
class Result:
    """What became of one network. Differences are the largest of all images and runtimes."""

    arch: str
    size: int  # px
    parameters: int = 0
    files: tuple[str, ...] = ()  # kinds of files that were written
    logits: float | None = None  # of the network graph; None where it was not compared
    probabilities: float | None = None  # of the crop and the pixel graph
    passed: bool = False
    seconds: float = 0.0
    error: str = ""


def make_run(arch: str, size: int, folder: Path) -> None:
    """A run folder with random weights, as train.py would leave one, as far as export reads it."""
    torch.manual_seed(0)
    network = settled(registry.build(arch, len(LABELS), size), size)
    own = registry.preset(arch)
    checkpoint.save(network.state_dict(), folder / "model.pt")
    weights = sha256(folder / "model.pt")
    spec = ModelSpec(
        arch=arch,
        labels=LABELS,
        height=size,
        width=size,
        resize=size,
        interpolation=own.interpolation,
        mean=own.mean,
        std=own.std,
        weights_sha256=weights,
    )
    spec.save(folder / "spec.json")


@torch.no_grad()
def settled(network: nn.Module, size: int) -> nn.Module:
    """With BatchNorm statistics of noise: with those that it begins with, a deep network gives next to nothing."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None  # the plain mean
    network.train()(torch.randn(8, 3, size, size))
    return network.eval()


def measure(arch: str, size: int, photographs: int) -> Result:
    """Export and parity of one network."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            make_run(arch, size, folder)
            spec, network = load_run(folder)
            parameters = sum(p.numel() for p in network.parameters())
            export = Export(folder, folder, "net", spec, Classifier(network, spec).eval())
            with contextlib.redirect_stdout(io.StringIO()):  # the table tells what the steps do
                export.write_graphs()
                rows = export.prove(images.photographs(photographs))
        except Exception as error:  # an exporter raises whatever it trips over; the table tells
            seconds = time.perf_counter() - started
            return Result(arch, size, files=_kinds(folder), seconds=seconds, error=str(error).strip().splitlines()[0])
        logits = max(row.max_difference for row in rows if row.graph == "network")
        probabilities = max(row.max_difference for row in rows if row.graph in ("crops", "pixels"))
        passed, seconds = all(row.passed for row in rows), time.perf_counter() - started
        return Result(arch, size, parameters, _kinds(folder), logits, probabilities, passed, seconds)


def _kinds(folder: Path) -> tuple[str, ...]:
    """TorchScript's one file, and of the others those of each graph."""
    wanted = ["net.pt", *(f"net{middle}.{kind}" for kind in ("pt2", "onnx") for middle in GRAPHS.values())]
    return tuple(name.removeprefix("net.") for name in wanted if (folder / name).exists())


def table(results: dict[str, Result]) -> str:
    lines = [f"{'family':18} {'network':36} {'px':>3} {'files':>5} {'logits':>8} {'prob.':>8} {'s':>5}"]
    for family, row in results.items():
        differences = [
            f"{value:8.1e}" if value is not None else f"{'-':>8}" for value in (row.logits, row.probabilities)
        ]
        verdict = "ok" if row.passed else row.error[:60] or "FAILED"
        lines.append(
            f"{family:18} {row.arch:36} {row.size:>3} {len(row.files):>3}/7 {' '.join(differences)} "
            f"{row.seconds:5.0f} {verdict}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="FAMILY", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--images", type=int, default=16, help="photographs that are compared (16)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/architectures.json"))
    options = parser.parse_args(arguments)
    machine = describe("torch", "timm", "onnx", "onnxruntime", "onnxscript")
    results = {}
    for family in options.only:
        results[family] = measure(*FAMILIES[family], options.images)
        print(table({family: results[family]}).splitlines()[1], flush=True)
        keep(options.json, machine, "families", {family: asdict(results[family])})
    print(table(results))
    return 0 if all(row.passed for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
