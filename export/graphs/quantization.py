"""Smaller ONNX files, kept only where they earn it: int8 for CPUs, half precision (fp16) for GPUs.

    python -m export runs/NAME --int8 --fp16

int8 is ONNX Runtime's static quantisation (Jacob et al. 2018): activations uint8, weights int8 with a scale for each
channel, written as QuantizeLinear and DequantizeLinear, which are plain ONNX. The crop graph is judged, on the whole
test split and on the clock. A file that is shown to lose accuracy, or that wins too little time, is not written.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from tqdm import tqdm

from export.graphs import exported_program
from export.graphs import onnx as onnx_files
from export.proof import clock, images
from model.serving_graphs import Classifier
from model.tensor_preprocessing import normalise
from predictor.files import atomic_write
from predictor.pillow_preprocessing import ImageError, read
from predictor.spec import ModelSpec

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when ONNX Runtime is imported, which the functions do

# Two right answers of 372 that int8 lost are no proof that it is worse, nor are 0.6 points of them: a loss counts where
# the two files' answers to the same images show it (McNemar 1947, exact), or where it is both of these.
SIGNIFICANCE = 0.05
MAX_LOSS = 0.5  # points of top-1 accuracy on the test split
FEW_IMAGES = 2
KEEP = ("auto", "always", "never")
Z = 1.959964  # standard deviations on either side of the mean that hold 95% of a normal distribution
MIN_SPEEDUP = {"int8": 2.5, "fp16": 1.0}  # times fp32 ONNX Runtime

CALIBRATION = 512  # training images
SEED = 0  # of their choice
THREADS = 1  # as a TorchServe worker runs
BATCH = {"int8": 1, "fp16": 32}  # images, on the clock: a CPU answers at once, a GPU worker fills its batches
ROUNDS = 40  # of the clock
CHUNK = 64  # images decoded at a time, so that a test split of any size fits in memory

# What has integer kernels on CPUs and bears rounding. Softmax, normalisation and the sigmoids stay in float: 256 levels
# are few for them, and with them in int8 too mobilenet_v3_small and efficientnet_b0 stayed below ×1.2 of fp32's speed.
OPERATORS = (
    *("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Reshape", "Flatten"),
)


@dataclass(frozen=True)
class ReducedRow:
    """How one precision did, as its crop graph, against fp32 ONNX Runtime."""

    precision: str  # int8 or fp16
    file: str  # the crop graph's; the network graph's is kept or dropped with it
    images: int  # of the test split
    accuracy_fp32: float
    accuracy: float
    loss_points: float  # of top-1 accuracy; negative where it gained
    interval: tuple[float, float]  # of the loss, 95%
    lost: int  # images that fp32 names rightly and this does not
    won: int  # the reverse
    p_value: float  # of as many lost by chance, were the two equally good
    speedup: float | None  # times fp32; None where it was not measured
    batch: int  # images, when the speed was measured
    threads: int
    kept: bool
    reason: str
    calibration_images: int
    seed: int | None  # of the choice of the calibration images
    versions: Mapping[str, str]


def reduce_run(
    run: Path,
    folder: Path,
    name: str,
    spec: ModelSpec,
    classifier: Classifier,
    data: str | None = None,
    *,
    int8: bool,
    fp16: bool,
    max_loss: float = MAX_LOSS,
    min_speedup: Mapping[str, float] = MIN_SPEEDUP,
    keep: str = "auto",
) -> list[ReducedRow]:
    """Makes the smaller files of an export, judges them, and keeps the good ones in `folder`, where the fp32 ones lie.

    Args:
        data: where the run's data lies now, if not where config.yaml says.
        keep: `always` or `never`, whatever the judgement, or `auto`.

    Raises:
        ValueError: the data cannot be found, or is not what the run was trained on.
        RuntimeError: the network cannot be quantised, or not be expressed in half precision.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".reduced-") as temporary:
        made = Path(temporary)
        if int8:
            make_int8(spec, folder / f"{name}.onnx", calibration_crops(run, spec, data), made, name)
        if fp16:
            make_fp16(classifier, spec, made, name)
        crops = {precision: made / f"{name}.crops.{precision}.onnx" for precision in ("int8", "fp16")}
        candidates = {precision: path for precision, path in crops.items() if path.exists()}
        rows = judge(
            folder / f"{name}.crops.onnx",
            candidates,
            labelled_crops(run, spec, data),
            max_loss=max_loss,
            min_speedup=min_speedup,
            keep=keep,
        )
        for row in rows:
            for file in (f"{name}.{row.precision}.onnx", row.file):
                (folder / file).unlink(missing_ok=True)
                if row.kept:
                    (made / file).replace(folder / file)
    return rows


