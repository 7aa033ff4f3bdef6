"""What a worker counts for Prometheus, told to TorchServe once a second; metrics.yaml lists it.

TorchServe takes a metric as a line of the worker's log, which it parses: a line for each image would cost more than
the image. And its histograms have buckets that suit neither probabilities nor batches, so ours are counters with the
label `le`, cumulative as Prometheus' own, and histogram_quantile works on them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

INTERVAL = 1.0  # seconds between two reports; as many are lost when a worker is killed

CONFIDENCE = "classifier_confidence_bucket_total"
BATCH_SIZE = "classifier_batch_size_bucket_total"
STAGE = "classifier_stage_seconds_bucket_total"
BUCKETS = {
    CONFIDENCE: (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, math.inf),
    BATCH_SIZE: (1, 2, 4, 8, 16, 32, 64, 128, 256, math.inf),  # images
    STAGE: (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, math.inf),
}

# TorchServe splits a metric's line at these, and has no way to quote them.
_RESERVED = {ord(sign): f"%{ord(sign):02X}" for sign in "%,:|#\n\r"}

Labels = tuple[str, ...]


class Measures:
    """Sums since the last report."""

    def __init__(self, metrics: Any, model: str, version: str) -> None:
        """
        Args:
            metrics: TorchServe's cache of metrics, or None where nobody listens.
        """
        self._metrics, self._of_all = metrics, (model, version)
        self._counts: defaultdict[str, Counter[Labels]] = defaultdict(Counter)
        self._buckets: defaultdict[tuple[str, Labels], Counter[int]] = defaultdict(Counter)  # of BUCKETS
        self._lock = threading.Lock()
        if metrics is not None:
            threading.Thread(target=self._report_for_ever, daemon=True, name="measures").start()

    def begin(self, causes: Iterable[str], labels: Iterable[str], stages: Iterable[str]) -> None:
        """Every series with 0: Prometheus' rate() sees no increase in a series that begins with its first event."""
        with self._lock:
            self._counts["classifier_images_total"].update({(cause,): 0 for cause in ("ok", *causes)})
            self._counts["classifier_predictions_total"].update({(label,): 0 for label in labels})
            self._counts["classifier_batches_total"][()] += 0
            for name in (CONFIDENCE, BATCH_SIZE):
                self._buckets[name, ()][0] += 0
            for stage in stages:
                self._counts["classifier_stage_seconds_total"][stage,] += 0
                self._buckets[STAGE, (stage,)][0] += 0

    def add(self, outcomes: Sequence[str], best: Sequence[tuple[str, float]], seconds: Mapping[str, float]) -> None:
        """Counts a batch.

        Args:
            outcomes: of each image: "ok", or its error's type.
            best: label and probability of each that is ok.
            seconds: spent, by stage.
        """
        bounds = BUCKETS[CONFIDENCE]
        with self._lock:
            counts, buckets = self._counts, self._buckets
            counts["classifier_images_total"]["ok",] += len(best)
            if len(best) < len(outcomes):
                counts["classifier_images_total"].update([(outcome,) for outcome in outcomes if outcome != "ok"])
            counts["classifier_predictions_total"].update([(label,) for label, _ in best])
            counts["classifier_batches_total"][()] += 1
            buckets[CONFIDENCE, ()].update([bisect_left(bounds, probability) for _, probability in best])
            buckets[BATCH_SIZE, ()][bisect_left(BUCKETS[BATCH_SIZE], len(outcomes))] += 1
            for stage, spent in seconds.items():
                counts["classifier_stage_seconds_total"][stage,] += spent  # type: ignore[assignment]
                buckets[STAGE, (stage,)][bisect_left(BUCKETS[STAGE], spent)] += 1

    def gauge(self, name: str, value: float) -> None:
        """Told at once."""
        try:
            if self._metrics is not None:
                self._tell(name, "gauge", value, ())
        except Exception as error:
            self._give_up(error)

    def report(self) -> None:
        """Tells what has come since the last report."""
        with self._lock:
            counts, buckets = self._counts, self._buckets
            self._counts, self._buckets = defaultdict(Counter), defaultdict(Counter)
        for name, of_name in counts.items():
            for labels, value in of_name.items():
                self._tell(name, "counter", value, labels)
        for (name, labels), of_bucket in buckets.items():
            total = 0
            for index, bound in enumerate(BUCKETS[name]):
                total += of_bucket[index]
                self._tell(name, "counter", total, (*labels, "+Inf" if bound == math.inf else f"{bound:g}"))

    def _report_for_ever(self) -> None:
        while self._metrics is not None:
            time.sleep(INTERVAL)
            try:
                self.report()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """For a metric that the server's metrics.yaml lacks, as TorchServe's own does: one warning; it serves on."""
        with self._lock:
            if self._metrics is not None:
                logging.warning("no metrics of the handler: %s; start with this project's metrics.yaml", error)
            self._metrics = None

    def _tell(self, name: str, kind: str, value: float, labels: Labels) -> None:
        from ts.metrics.metric_type_enum import MetricTypes

        metric = self._metrics.get_metric(name, MetricTypes(kind))
        values = (*self._of_all, *labels)
        pairs = (
            f"{key}:{value.translate(_RESERVED)}" for key, value in zip(metric.dimension_names, values, strict=True)
        )
        number = f"{value:.9f}".rstrip("0").rstrip(".")  # TorchServe reads 1e-05 as 1
        metric.emit_metrics("", number, ",".join(pairs))
