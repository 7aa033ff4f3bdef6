"""The report of a run: a page (report.html.j2) with the confusion matrix and the mistakes, and PNG files that it shows.

Labels and file names stand in the page alone, which has the reader's fonts: those of the plots know no Chinese.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataset.decoded_images import Data, Split
from predictor.files import atomic_write, write_text
from predictor.spec import ModelSpec

TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_NAMED_CLASSES = 40  # more rows and columns than this are shown without labels
MISTAKES = 24
COLUMNS = 8  # of batch.png and mistakes.png
TILE = 128  # px, side of each of its images
CONFUSIONS = 20  # rows of the table of confused pairs


def write_report(
    folder: Path,
    spec: ModelSpec,
    metrics: dict[str, Any],
    history: Path,
    data: Data,
    logits: Tensor,
    batch: tuple[Tensor, Sequence[str]],
) -> None:
    """Writes `index.html`, `curves.png`, `batch.png`, `confusion.png` and `mistakes.png` into `folder`.

    Args:
        history: history.csv of the run.
        logits: float32 (N, C), of the N images of `data.test`.
        batch: some augmented training images, uint8 (n, H, W, 3), and a caption for each.
    """
    probabilities = logits.softmax(dim=1)
    confusion = confusion_matrix(probabilities.argmax(dim=1), data.test.targets, len(spec.labels))
    mistakes = most_confident_mistakes(probabilities, data.test.targets)
    _save(folder / "curves.png", _draw_curves(history))
    _save(folder / "confusion.png", _draw_confusion(confusion))
    tiles = {"batch.png": batch[0], "mistakes.png": data.test.crops(torch.tensor(mistakes, dtype=torch.int64))}
    for name, images in tiles.items():
        with atomic_write(folder / name) as file:
            _draw_tiles(images).save(file, "PNG")
    page = _template().render(
        title=f"{spec.arch} on {spec.trained_on}",
        tile=TILE,
        columns=COLUMNS,
        facts=_facts(spec, metrics),
        captions=batch[1],
        labels=spec.labels,
        matrix=_matrix(confusion, spec.labels),
        confused=_confused(confusion, spec.labels),
        mistakes=_mistakes(mistakes, data.test, probabilities, spec.labels),
        classes=_classes(metrics, data),
    )
    write_text(folder / "index.html", page)


def confusion_matrix(predicted: Tensor, targets: Tensor, classes: int) -> np.ndarray:
    """int64 (C, C): row the truth, column the prediction."""
    return torch.bincount(targets * classes + predicted, minlength=classes**2).view(classes, classes).numpy()


def most_confident_mistakes(probabilities: Tensor, targets: Tensor) -> list[int]:
    """Indices of up to MISTAKES images, the most confident mistake first."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != targets).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True)][:MISTAKES].tolist()


