"""Images that travel in the archive with their answers: a worker that answers them otherwise does not serve.

golden.json, written by export: `images` [{"name", "b64"}], `probabilities` (N, C) of eager PyTorch, and `tolerance`,
of a probability, by what the worker runs on. So a processor on which int8 overflows, a library that decodes otherwise
and a file that was mixed up are found when the worker starts, not by a client.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from predictor.backends import HALF_TOLERANCE

FILE = "golden.json"
EXACT = 1e-3  # of a probability: fp32 in another runtime or processor; parity was proven within a tenth of it
INT8 = 0.02  # the same for int8, or twice what it departs from fp32 on these images, if that is more
RATIO_OF_NAN = 1e6  # the ratio where a probability is NaN, which TorchServe's metrics cannot hold


class Golden:
    """The images of an archive; none where it has no golden.json, as archives made by hand may not."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        if not path.is_file():
            logging.warning("%s is not in the archive: its answers are not checked", FILE)
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"images": []}
        self.names = [image["name"] for image in content["images"]]
        self.bodies = [base64.b64decode(image["b64"]) for image in content["images"]]
        self.expected = np.array(content.get("probabilities", []), dtype=np.float32)  # (N, C)
        self.tolerance: dict[str, float] = content.get("tolerance", {})

    def compare(
        self, classify: Callable[[list[bytes]], np.ndarray], device: str, count: int | None = None
    ) -> tuple[float, str]:
        """The largest difference of a probability over the first `count` images, or all, by what is allowed.

        Args:
            classify: files of images to probabilities float32 (N, C).
            device: `cpu` or `gpu`.

        Returns:
            The difference over the tolerance, finite: above 1 it is wrong; and what is wrong, or "".
        """
        bodies = self.bodies[:count]
        if not bodies:
            return 0.0, ""
        differences = np.abs(classify(bodies) - self.expected[: len(bodies)]).max(axis=1)
        worst = int(np.argmax(differences))  # a NaN counts as the largest
        difference, tolerance = float(differences[worst]), self.tolerance[device]
        if difference <= tolerance:
            return difference / tolerance, ""
        return difference / tolerance if math.isfinite(difference) else RATIO_OF_NAN, (
            f"golden image {self.names[worst]}: a probability is {difference:.2g} off, and {tolerance:g} is allowed; "
            "this archive answers wrongly on this machine: export again, with another --backend if it was int8"
        )

    def check(self, classify: Callable[[list[bytes]], np.ndarray], device: str, count: int | None = None) -> float:
        """As `compare`, the ratio.

        Raises:
            ValueError: it is above 1; the message names the image.
        """
        ratio, complaint = self.compare(classify, device, count)
        if complaint:
            raise ValueError(complaint)
        return ratio


def tolerance(file: str, seen: float) -> float:
    """Of a probability: how far a crop graph may be from the golden answers.

    Args:
        file: its name.
        seen: how far it was when it was exported.
    """
    if ".int8." in file:
        return max(INT8, round(2 * seen, 3))
    return HALF_TOLERANCE if ".fp16." in file else EXACT
