"""The proof: every exported graph, reloaded from disk, against eager PyTorch on real images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from export import text_table
from export.graphs import exported_program, onnx, torchscript
from export.graphs.exported_program import GRAPHS
from export.proof.images import Named
from export.proof.runtimes import INSTALLED, RUNTIMES, Batch, Crashed, Missing
from model.serving_graphs import Classifier
from model.tensor_preprocessing import normalise
from predictor.files import write_text
from predictor.pillow_preprocessing import crop
from predictor.spec import ModelSpec

LOGIT_TOLERANCE = 1e-4  # times the largest reference logit: a purely relative one is flaky near zero
CROP_TOLERANCE = 1e-4  # probability, from the same pixels
PIXEL_TOLERANCE = 5e-3  # probability, from the whole image
LEVEL_TOLERANCE = 0  # grey levels between the resize in the graph and Pillow's

BATCHES = (1, 3, 8, 5)  # none is the batch of 2 that the export used


class ParityError(RuntimeError):
    """A runtime's answer lies outside its tolerance."""


@dataclass(frozen=True)
class Row:
    """One runtime on one graph. Differences are absolute: logits, probabilities, or grey levels for `resize`."""

    graph: str  # network, crops, pixels, or resize
    runtime: str
    version: str = ""
    images: int = 0
    max_difference: float = 0.0
    mean_difference: float = 0.0
    top1_agreement: float = 0.0  # share of the images that are not ties
    ties: tuple[str, ...] = ()  # images whose two best lie closer than twice the tolerance
    tolerance: float = 0.0
    milliseconds: float | None = None  # for each image, in the runtime's own call
    worst: str = ""  # the image with the largest difference
    passed: bool = False
    skipped: str = ""  # why it was not compared: never counted as passed

    @property
    def failed(self) -> bool:
        return not self.passed and not self.skipped