def _figure(width: float, height: float, **keywords: Any) -> tuple[Any, Any]:
    """A figure without a window system and without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**keywords)


def _save(path: Path, figure: Any) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _draw_curves(history: Path) -> Any:
    with history.open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [float(row["epoch"]) for row in rows]  # the last one may be a part of one
    marker = "o" if len(rows) < 30 else ""
    figure, (left, middle, right) = _figure(12, 3.6, ncols=3)
    for axes, kind in ((left, "loss"), (middle, "accuracy")):
        for split, style in (("train", "--"), ("val", "-")):
            axes.plot(epochs, [float(row[f"{split}_{kind}"]) for row in rows], style, marker=marker, ms=3, label=split)
        axes.set(title=kind, xlabel="epoch")
        axes.legend()
    right.plot(epochs, [float(row["lr"]) for row in rows], marker=marker, ms=3, color="tab:green")
    right.set(title="learning rate at the end of the epoch", xlabel="epoch")
    for axes in (left, middle, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure


def _draw_confusion(confusion: np.ndarray) -> Any:
    side = min(4 + 0.35 * len(confusion), 14)
    figure, axes = _figure(side + 1, side)
    image = axes.imshow(_shares(confusion), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction, by the class's number", ylabel="truth", title="test images, each row adds up to 1")
    figure.colorbar(image, ax=axes, shrink=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return figure


def _draw_tiles(crops: Tensor) -> Image.Image:
    """The images, uint8 (N, H, W, 3), side by side in rows of COLUMNS, each within TILE×TILE px."""
    rows = max(1, -(-len(crops) // COLUMNS))
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * TILE), "white")
    for i, crop in enumerate(crops):
        is_small = max(crop.shape) <= TILE
        kind = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS  # few pixels stay visible
        tile = ImageOps.pad(Image.fromarray(crop.numpy()), (TILE, TILE), kind, "white")
        sheet.paste(tile, (i % COLUMNS * TILE, i // COLUMNS * TILE))
    return sheet


def _shares(confusion: np.ndarray) -> np.ndarray:
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def _facts(spec: ModelSpec, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    test, train = metrics["test"], metrics["train"]
    top5 = [("test top-5", f"{test['top5']:.2%}")] if len(spec.labels) > 5 else []  # else all are among them
    return [
        ("architecture", f"{spec.arch}, {train['parameters']:,} parameters"),
        ("trained on", spec.trained_on),
        ("test accuracy", f"{test['accuracy']:.2%} of {test['images']:,} images"),
        ("baseline", f"{test['baseline']:.2%}: all of them given the label of the largest class"),
        *top5,
        ("macro F1", f"{test['macro']['f1']:.4f}"),
        ("calibration error", f"{test['ece']:.4f} ({test['ece_uncalibrated']:.4f} without temperature)"),
        ("validation accuracy", f"{metrics['val']['accuracy']:.2%} (epoch {train['best_epoch']:g})"),
        ("training", f"{train['epochs']:g} epochs in {train['seconds']:.0f} s on {train['device']}"),
        ("pixels", spec.rule.in_words()),
        ("weights SHA-256", spec.weights_sha256),
    ]


def _matrix(confusion: np.ndarray, labels: tuple[str, ...]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Each label with the counts of its row and their shares of it; nothing of very many classes, whose labels would
    leave no room for them."""
    if len(labels) > MOST_NAMED_CLASSES:
        return []
    rows = zip(confusion.tolist(), _shares(confusion).tolist(), strict=True)
    cells = [list(zip(counts, shares, strict=True)) for counts, shares in rows]
    return list(zip(labels, cells, strict=True))


def _confused(confusion: np.ndarray, labels: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """Truth, prediction and number of images, of the pairs that are most often confused."""
    off = confusion - np.diag(np.diag(confusion))
    pairs = [divmod(int(i), len(labels)) for i in off.flatten().argsort()[::-1][:CONFUSIONS]]
    return [(labels[t], labels[a], int(off[t, a])) for t, a in pairs if off[t, a]]


def _mistakes(mistakes: list[int], test: Split, probabilities: Tensor, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """What stands below each image of mistakes.png."""
    return [
        {
            "prediction": labels[int(probabilities[index].argmax())],
            "probability": float(probabilities[index].max()),
            "truth": labels[int(test.targets[index])],
            "name": test.names[index].encode(errors="replace").decode(),  # it may be no UTF-8
        }
        for index in mistakes
    ]


def _classes(metrics: dict[str, Any], data: Data) -> list[tuple[Any, ...]]:
    """Label, precision, recall, F1, and the number of train, val and test images."""
    train, val = (torch.bincount(s.targets, minlength=len(data.labels)).tolist() for s in (data.train, data.val))
    return [
        (label, *(f"{row[score]:.3f}" for score in ("precision", "recall", "f1")), train[i], val[i], row["images"])
        for i, (label, row) in enumerate(metrics["test"]["per_class"].items())
    ]


def _template() -> jinja2.Template:
    """index.html; labels and names of files are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=True,
    )
    return environment.get_template(TEMPLATE.name)
