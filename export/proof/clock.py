"""Times calls fairly: they take turns, so that the noise of a machine meets all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP = 3  # rounds that do not count: TorchScript optimises in its first calls
LEAST = 3  # rounds that do


def milliseconds(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float = math.inf
) -> dict[str, float]:
    """Median time of each call, over `rounds`, or fewer once `seconds` have passed."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    deadline = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= LEAST and time.perf_counter() > deadline:
            break
        for key, call in calls.items():
            started = time.perf_counter()
            call()
            times[key].append(1000 * (time.perf_counter() - started))
    return {key: statistics.median(values) for key, values in times.items()}
