"""Attribution maps of the top label: integrated gradients (Sundararajan, Taly and Yan 2017, arXiv:1703.01365).

The gradient of the label's logit by the pixels, averaged over the way from a grey image (the training data's mean) to
the image, times the distance. The sums of what is for and against the label add up to the difference of the logits at
both ends, whatever the network. It needs PyTorch, which a worker loads at its first explanation.
"""

from __future__ import annotations

import io
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from handler import errors

STEPS = 32  # points on the way
AT_ONCE = 4  # of them in one pass, so that the clock is looked at between
SECONDS = 10.0  # for all explanations of a batch: TorchServe replaces a worker that takes longer than 30
SHOWN = 224  # px, the least side of the image that is answered
CELLS = 32  # a side, over which the strengths are averaged: single pixels say little to the eye
STRONG = 99  # percentile of the strengths that gets the full colour
FOR, AGAINST = (220, 30, 30), (30, 90, 220)  # RGB


class Explainer:
    """The network of NAME.pt, loaded when it is first asked."""

    def __init__(self, path: Path, gpu: int | None, threads: int = 1) -> None:
        self._path, self._device, self._threads = path, "cpu" if gpu is None else f"cuda:{gpu}", threads
        self._module: Any = None

    def attributions(self, crop: np.ndarray, index: int, until: float) -> np.ndarray:
        """Integrated gradients of one logit by one crop.

        Args:
            crop: uint8 (H, W, 3), RGB.
            index: of the label.
            until: `time.monotonic()` at which to stop.

        Returns:
            float32 (H, W): in logits, summed over the colours; above 0 is for the label.

        Raises:
            ImageError: `no_time`.
        """
        import torch

        module = self._load()
        with torch.no_grad():
            planes = module.to_planes(torch.from_numpy(crop[None].copy()).to(self._device))  # (1, 3, H, W)
        gradient = torch.zeros_like(planes)
        points = (torch.arange(STEPS, device=planes.device, dtype=planes.dtype) + 0.5) / STEPS  # middles of the steps
        for some in points.split(AT_ONCE):
            if time.monotonic() > until:
                raise errors.no_time_to_explain(SECONDS)
            inputs = (planes * some.view(-1, 1, 1, 1)).requires_grad_()
            logits = module.network(inputs)
            gradient += torch.autograd.grad(logits[:, index].sum(), inputs)[0].sum(dim=0, keepdim=True)
        return (gradient / STEPS * planes)[0].sum(dim=0).cpu().numpy()

    def _load(self) -> Any:
        if self._module is None:
            import torch

            torch.set_num_threads(self._threads)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*torch\.jit\..*", category=DeprecationWarning)
                self._module = torch.jit.load(str(self._path), map_location=self._device).eval()
            for parameter in self._module.parameters():
                parameter.requires_grad_(False)
        return self._module


def overlay(crop: np.ndarray, attributions: np.ndarray) -> bytes:
    """A PNG of the crop in grey, with what is for the label in red and what is against it in blue.

    Args:
        crop: uint8 (H, W, 3), RGB.
        attributions: float32 (H, W).
    """
    height, width, _ = crop.shape
    longest = max(height, width)
    shown = _times(max(SHOWN, longest) / longest, width, height)
    cells = _times(min(CELLS, longest) / longest, width, height)
    coarse = Image.fromarray(attributions).resize(cells, Image.Resampling.BOX)
    strength = np.asarray(coarse.resize(shown, Image.Resampling.BICUBIC))
    strength = np.clip(strength / max(np.percentile(np.abs(strength), STRONG), 1e-12), -1, 1)
    grey = Image.fromarray(crop).convert("L").resize(shown, Image.Resampling.BICUBIC)
    colour = np.where(strength[..., None] > 0, np.array(FOR, np.float32), np.array(AGAINST, np.float32))
    alpha = 0.7 * np.abs(strength)[..., None]
    pixels = np.asarray(grey, dtype=np.float32)[..., None] * (1 - alpha) + colour * alpha
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _times(scale: float, width: int, height: int) -> tuple[int, int]:
    return max(1, round(scale * width)), max(1, round(scale * height))