def verify(
    classifier: Classifier,
    spec: ModelSpec,
    images: Sequence[Named],
    folder: Path,
    name: str,
    runtimes: Iterable[str] = INSTALLED,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Compares all artifacts in `folder` with `classifier` on `images`, in each of `runtimes`.

    Args:
        say: is given a line for each graph and runtime as it is done, which may take minutes.

    Raises:
        ParityError: an artifact carries another spec, or one of `INSTALLED` cannot run its graph.
    """
    _check_specs(folder, name, spec)
    names = [name for name, _ in images]
    crops = torch.from_numpy(np.stack([crop(image, spec.rule) for _, image in images]))
    cases = _cases(classifier, crops, [np.asarray(image) for _, image in images])
    rows = []
    pairs = [(case, runtime) for case in cases.values() for runtime in runtimes]
    with tqdm(pairs, unit="graphs", leave=False, disable=None) as bar:  # on a terminal only
        for case, runtime in bar:
            bar.set_description(f"comparing {case.graph}, {runtime}")
            started = time.perf_counter()
            row = _row(case, runtime, folder, name, names)
            say(f"{case.graph} in {runtime}: {_verdict(row)}, {time.perf_counter() - started:.1f} s")
            rows.append(row)
    served = RUNTIMES["TorchScript"](folder, name, "crops", cases["crops"].batches)  # as the handler: Pillow first
    got, pixels = torch.from_numpy(np.concatenate(served.outputs)), cases["pixels"]
    rows.append(compare("pixels", "Pillow + crops", served.version, pixels.reference, got, PIXEL_TOLERANCE, names))
    resized = [classifier.resize(torch.from_numpy(part)) for part in pixels.batches]
    rows.append(_compare_levels(crops, torch.cat(resized), names))
    return rows


def compare(
    graph: str,
    runtime: str,
    version: str,
    reference: Tensor,
    got: Tensor,
    tolerance: float,
    names: Sequence[str],
    milliseconds: float | None = None,
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
        images=len(reference),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top1_agreement=float(agrees.double().mean()) if len(agrees) else 1.0,
        ties=tuple(names[i] for i in ties.nonzero().flatten().tolist()),
        tolerance=tolerance,
        milliseconds=milliseconds,
        worst=names[worst],
        passed=bool(difference.max() <= tolerance and agrees.all()),
    )


def write_json(
    rows: list[Row], spec: ModelSpec, path: Path, smaller: Sequence[Any] = (), backends: Sequence[Any] = ()
) -> None:
    """Writes the rows, those of int8 and fp16 files, the backends' speeds, and whose weights they are about."""
    report = {
        "weights_sha256": spec.weights_sha256,
        "reference": f"eager PyTorch {torch.__version__}",
        "rows": [asdict(row) for row in rows],
        "reduced": [asdict(row) for row in smaller],
        "backends": [asdict(row) for row in backends],
    }
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as text, for the terminal."""
    head = ("graph", "runtime", "version", "images", "max |Δ|", "mean |Δ|", "tolerance", "top-1", "ms", "verdict")
    return text_table.aligned([head, *map(_cells, rows)])


def _cells(row: Row) -> tuple[str, ...]:
    if row.skipped:
        return (row.graph, row.runtime, *[""] * 7, _verdict(row))
    top1 = "" if row.graph == "resize" else f"{row.top1_agreement:.1%}"
    if row.ties:
        top1 += f" ({len(row.ties)} tie{'s' * (len(row.ties) > 1)})"
    return (
        row.graph,
        row.runtime,
        row.version,
        f"{row.images:,}",
        f"{row.max_difference:.1e}",
        f"{row.mean_difference:.1e}",
        f"{row.tolerance:.1e}",
        top1,
        "" if row.milliseconds is None else f"{row.milliseconds:.3f}",
        _verdict(row),
    )


def _verdict(row: Row) -> str:
    if row.skipped:
        return f"skipped: {row.skipped}"
    return "ok" if row.passed else f"FAILED on {row.worst}"


def _check_specs(folder: Path, name: str, spec: ModelSpec) -> None:
    found = {f"{name}.pt": torchscript.load(folder / f"{name}.pt")[1]}
    for middle in GRAPHS.values():
        found[f"{name}{middle}.pt2"] = exported_program.load(folder / f"{name}{middle}.pt2")[1]
        found[f"{name}{middle}.onnx"] = onnx.read_spec(folder / f"{name}{middle}.onnx")
    for file, own in found.items():
        if own != spec:
            raise ParityError(f"{folder / file}: carries another spec than the run; export again")


@dataclass(frozen=True)
class _Case:
    """One graph, and what it must answer."""

    graph: str
    batches: list[Batch]
    reference: Tensor  # (N, C), of eager PyTorch
    tolerance: float


@torch.inference_mode()
def _cases(classifier: Classifier, crops: Tensor, pixels: list[np.ndarray]) -> dict[str, _Case]:
    """The graphs by name, each on the same images.

    Args:
        crops: uint8 (N, H, W, 3), of the spec's size.
        pixels: the same images whole, uint8 (H, W, 3).
    """
    planes = normalise(crops, classifier.mean, classifier.std)
    whole = [part for same in _runs_of_equal_size(pixels) for part in _uneven(np.stack(same))]
    logits = torch.cat([classifier.network(part) for part in planes.split(64)])
    from_crops = torch.cat([classifier.classify_crops(part) for part in crops.split(64)])
    from_pixels = torch.cat([classifier(torch.from_numpy(part)) for part in whole])
    tolerance = LOGIT_TOLERANCE * float(logits.abs().max())
    return {
        "network": _Case("network", list(_uneven(planes.numpy())), logits, tolerance),
        "crops": _Case("crops", list(_uneven(crops.numpy())), from_crops, CROP_TOLERANCE),
        "pixels": _Case("pixels", whole, from_pixels, PIXEL_TOLERANCE),
    }


def _row(case: _Case, runtime: str, folder: Path, name: str, names: Sequence[str]) -> Row:
    graph = case.graph
    try:
        answers = RUNTIMES[runtime](folder, name, graph, case.batches)
    except Missing as error:
        return Row(graph, runtime, skipped=str(error))
    except Crashed as error:
        return Row(graph, runtime, worst=f"all images: {error}")
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if runtime in INSTALLED:
            raise ParityError(f"{runtime} cannot run the {graph} graph: {reason}") from error
        return Row(graph, runtime, skipped=f"it cannot run this graph ({reason})")
    got = torch.from_numpy(np.concatenate(answers.outputs))
    milliseconds = 1000 * answers.seconds / len(names)
    return compare(graph, runtime, answers.version, case.reference, got, case.tolerance, names, milliseconds)


def _compare_levels(expected: Tensor, resized: Tensor, names: Sequence[str]) -> Row:
    levels = (expected.int() - resized.int()).abs().flatten(1).double()  # (N, H * W * 3)
    largest = float(levels.max())
    return Row(
        "resize",
        "Pillow",
        PIL.__version__,
        images=len(levels),
        max_difference=largest,
        mean_difference=float(levels.mean()),
        top1_agreement=1.0,
        tolerance=LEVEL_TOLERANCE,
        worst=names[int(levels.max(dim=1).values.argmax())],
        passed=largest <= LEVEL_TOLERANCE,
    )


def _runs_of_equal_size(images: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    for _, same in groupby(images, key=lambda image: image.shape):
        yield list(same)


def _uneven(batch: np.ndarray) -> Iterator[np.ndarray]:
    """Slices of changing length, so that a batch size baked into a graph is found."""
    start, turn = 0, 0
    while start < len(batch):
        yield batch[start : start + BATCHES[turn % len(BATCHES)]]
        start, turn = start + BATCHES[turn % len(BATCHES)], turn + 1