def make_int8(
    spec: ModelSpec, network_onnx: Path, calibration: np.ndarray, folder: Path, name: str, seed: int = SEED
) -> None:
    """Writes NAME.int8.onnx and, around the same network, NAME.crops.int8.onnx.

    Args:
        network_onnx: the network graph in fp32.
        calibration: uint8 (N, S, S, 3), RGB: training images, which set the range of each activation.
        seed: of their choice; recorded in the files, not used.

    Raises:
        RuntimeError: it became more than plain ONNX of our opset.
    """
    network = _quantise(network_onnx, _planes(spec, calibration))
    _keep_logits_float(network.graph)
    note = {
        "format": "QDQ",
        "activations": "uint8",
        "weights": "int8, per channel",
        "calibration": "MinMax",
        "images": len(calibration),
        "seed": seed,
        "versions": _versions(),
    }
    for model, file in ((network, f"{name}.int8.onnx"), (_crop_graph(network, spec), f"{name}.crops.int8.onnx")):
        _write(model, folder / file, {"spec": spec.to_json(), "quantisation": json.dumps(note)})


def make_fp16(classifier: Classifier, spec: ModelSpec, folder: Path, name: str) -> None:
    """Writes NAME.fp16.onnx and NAME.crops.fp16.onnx: half precision inside, the inputs and outputs of the fp32 files.

    Raises:
        RuntimeError: the network cannot be expressed so.
    """
    models = onnx_files.build(exported_program.trace(Classifier(_Half(classifier.network), spec).eval()))
    onnx_files.write(models["network"], spec, folder / f"{name}.fp16.onnx")
    onnx_files.write(models["crops"], spec, folder / f"{name}.crops.fp16.onnx")


