"""The proof: every exported graph, reloaded from disk, against eager PyTorch on real pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it reports to its maker by default since 1.29: read at import

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from export import onnx as onnx_files
from export import torchscript
from model.classifier import Classifier
from model.files import write_text
from model.pictures import crop, decode
from model.preprocessing import normalise, resize_crop
from model.spec import ModelSpec

LOGIT_TOLERANCE = 1e-4  # times the largest reference logit: a purely relative one is flaky near zero
CROP_TOLERANCE = 1e-4  # probability, from the same pixels
PIXEL_TOLERANCE = 5e-3  # probability, from the whole picture
LEVEL_TOLERANCE = 0  # grey levels between the resize in the graph and Pillow's

BATCHES = (1, 3, 8, 5)  # none is the batch of 2 that the export used
ODD_SIZES = ((9, 9), (33, 65), (120, 47), (201, 199), (341, 256))  # px, width × height: not those of the samples


class ParityError(RuntimeError):
    """A runtime's answer lies outside its tolerance."""


@dataclass(frozen=True)
class Row:
    """One runtime on one graph. Differences are absolute: logits, probabilities, or grey levels for `resize`."""

    graph: str  # network, crops, pixels, or resize
    runtime: str
    version: str
    pictures: int
    max_difference: float
    mean_difference: float
    top1_agreement: float  # share of the pictures that are not ties
    ties: int  # pictures whose two best lie closer than twice the tolerance
    tolerance: float
    worst: str  # the picture with the largest difference
    passed: bool


def verify(classifier: Classifier, spec: ModelSpec, samples: Path, folder: Path, name: str) -> list[Row]:
    """Compares all artifacts in `folder` with `classifier`, on the pictures in `samples`.

    Raises:
        ParityError: an artifact carries another spec, or there are no pictures to compare on.
    """
    names, pictures = load_pictures(samples)
    script, script_spec = torchscript.load(folder / f"{name}.pt")
    files = {graph: folder / f"{name}{middle}.onnx" for graph, middle in _MIDDLES.items()}
    for path, found in [(folder / f"{name}.pt", script_spec), *((p, onnx_files.read_spec(p)) for p in files.values())]:
        if found != spec:
            raise ParityError(f"{path}: carries another spec than the run; export again")
    sessions = {graph: _session(path) for graph, path in files.items()}
    versions = {"TorchScript": torch.__version__, "ONNX Runtime": onnxruntime.__version__}

    crops = torch.from_numpy(np.stack([crop(picture, spec.size, spec.resize) for picture in pictures]))
    planes = normalise(crops, classifier.mean, classifier.std)
    pixels = [torch.from_numpy(np.asarray(picture).copy()) for picture in pictures]

    rows = []
    with torch.inference_mode():
        logits = classifier.network(planes)
        reference = {"network": logits, "crops": classifier.classify_crops(crops)}
        runs: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
            "network": {"TorchScript": script.network, "ONNX Runtime": sessions["network"]},
            "crops": {"TorchScript": script.classify_crops, "ONNX Runtime": sessions["crops"]},
        }
        tolerances = {"network": LOGIT_TOLERANCE * float(logits.abs().max()), "crops": CROP_TOLERANCE}
        for graph, runtimes in runs.items():
            inputs = planes if graph == "network" else crops
            for runtime, run in runtimes.items():
                got = torch.cat([run(part) for part in _uneven(inputs)])
                rows.append(compare(graph, runtime, versions[runtime], reference[graph], got, tolerances[graph], names))
        whole = torch.cat([classifier(picture[None]) for picture in pixels])
        pixel_runs: dict[str, Callable[[Tensor], Tensor]] = {"TorchScript": script, "ONNX Runtime": sessions["pixels"]}
        for runtime, run in pixel_runs.items():
            got = torch.cat([run(picture[None].repeat(2, 1, 1, 1))[1:] for picture in pixels])
            rows.append(compare("pixels", runtime, versions[runtime], whole, got, PIXEL_TOLERANCE, names))
        got = torch.cat([script.classify_crops(part) for part in _uneven(crops)])  # what the handler does
        rows.append(compare("pixels", "Pillow + crops", versions["TorchScript"], whole, got, PIXEL_TOLERANCE, names))
        resized = torch.cat([resize_crop(picture[None], spec.size, spec.resize) for picture in pixels])
    rows.append(_compare_levels(crops, resized, names))
    return rows


