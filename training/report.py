"""The report of a run: curves, confusion matrix and most confident mistakes as PNG, and a page that shows them."""

from __future__ import annotations

import csv
import html
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.files import atomic_write, write_text
from model.spec import ModelSpec
from training.data import Split

MOST_NAMED_CLASSES = 40  # more tick labels than this cannot be read
MISTAKES = 24
CONFUSIONS = 20  # rows of the table of confused pairs


def write_report(
    folder: Path, spec: ModelSpec, metrics: dict[str, Any], history: Path, test: Split, logits: Tensor
) -> None:
    """Writes `index.html`, `curves.png`, `confusion.png` and `mistakes.png` into `folder`.

    Args:
        history: history.csv of the run.
        logits: float32 (N, C), of the N pictures of `test`.
    """
    probabilities = logits.softmax(dim=1)
    confusion = confusion_matrix(probabilities.argmax(dim=1), test.targets, len(spec.labels))
    _save(folder / "curves.png", _draw_curves(history))
    _save(folder / "confusion.png", _draw_confusion(confusion, spec.labels))
    _save(folder / "mistakes.png", _draw_mistakes(test, probabilities, spec.labels))
    write_text(folder / "index.html", _page(spec, metrics, confusion))


def confusion_matrix(predicted: Tensor, targets: Tensor, classes: int) -> np.ndarray:
    """int64 (C, C): row the truth, column the answer."""
    return torch.bincount(targets * classes + predicted, minlength=classes**2).view(classes, classes).numpy()


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
    epochs = [int(row["epoch"]) for row in rows]
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


def _draw_confusion(confusion: np.ndarray, labels: tuple[str, ...]) -> Any:
    classes = len(labels)
    side = min(4 + 0.35 * classes, 14)
    figure, axes = _figure(side + 1, side)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="answer", ylabel="truth", title="test pictures, each row adds up to 1")
    figure.colorbar(image, ax=axes, shrink=0.8)
    if classes <= MOST_NAMED_CLASSES:
        names = [_short(label) for label in labels]
        axes.set_xticks(range(classes), names, rotation=60, ha="right", parse_math=False)  # a label may hold two $
        axes.set_yticks(range(classes), names, parse_math=False)
    if classes <= 20:
        for row, column in np.argwhere(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=8, color=colour)
    return figure


def _draw_mistakes(test: Split, probabilities: Tensor, labels: tuple[str, ...]) -> Any:
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != test.targets).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES].tolist()
    if not worst:
        figure, axes = _figure(6, 1.2)
        axes.axis("off")
        axes.text(0.5, 0.5, "no mistakes on the test pictures", ha="center", va="center", fontsize=14)
        return figure
    columns = min(8, len(worst))
    rows = -(-len(worst) // columns)
    figure, grid = _figure(1.7 * columns, 2.2 * rows, nrows=rows, ncols=columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, place in zip(grid.flat, worst, strict=False):
        axes.imshow(test.crops(slice(place, place + 1))[0].numpy())
        answer, truth = labels[predicted[place]], labels[test.targets[place]]
        title = f"{_short(answer)} {confidence[place]:.0%}\ntruth: {_short(truth)}"
        axes.set_title(title, fontsize=8, parse_math=False)
    return figure


def _page(spec: ModelSpec, metrics: dict[str, Any], confusion: np.ndarray) -> str:
    test, train = metrics["test"], metrics["train"]
    facts = {
        "architecture": f"{spec.arch}, {train['parameters']:,} parameters",
        "trained on": spec.trained_on,
        "test accuracy": f"{test['accuracy']:.2%} of {test['pictures']:,} pictures",
        "test top-5": f"{test['top5']:.2%}",
        "macro F1": f"{test['macro']['f1']:.4f}",
        "calibration error": f"{test['ece']:.4f} ({test['ece_uncalibrated']:.4f} without temperature)",
        "validation accuracy": f"{metrics['val']['accuracy']:.2%} (epoch {train['best_epoch']})",
        "training": f"{train['epochs']} epochs in {train['seconds']:.0f} s on {train['device']}",
        "pixels": f"centred square, {spec.size}×{spec.size} px (short edge {spec.resize})",
        "weights SHA-256": spec.weights_sha256,
    }
    per_class = [
        (label, f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['f1']:.3f}", row["pictures"])
        for label, row in test["per_class"].items()
    ]
    off = confusion - np.diag(np.diag(confusion))
    pairs = [divmod(int(i), len(spec.labels)) for i in off.flatten().argsort()[::-1][:CONFUSIONS]]
    confused = [(spec.labels[t], spec.labels[a], int(off[t, a])) for t, a in pairs if off[t, a]]
    return _PAGE.format(
        title=html.escape(f"{spec.arch} on {spec.trained_on}"),
        facts=_table((), facts.items()),
        per_class=_table(("class", "precision", "recall", "F1", "pictures"), per_class),
        confused=_table(("truth", "answer", "pictures"), confused) if confused else "<p>None.</p>",
    )


def _table(head: tuple[str, ...], rows: Any) -> str:
    def line(cells: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _short(label: str) -> str:
    return label if len(label) <= 16 else label[:15] + "…"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }}
  h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }}
  table {{ border-collapse: collapse; }}
  td, th {{ text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #8884; overflow-wrap: anywhere; }}
  img {{ max-width: 100%; height: auto; background: white; border-radius: 6px; }}
</style>
<h1>{title}</h1>
{facts}
<h2>Curves</h2>
<img src="curves.png" alt="loss, accuracy and learning rate over the epochs">
<h2>Confusion matrix</h2>
<img src="confusion.png" alt="confusion matrix of the test pictures">
<h2>Most often confused</h2>
{confused}
<h2>Most confident mistakes</h2>
<img src="mistakes.png" alt="test pictures that were answered wrongly with the highest probability">
<h2>Each class, test pictures</h2>
{per_class}
</html>
"""
