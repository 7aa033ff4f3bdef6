"""The watch after the switch: does the new version fail more than it may?"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import requests

from deploy.rollout.archive import Archive
from deploy.rollout.errors import Failed, reason
from deploy.rollout.torchserve_client import TorchServeClient

TICK = 0.5  # seconds between two looks

log = logging.getLogger("rollout")


def watch_errors(
    archive: Archive,
    server: TorchServeClient,
    pids: set[int],
    before: dict[str, float] | None,
    seconds: float,
    max_errors: float,
) -> None:
    """Sends golden images for so long, and looks at the workers and at the failed requests of all clients.

    A few failures weigh little until the watch's own requests would outweigh them: of the first two requests one that
    fails would be half of them.

    Args:
        pids: of the new version's workers.
        before: the counters before the switch; None where there are no metrics.
        max_errors: share of the requests that may fail.

    Raises:
        Failed: more requests failed than `max_errors` allows, a prediction was wrong, or a worker has died.
    """
    if before is None:
        log.info("there are no metrics to read: only images of its own and the workers are watched; see --metrics")
    started, probes = time.monotonic(), _Probes(archive, server)
    while True:
        probes.send()
        if server.workers(archive.name, archive.version) != pids:
            raise Failed(f"a worker of {archive.version} has died")
        errors, total = probes.failed + probes.lost, probes.sent
        now = server.counters()
        if before and now:
            errors = probes.lost + round(_growth(before, now, "Requests5XX{"))
            of_model = f'ts_inference_requests_total{{model_name="{archive.name}"'
            total = max(probes.sent, round(_growth(before, now, of_model)))
        if errors > max_errors * max(total, seconds / TICK):
            example = f", the last of its own: {probes.last_failure}" if probes.last_failure else ""
            raise Failed(f"{errors} of {total} requests failed, and --max-errors is {max_errors:g}{example}")
        left = started + seconds - time.monotonic()
        if left <= 0:
            log.info(f"{errors} of {total} requests failed")
            return
        time.sleep(min(TICK, left))


@dataclass
class _Probes:
    """The watch's own requests, golden images to the default version, and what became of them."""

    archive: Archive
    server: TorchServeClient
    sent: int = 0
    failed: int = 0  # got an error; the server has counted these too
    lost: int = 0  # got no response
    last_failure: str = ""

    def send(self) -> None:
        """
        Raises:
            Failed: the prediction is wrong.
        """
        i = self.sent % len(self.archive.images)
        self.sent += 1
        try:
            response = self.server.predict(self.archive.name, self.archive.images[i])
        except requests.RequestException as error:
            self.lost, self.last_failure = self.lost + 1, reason(error)
            return
        if mismatch := self.archive.mismatch(i, response):
            if response.ok:
                raise Failed(mismatch)
            self.failed, self.last_failure = self.failed + 1, mismatch


def _growth(before: dict[str, float], after: dict[str, float], prefix: str) -> float:
    """Of all series of that prefix together."""
    return sum(value - before.get(series, 0.0) for series, value in after.items() if series.startswith(prefix))