def load_pictures(samples: Path) -> tuple[list[str], list]:  # type: ignore[type-arg]
    """The pictures of a run's `samples` folder, and stretched copies in sizes that none of them has.

    Raises:
        ParityError: the folder is missing or empty.
    """
    files = sorted(path for path in samples.glob("*") if path.is_file())
    if not files:
        raise ParityError(f"{samples}: no pictures to prove parity on; re-run train.py, or put some there")
    names, pictures = [path.name for path in files], [decode(path.read_bytes()) for path in files]
    for i, size in enumerate(ODD_SIZES):
        place = i * len(files) // len(ODD_SIZES)
        names.append(f"{files[place].name} at {size[0]}×{size[1]}")
        pictures.append(pictures[place].resize(size))
    return names, pictures


def compare(
    graph: str, runtime: str, version: str, reference: Tensor, got: Tensor, tolerance: float, names: list[str]
) -> Row:
    """Differences of two (N, C) tensors, and whether they lie within the tolerance with equal top-1."""
    difference = (reference.double() - got.double()).abs().nan_to_num(nan=float("inf"))
    best = reference.double().topk(2, dim=1).values
    ties = best[:, 0] - best[:, 1] < 2 * tolerance
    agrees = (reference.argmax(dim=1) == got.argmax(dim=1))[~ties]
    worst = int(difference.max(dim=1).values.argmax())
    return Row(
        graph,
        runtime,
        version,
        pictures=len(reference),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top1_agreement=float(agrees.double().mean()) if len(agrees) else 1.0,
        ties=int(ties.sum()),
        tolerance=tolerance,
        worst=names[worst],
        passed=bool(difference.max() <= tolerance and agrees.all()),
    )


def write_json(rows: list[Row], path: Path) -> None:
    report = {"reference": f"eager PyTorch {torch.__version__}", "rows": [asdict(row) for row in rows]}
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as text, for the terminal."""
    head = ("graph", "runtime", "version", "pictures", "max |Δ|", "mean |Δ|", "tolerance", "top-1", "verdict")
    lines = [head]
    for row in rows:
        top1 = "" if row.graph == "resize" else f"{row.top1_agreement:.1%}" + (f" ({row.ties} ties)" * bool(row.ties))
        verdict = "ok" if row.passed else f"FAILED on {row.worst}"
        numbers = (f"{row.max_difference:.1e}", f"{row.mean_difference:.1e}", f"{row.tolerance:.1e}")
        lines.append((row.graph, row.runtime, row.version, str(row.pictures), *numbers, top1, verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


_MIDDLES = {"network": "", "crops": ".crops", "pixels": ".pixels"}


def _compare_levels(expected: Tensor, resized: Tensor, names: list[str]) -> Row:
    levels = (expected.int() - resized.int()).abs().flatten(1).double()  # (N, S * S * 3)
    worst = names[int(levels.max(dim=1).values.argmax())]
    largest = float(levels.max())
    from PIL import __version__ as version

    passed = largest <= LEVEL_TOLERANCE
    return Row(
        "resize", "Pillow", version, len(levels), largest, float(levels.mean()), 1.0, 0, LEVEL_TOLERANCE, worst, passed
    )


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (input,) = session.get_inputs()

    def run(batch: Tensor) -> Tensor:
        (output,) = session.run(None, {input.name: batch.contiguous().numpy()})
        return torch.from_numpy(output)

    return run


def _uneven(batch: Tensor) -> Iterator[Tensor]:
    """Slices of changing length, so that a batch size baked into a graph is found."""
    start, turn = 0, 0
    while start < len(batch):
        yield batch[start : start + BATCHES[turn % len(BATCHES)]]
        start, turn = start + BATCHES[turn % len(BATCHES)], turn + 1
