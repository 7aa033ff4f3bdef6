"""How good a classifier is, from the logits of a split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEARLY_ALL = 0.95  # share of the images with the same prediction, from which on a network is said to be stuck


def score(logits: Tensor, targets: Tensor, labels: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Accuracy, top-5, loss, calibration, and precision, recall and F1 for each class and as a plain mean.

    Args:
        logits: float32 (N, C).
        targets: int64 (N,).

    Returns:
        Numbers 0..1 (the loss in nats), ready for JSON. With fewer than 5 classes "top5" counts them all; precision is
        0 for a class that is never predicted, and recall for one without images; "macro", their mean, leaves the
        classes without images out. "baseline" is the accuracy of giving every image the label of the largest class;
        "most_predicted" the label that is predicted most, with its share.
    """
    predicted = logits.argmax(dim=1)
    best = logits.topk(min(5, len(labels)), dim=1).indices
    correct, given, present = (
        torch.bincount(indices, minlength=len(labels)).double()
        for indices in (targets[predicted == targets], predicted, targets)
    )
    precision, recall = correct / given.clamp(min=1), correct / present.clamp(min=1)
    f1 = 2 * correct / (given + present).clamp(min=1)
    share, most = (given / len(targets)).max(dim=0)
    per_class = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
        for label, p, r, f, n in zip(labels, precision, recall, f1, present, strict=True)
    }
    return {
        "accuracy": float((predicted == targets).float().mean()),
        "top5": float((best == targets[:, None]).any(dim=1).float().mean()),
        "loss": float(torch.nn.functional.cross_entropy(logits, targets)),
        "ece": expected_calibration_error(logits.softmax(dim=1), targets),
        "images": len(targets),
        "baseline": float(present.max() / len(targets)),
        "most_predicted": {"label": labels[int(most)], "share": float(share)},
        "macro": {
            name: float(values[present > 0].mean())
            for name, values in (("precision", precision), ("recall", recall), ("f1", f1))
        },
        "per_class": per_class,
    }


def one_label_for_all(scores: dict[str, Any]) -> str:
    """The label that nearly all images of a `score` are given, although they do not all have it; or ""."""
    label, share = scores["most_predicted"]["label"], scores["most_predicted"]["share"]
    own = scores["per_class"][label]["images"] / scores["images"]
    return label if share >= NEARLY_ALL and own < NEARLY_ALL * share else ""


def calibrated_score(
    logits: Tensor, targets: Tensor, labels: list[str] | tuple[str, ...], temperature: float
) -> dict[str, Any]:
    """`score` of the logits divided by `temperature`, and the calibration error without that: "ece_uncalibrated"."""
    uncalibrated = expected_calibration_error(logits.softmax(dim=1), targets)
    return {**score(logits / temperature, targets, labels), "ece_uncalibrated": uncalibrated}


def expected_calibration_error(probabilities: Tensor, targets: Tensor, bins: int = 15) -> float:
    """The mean gap between confidence and accuracy over equal bins of confidence (Guo et al. 2017, 15 bins).

    Args:
        probabilities: (N, C); targets: (N,).
    """
    confidence, predicted = probabilities.max(dim=1)
    correct = (predicted == targets).float()
    indices = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are open below, closed above
    gaps = torch.zeros(bins).scatter_add_(0, indices, confidence - correct)
    return float(gaps.abs().sum() / len(targets))
