"""The images that travel in the archive with their answers; predictor/golden_check.py checks them when a worker starts.

Whoever has the archive can look at them. They are the run's samples as the network sees them, drawn anew from their
pixels, so that no metadata comes along (EXIF with its GPS position, names of files); or synthetic ones.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from export.proof import images, sessions
from model.serving_graphs import Classifier
from predictor.backends import FILES, HALF_TOLERANCE, load
from predictor.files import write_text
from predictor.golden_check import EXACT, FILE, tolerance
from predictor.pillow_preprocessing import crop, read
from predictor.spec import ModelSpec, PixelRule

IMAGES = 8
SOURCES = ("samples", "synthetic")
JPEG_QUALITY = 95

Classify = Callable[[np.ndarray], np.ndarray]  # crops uint8 (N, S, S, 3) to probabilities float32 (N, C)


@dataclass(frozen=True)
class Answered:
    """The golden images with the answers of eager PyTorch."""

    source: str  # one of SOURCES
    bodies: list[bytes]  # image files
    labels: list[str]  # of the largest probability
    crops: np.ndarray  # uint8 (N, S, S, 3), what the network sees of them
    probabilities: np.ndarray  # float32 (N, C)


def answered(run: Path, classifier: Classifier, spec: ModelSpec, source: str = "samples") -> Answered:
    """
    Args:
        source: `samples` of the run, or `synthetic` images, with none of the user's.
    """
    bodies = [_encode(pixels, i) for i, pixels in enumerate(_SOURCES[source](run, spec))]
    crops = np.stack([read(body, spec.rule) for body in bodies])
    with torch.inference_mode():
        probabilities = classifier.classify_crops(torch.from_numpy(crops)).numpy()
    return Answered(source, bodies, [spec.labels[row.argmax()] for row in probabilities], crops, probabilities)


def write(golden: Answered, folder: Path, name: str, backend: str) -> dict[str, float]:
    """Writes folder/golden.json.

    Args:
        folder: that of the exported files.
        backend: what the archive's CPU workers run, one of predictor.backends.FILES.

    Returns:
        For each file that can serve, the largest difference of a probability from the golden ones.

    Raises:
        ValueError: the backend is not within its own tolerance of PyTorch.
    """
    expected, files = golden.probabilities, servable(folder, name)
    seen = {file: float(np.abs(classify(golden.crops) - expected).max()) for file, classify in files.items()}
    served = FILES[backend].format(name)
    if backend != "onnx-int8" and seen[served] > EXACT:
        raise ValueError(
            f"{backend} is {seen[served]:.2g} of a probability off on the golden images, {EXACT} is allowed"
        )
    content = {
        "source": golden.source,
        "images": [
            {"name": f"{i} ({label})", "b64": base64.b64encode(body).decode()}
            for i, (body, label) in enumerate(zip(golden.bodies, golden.labels, strict=True))
        ],
        "probabilities": [[round(value, 7) for value in row] for row in expected.tolist()],
        "tolerance": {"cpu": tolerance(served, seen[served]), "gpu": HALF_TOLERANCE},
    }
    write_text(folder / FILE, json.dumps(content, ensure_ascii=False) + "\n")
    return seen


def servable(folder: Path, name: str) -> dict[str, Classify]:
    """Each exported file that a worker could run, by its name."""
    files = {file.format(name): backend for backend, file in FILES.items()}
    found = {file: load(backend, folder, name) for file, backend in files.items() if (folder / file).is_file()}
    half = f"{name}.crops.fp16.onnx"
    if (folder / half).is_file():
        found[half] = sessions.runner(folder / half)
    return found


def _samples(run: Path, spec: ModelSpec) -> list[np.ndarray]:
    files = images.sample_files(run / "samples")
    chosen = [files[i * len(files) // IMAGES] for i in range(IMAGES)] if len(files) > IMAGES else files
    return [_shrunk(images.decode_sample(path, spec.colour), spec.rule) for path in chosen]


def _synthetic(run: Path, spec: ModelSpec) -> list[np.ndarray]:
    """Soft patches of random colours, of a grid that is finer in each next one."""
    draw = np.random.default_rng(0)
    grids = [draw.integers(0, 256, (i + 2, i + 2, 3), np.uint8) for i in range(IMAGES)]
    wider = _before_its_margin(spec.rule)
    return [crop(Image.fromarray(grid), replace(wider, interpolation="bicubic", fit="squash")) for grid in grids]


def _shrunk(image: Image.Image, rule: PixelRule) -> np.ndarray:
    """The image with the margin that the rule cuts away, and no larger than it needs to be."""
    if rule.fit == "crop":
        return crop(image, _before_its_margin(rule))
    image.thumbnail((2 * rule.width, 2 * rule.height))
    return np.asarray(image)


def _before_its_margin(rule: PixelRule) -> PixelRule:
    """The rule whose shorter side is `resize`: of its result, the rule cuts out the middle without resizing it."""
    least = min(rule.height, rule.width)
    height, width = (round(side * rule.resize / least) for side in (rule.height, rule.width))
    return replace(rule, height=height, width=width, resize=min(height, width))


_SOURCES = {"samples": _samples, "synthetic": _synthetic}


def _encode(pixels: np.ndarray, i: int) -> bytes:
    """A JPEG or a PNG file in turns, so that both decoders are checked; its pixels are the truth from here on.

    Args:
        pixels: uint8 (H, W, 3).
    """
    file = io.BytesIO()
    if i % 2:
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