def judge(
    fp32: Path,
    candidates: Mapping[str, Path],
    test: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    max_loss: float = MAX_LOSS,
    min_speedup: Mapping[str, float] = MIN_SPEEDUP,
    keep: str = "auto",
) -> list[ReducedRow]:
    """Compares crop graphs with that in fp32.

    Args:
        candidates: files by precision.
        test: batches of crops uint8 (n, S, S, 3) and their targets int64 (n,); at least one.
        max_loss: points of top-1 accuracy that may be lost, unless the loss is shown to be none by chance.
        min_speedup: times fp32, by precision; asked for only where the hardware has what the precision is for.
        keep: one of KEEP.
    """
    sessions = {"fp32": _session(fp32), **{key: _session(path, _provider(key)) for key, path in candidates.items()}}
    right, shown = _right(sessions, test)
    count, before = len(right["fp32"]), right["fp32"]
    rows = []
    for precision, path in candidates.items():
        after = right[precision]
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        p_value, interval = mcnemar(lost, won), paired_interval(lost, won, count)
        speedup, unjudged = _speed(precision, fp32, path, shown)
        faults = [fault] if (fault := _loss(lost, won, count, max_loss)) else []
        if speedup is not None and not unjudged and speedup < min_speedup[precision]:
            faults.append(f"×{speedup:.2f} as fast as fp32, less than ×{min_speedup[precision]:g}")
        kept = keep == "always" or (keep == "auto" and not faults)
        asked = [f"--keep-reduced {keep}"] * (keep != "auto")
        note = json.loads(sessions[precision].get_modelmeta().custom_metadata_map.get("quantisation", "{}"))
        row = ReducedRow(
            precision,
            path.name,
            images=count,
            accuracy_fp32=float(before.mean()),
            accuracy=float(after.mean()),
            loss_points=100 * (lost - won) / count,
            interval=(100 * interval[0], 100 * interval[1]),
            lost=lost,
            won=won,
            p_value=p_value,
            speedup=speedup,
            batch=BATCH[precision],
            threads=THREADS,
            kept=kept,
            reason="; ".join([*asked, *faults, *unjudged]),
            calibration_images=note.get("images", 0),
            seed=note.get("seed"),
            versions=_versions(),
        )
        rows.append(row)
    return rows


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p-value of McNemar's exact test: of images that only one of two classifiers names rightly, as
    many or more on one side, were each side as likely (McNemar 1947).
    """
    total, fewer = lost + won, min(lost, won)
    if total > 1000:  # the normal approximation with continuity correction: the sum below is of huge integers
        return math.erfc(max(abs(lost - won) - 1, 0) / math.sqrt(2 * total))
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def paired_interval(lost: int, won: int, count: int) -> tuple[float, float]:
    """The 95% interval of the loss as a share of `count` images that both classifiers saw (Agresti and Min 2005)."""
    b, c, n = lost + 0.5, won + 0.5, count + 2
    centre, half = (b - c) / n, Z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return centre - half, centre + half


def _loss(lost: int, won: int, count: int, max_loss: float) -> str:
    """Why so many lost images are held against a file; empty if they are not."""
    loss = 100 * (lost - won) / count
    low, high = (100 * end for end in paired_interval(lost, won, count))
    said = f"loses {loss:.2f} points of accuracy (95% interval {low:+.2f} to {high:+.2f})"
    if lost > won and mcnemar(lost, won) < SIGNIFICANCE:
        return f"{said}, more than chance: {lost} images lost, {won} won"
    if loss > max_loss and lost - won > FEW_IMAGES:
        return f"{said}, more than {max_loss:g}"
    return ""


def table(rows: list[ReducedRow]) -> str:
    """The rows as text, for the terminal."""
    lines = [("precision", "file", "images", "fp32 top-1", "top-1", "loss, points (95%)", "speed", "verdict")]
    for row in rows:
        speed = "" if row.speedup is None else f"×{row.speedup:.2f}"
        loss = f"{row.loss_points:+.2f} ({row.interval[0]:+.2f} to {row.interval[1]:+.2f})"
        numbers = (f"{row.accuracy_fp32:.2%}", f"{row.accuracy:.2%}", loss, speed)
        verdict = ("kept" if row.kept else "NOT kept") + (f": {row.reason}" if row.reason else "")
        lines.append((row.precision, row.file, str(row.images), *numbers, verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def calibration_crops(
    run: Path, spec: ModelSpec, data: str | None = None, count: int = CALIBRATION, seed: int = SEED
) -> np.ndarray:
    """uint8 (n, S, S, 3): `count` of the training images, drawn with `seed`, less those that cannot be read.

    Raises:
        ValueError: the data cannot be found, or none of them can be read.
    """
    bodies = (body for _, _, body in _shown(images.read(run, "train", data), "training images"))
    crops = [found for found in _crops(images.sample(bodies, count, seed), spec) if found is not None]
    if not crops:
        raise ValueError(f"{run}: no training image can be read; pass --data with what it was trained on")
    return np.stack(crops)


def labelled_crops(run: Path, spec: ModelSpec, data: str | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole test split in parts, as `judge` takes it; images that cannot be read are left out.

    Raises:
        ValueError: the data cannot be found, has a class that the spec has not, or has no readable test image.
    """
    index, count = {label: i for i, label in enumerate(spec.labels)}, 0
    items = iter(_shown(images.read(run, "test", data), "test images"))
    while chunk := list(islice(items, CHUNK)):
        if unknown := sorted({label for _, label, _ in chunk} - index.keys()):
            raise ValueError(f"{run}: '{unknown[0]}' is none of its labels; pass --data with what it was trained on")
        found = zip(_crops([body for _, _, body in chunk], spec), (index[label] for _, label, _ in chunk), strict=True)
        good = [(crops, target) for crops, target in found if crops is not None]
        if good:
            count += len(good)
            yield np.stack([crops for crops, _ in good]), np.array([target for _, target in good])
    if not count:
        raise ValueError(f"{run}: no test image can be read; pass --data with what it was trained on")


