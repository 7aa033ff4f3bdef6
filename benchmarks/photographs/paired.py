"""Two classifiers on the same images: who is correct where the other is not, and what the difference is known to be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import binomtest

Z = 1.959964  # of a 95% interval


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent values, and its 95% interval (Wald's: mean ± 1.96 standard errors).

    For one run's 0s and 1s it is the interval of a proportion; for differences of two such runs that of a paired
    difference, √(b + c - (b - c)² / n) / n being the standard error (Agresti, Categorical Data Analysis, 11.1.1).
    """
    mean = float(values.mean())
    half = Z * float(values.std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def compare(ours: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """McNemar's counts, and the difference of accuracy with its 95% interval.

    Args:
        ours, other: bool (S, N), whether the prediction of the run with seed s for image n is correct.

    Returns:
        only_ours, only_other, both, neither: how many predictions, of all seeds together.
        difference, low, high: ours - other; the images are what varies. An image's seeds are averaged first, so that
            more seeds do not pass for more images.
        p: of McNemar's exact test, two-sided; of one seed only, for the test takes predictions as independent.
    """
    only_ours, only_other = int((ours & ~other).sum()), int((~ours & other).sum())
    difference, low, high = interval((ours.astype(float) - other).mean(axis=0))
    found = {
        "only_ours": only_ours,
        "only_other": only_other,
        "both": int((ours & other).sum()),
        "neither": int((~ours & ~other).sum()),
        "difference": difference,
        "low": low,
        "high": high,
    }
    if len(ours) == 1:
        discordant = only_ours + only_other
        found["p"] = float(binomtest(only_ours, discordant).pvalue) if discordant else 1.0
    return found


def macro_f1(targets: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """The plain mean of the classes' F1; 0 for a class that is never predicted correctly."""
    table = np.zeros((classes, classes))
    np.add.at(table, (targets, predicted), 1)
    hits, sums = np.diag(table), table.sum(axis=0) + table.sum(axis=1)
    return float((2 * hits / np.maximum(sums, 1)).mean())
