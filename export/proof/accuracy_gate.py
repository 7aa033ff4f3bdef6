"""The accuracy gate: whether an int8 or fp16 file is kept, judged on the whole test split and on the clock.

The crop graphs are compared. A file that is shown to lose accuracy against fp32, or wins too little time, is dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export import text_table
from export.graphs.quantization import versions
from export.proof import clock, sessions
from export.proof.sessions import THREADS

# Two correct predictions of 372 that int8 lost are no proof that it is worse, nor are 0.6 points of them: a loss counts
# where the two files' predictions for the same images show it (McNemar 1947, exact), or where it is both of these.
SIGNIFICANCE = 0.05
MAX_LOSS = 0.5  # points of top-1 accuracy on the test split
FEW_IMAGES = 2
KEEP = ("auto", "always", "never")
Z = 1.959964  # standard deviations on either side of the mean that hold 95% of a normal distribution
MIN_SPEEDUP = {"int8": 2.5, "fp16": 1.0}  # times fp32 ONNX Runtime
BATCH = {"int8": 1, "fp16": 32}  # images, on the clock: a CPU answers at once, a GPU worker fills its batches
ROUNDS = 40  # of the clock


@dataclass(frozen=True)
class Rules:
    """What a file must do to be kept."""

    max_loss: float = MAX_LOSS  # points of accuracy that may be lost, unless the loss is shown to be none by chance
    # times fp32, by precision; asked for only where the hardware has what the precision is for
    min_speedup: Mapping[str, float] = field(default_factory=lambda: MIN_SPEEDUP)
    keep: str = "auto"  # one of KEEP: `always` and `never` overrule the rest


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images."""

    count: int  # images
    lost: int  # that the first one names correctly and the second does not
    won: int  # the reverse

    @property
    def loss_points(self) -> float:
        """Of top-1 accuracy; negative where it gained."""
        return 100 * (self.lost - self.won) / self.count

    @property
    def p_value(self) -> float:
        return mcnemar(self.lost, self.won)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the loss, 95%, in points."""
        low, high = paired_interval(self.lost, self.won, self.count)
        return 100 * low, 100 * high

    def fault(self, max_loss: float) -> str:
        """Why so many lost images are held against the second one; empty if they are not."""
        low, high = self.interval
        said = f"loses {self.loss_points:.2f} points of accuracy (95% interval {low:+.2f} to {high:+.2f})"
        if self.lost > self.won and self.p_value < SIGNIFICANCE:
            return f"{said}, more than chance: {self.lost} images lost, {self.won} won"
        if self.loss_points > max_loss and self.lost - self.won > FEW_IMAGES:
            return f"{said}, more than {max_loss:g}"
        return ""


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
    lost: int  # images that fp32 names correctly and this does not
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


def judge(
    fp32: Path,
    candidates: Mapping[str, Path],
    test: Iterable[tuple[np.ndarray, np.ndarray]],
    rules: Rules | None = None,
) -> list[ReducedRow]:
    """Compares crop graphs with that in fp32.

    Args:
        candidates: files by precision.
        test: batches of crops uint8 (n, S, S, 3) and their targets int64 (n,); at least one.
    """
    files = {"fp32": fp32, **candidates}
    loaded = {key: sessions.open_session(path, _provider(key)) for key, path in files.items()}
    correct, first = _correct(loaded, test)
    rows = []
    for precision, path in candidates.items():
        speed = _speed(precision, fp32, path, first)
        note = json.loads(loaded[precision].get_modelmeta().custom_metadata_map.get("quantisation", "{}"))
        rows.append(_row(precision, path.name, correct, speed, note, rules or Rules()))
    return rows


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p-value of McNemar's exact test: of images that only one of two classifiers gets correct, as
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


def table(rows: list[ReducedRow]) -> str:
    """The rows as text, for the terminal."""
    head = ("precision", "file", "images", "fp32 top-1", "top-1", "loss, points (95%)", "speed", "verdict")
    return text_table.aligned([head, *map(_cells, rows)])


def milliseconds(
    files: Mapping[str, Path], crops: np.ndarray, provider: str = "CPUExecutionProvider", rounds: int = ROUNDS
) -> dict[str, float]:
    """Median time of one call of each crop graph, on `THREADS` threads; they take turns, so that noise meets all."""
    loaded = {key: sessions.open_session(path, provider, THREADS) for key, path in files.items()}
    return clock.milliseconds(
        {key: partial(sessions.probabilities, one, crops) for key, one in loaded.items()}, rounds=rounds
    )


def has_vnni() -> bool:
    """Whether an x86 processor multiplies bytes in one instruction; without it int8 gains little and may saturate."""
    info = Path("/proc/cpuinfo")
    return info.exists() and re.search(r"\bavx(512)?_vnni\b", info.read_text()) is not None


def _cells(row: ReducedRow) -> tuple[str, ...]:
    loss = f"{row.loss_points:+.2f} ({row.interval[0]:+.2f} to {row.interval[1]:+.2f})"
    speed = "" if row.speedup is None else f"×{row.speedup:.2f}"
    verdict = ("kept" if row.kept else "NOT kept") + (f": {row.reason}" if row.reason else "")
    return (
        *(row.precision, row.file, str(row.images), f"{row.accuracy_fp32:.2%}", f"{row.accuracy:.2%}"),
        *(loss, speed, verdict),
    )


def _row(
    precision: str,
    file: str,
    correct: Mapping[str, np.ndarray],
    speed: tuple[float | None, list[str]],
    note: Mapping[str, Any],
    rules: Rules,
) -> ReducedRow:
    """The verdict on one file.

    Args:
        correct: as `_correct` gives it.
        speed: as `_speed` gives it.
        note: how it was calibrated, by the file itself.
    """
    before, after = correct["fp32"], correct[precision]
    paired = Paired(len(before), lost=int((before & ~after).sum()), won=int((after & ~before).sum()))
    speedup, unjudged = speed
    faults = [fault] if (fault := paired.fault(rules.max_loss)) else []
    if speedup is not None and not unjudged and speedup < rules.min_speedup[precision]:
        faults.append(f"×{speedup:.2f} as fast as fp32, less than ×{rules.min_speedup[precision]:g}")
    asked = [f"--keep-reduced {rules.keep}"] * (rules.keep != "auto")
    return ReducedRow(
        precision,
        file,
        images=paired.count,
        accuracy_fp32=float(before.mean()),
        accuracy=float(after.mean()),
        loss_points=paired.loss_points,
        interval=paired.interval,
        lost=paired.lost,
        won=paired.won,
        p_value=paired.p_value,
        speedup=speedup,
        batch=BATCH[precision],
        threads=THREADS,
        kept=rules.keep == "always" or (rules.keep == "auto" and not faults),
        reason="; ".join([*asked, *faults, *unjudged]),
        calibration_images=note.get("images", 0),
        seed=note.get("seed"),
        versions=versions(),
    )


def _correct(
    loaded: Mapping[str, Any], test: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Whether each session names each image correctly, bool (N,), and the first images."""
    correct: dict[str, list[np.ndarray]] = {key: [] for key in loaded}
    first: np.ndarray | None = None
    for crops, targets in test:
        first = crops if first is None else first
        for key, session in loaded.items():
            correct[key].append(sessions.probabilities(session, crops).argmax(axis=1) == targets)
    assert first is not None, "there is at least one batch"
    return {key: np.concatenate(parts) for key, parts in correct.items()}, first


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