def milliseconds(
    files: Mapping[str, Path], crops: np.ndarray, provider: str = "CPUExecutionProvider", rounds: int = ROUNDS
) -> dict[str, float]:
    """Median time of one call of each crop graph, on `THREADS` threads; they take turns, so that noise meets all."""
    sessions = {key: _session(path, provider, THREADS) for key, path in files.items()}
    return clock.milliseconds({key: partial(_run, one, crops) for key, one in sessions.items()}, rounds=rounds)


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The crop graph of a file as a function from crops uint8 (N, S, S, 3) to probabilities (N, C), on the CPU."""
    return partial(_run, _session(path, threads=THREADS))


def outputs(path: Path, batch: np.ndarray) -> np.ndarray:
    """What a graph of one input and one output gives for the batch, on the CPU."""
    session = _session(path, threads=THREADS)
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def has_vnni() -> bool:
    """Whether an x86 processor multiplies bytes in one instruction; without it int8 gains little and may saturate."""
    info = Path("/proc/cpuinfo")
    return info.exists() and re.search(r"\bavx(512)?_vnni\b", info.read_text()) is not None


class _Half(nn.Module):
    """A network in half precision whose input and output stay float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, planes: Tensor) -> Tensor:
        return self.network(planes.half()).float()


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterator[np.ndarray]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch}


def _right(
    sessions: Mapping[str, Any], test: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Whether each session names each image rightly, bool (N,), and the first images."""
    right: dict[str, list[np.ndarray]] = {key: [] for key in sessions}
    first: np.ndarray | None = None
    for crops, targets in test:
        first = crops if first is None else first
        for key, session in sessions.items():
            right[key].append(_run(session, crops).argmax(axis=1) == targets)
    assert first is not None, "there is at least one batch"
    return {key: np.concatenate(parts) for key, parts in right.items()}, first


def _quantise(network_onnx: Path, batches: Iterator[np.ndarray]) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static

    with tempfile.TemporaryDirectory() as temporary:
        prepared, quantised = Path(temporary) / "prepared.onnx", Path(temporary) / "quantised.onnx"
        quant_pre_process(network_onnx, prepared, skip_symbolic_shape=True)  # the exporter wrote all shapes
        quantize_static(
            prepared,
            quantised,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            # int8 activations would be slower than fp32: VNNI multiplies unsigned bytes by signed ones
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=list(OPERATORS),
            # simplecnn on 5,000 test images of CIFAR-10, fp32 65.54%: MinMax and Entropy 65.76%, Percentile 65.62%;
            # the last two keep every activation of every image in memory, gigabytes for 512 images of 224 px
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(quantised)


def _planes(spec: ModelSpec, crops: np.ndarray, batch: int = 16) -> Iterator[np.ndarray]:
    """float32 (n, 3, S, S), normalised."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    for part in torch.from_numpy(crops).split(batch):
        yield normalise(part, mean, std).contiguous().numpy()


def _keep_logits_float(graph: onnx.GraphProto) -> None:
    """Takes the rounding of the output away: nothing computes with it, and 256 levels would make near ties equal."""
    made_by = {output: node for node in graph.node for output in node.output}
    last = made_by["logits"]
    if last.op_type != "DequantizeLinear":
        return
    rounding = made_by[last.input[0]]
    made_by[rounding.input[0]].output[0] = "logits"
    for node in (last, rounding):
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _crop_graph(network: onnx.ModelProto, spec: ModelSpec) -> onnx.ModelProto:
    """`Classifier.classify_crops` around a network graph; what is around it stays in float."""
    std, mean = np.array(spec.std, np.float32), np.array(spec.mean, np.float32)
    # Repeated for a whole row of pixels: ONNX Runtime moves the Transpose away, since its int8 convolution takes NHWC,
    # and a broadcast whose inner loop is 3 long would take a tenth of int8 ResNet-18's time at 224 px.
    values = {
        "crops.scale": np.tile(1 / (255 * std), (spec.size, 1)),
        "crops.shift": np.tile(mean / std, (spec.size, 1)),
        "crops.temperature": np.array([spec.temperature], np.float32),
    }
    make, float32 = onnx.helper.make_node, onnx.TensorProto.FLOAT
    before = [
        make("Cast", ["images"], ["crops.pixels"], "crops.cast", to=float32),
        make("Mul", ["crops.pixels", "crops.scale"], ["crops.scaled"], "crops.mul"),
        make("Sub", ["crops.scaled", "crops.shift"], ["crops.normalised"], "crops.sub"),
        make("Transpose", ["crops.normalised"], ["input"], "crops.transpose", perm=[0, 3, 1, 2]),
    ]
    after = [
        make("Div", ["logits", "crops.temperature"], ["crops.logits"], "crops.div"),
        make("Softmax", ["crops.logits"], ["probabilities"], "crops.softmax", axis=1),
    ]
    model = copy.deepcopy(network)
    graph = model.graph
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, key) for key, value in values.items())
    declare = onnx.helper.make_tensor_value_info
    graph.input.append(declare("images", onnx.TensorProto.UINT8, ("batch", spec.size, spec.size, 3)))
    graph.output.append(declare("probabilities", float32, ("batch", len(spec.labels))))
    return model


def _write(model: onnx.ModelProto, path: Path, properties: dict[str, str]) -> None:
    domains = {node.domain for node in model.graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in domains]  # ONNX Runtime lists all it knows
    if (found := [(entry.domain, entry.version) for entry in opsets]) != [("", onnx_files.OPSET)]:
        raise RuntimeError(f"{path.name}: quantisation gave operators of {found}, not ONNX's opset {onnx_files.OPSET}")
    del model.opset_import[:], model.graph.value_info[:]  # the shapes too are those of before
    model.opset_import.extend(opsets)
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as file:
        file.write(model.SerializeToString(deterministic=True))


def _speed(precision: str, fp32: Path, path: Path, crops: np.ndarray) -> tuple[float | None, list[str]]:
    """Times fp32, and why that is not held against the file, if it is not."""
    provider = _provider(precision)
    if precision == "fp16" and provider == "CPUExecutionProvider":
        return None, ["speed not measured: no GPU"]
    batch = np.resize(crops, (BATCH[precision], *crops.shape[1:]))  # repeats where there are fewer
    took = milliseconds({"fp32": fp32, precision: path}, batch, provider)
    no_vnni = precision == "int8" and not has_vnni()
    return took["fp32"] / took[precision], ["speed not judged: this processor has no VNNI"] * no_vnni


def _provider(precision: str) -> str:
    import onnxruntime

    gpu = "CUDAExecutionProvider"
    there = torch.cuda.is_available() and gpu in onnxruntime.get_available_providers()  # it may be built in and useless
    return gpu if precision == "fp16" and there else "CPUExecutionProvider"


def _session(path: Path, provider: str = "CPUExecutionProvider", threads: int = 0) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # 0: one for each core
    return onnxruntime.InferenceSession(path, options, providers=[provider])


def _run(session: Any, crops: np.ndarray) -> np.ndarray:
    return session.run(["probabilities"], {"images": crops})[0]


def _crops(bodies: list[bytes], spec: ModelSpec) -> list[np.ndarray | None]:
    """The squares that the network sees, uint8 (S, S, 3); None for an image that cannot be read."""

    def one(body: bytes) -> np.ndarray | None:
        try:
            return read(body, spec.size, spec.resize)
        except ImageError:  # left out of training too, by --skip-bad
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, bodies))


def _shown(items: Iterable[tuple[str, str, bytes]], what: str) -> Iterable[tuple[str, str, bytes]]:
    return tqdm(items, desc=what, unit="images", leave=False, disable=None)  # on a terminal only


def _versions() -> dict[str, str]:
    import onnxruntime

    return {module.__name__: str(module.__version__) for module in (onnxruntime, onnx, torch)}
