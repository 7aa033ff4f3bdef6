"""The pictures that travel in the archive with their answers; handler/golden.py checks them when a worker starts."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from handler.backends import HALF_TOLERANCE, load
from handler.golden import FILE
from model.classifier import Classifier
from model.files import write_text
from model.pictures import read
from model.spec import ModelSpec

PICTURES = 8
FILE_BYTES = 100_000  # of one picture; of a larger one its crop is taken
EXACT = 1e-3  # of a probability: fp32 in another runtime or processor; parity was proven within a tenth of it
INT8 = 0.02  # the same for int8, or twice what it departs from fp32 on these pictures, if that is more


def write(run: Path, folder: Path, name: str, spec: ModelSpec, classifier: Classifier, backend: str) -> None:
    """Writes folder/golden.json from the run's samples, with the answers of eager PyTorch.

    Args:
        folder: that of the exported files.
        backend: what the archive's CPU workers run, one of handler.backends.FILES.

    Raises:
        ValueError: the backend is not within its own tolerance of PyTorch.
    """
    files = sorted(path for path in (run / "samples").iterdir() if path.is_file())
    chosen = [files[i * len(files) // PICTURES] for i in range(PICTURES)] if len(files) > PICTURES else files
    bodies = [_small(path.read_bytes(), spec) for path in chosen]
    crops = np.stack([read(body, spec.size, spec.resize) for body in bodies])
    with torch.inference_mode():
        expected = classifier.classify_crops(torch.from_numpy(crops)).numpy()
    seen = float(np.abs(load(backend, folder, name)(crops) - expected).max())
    exact = backend != "onnx-int8"
    if exact and seen > EXACT:
        raise ValueError(f"{backend} is {seen:.2g} of a probability off on the golden pictures, {EXACT} is allowed")
    content = {
        "pictures": [
            {"name": path.name, "b64": base64.b64encode(body).decode()}
            for path, body in zip(chosen, bodies, strict=True)
        ],
        "probabilities": [[round(value, 7) for value in row] for row in expected.tolist()],
        "tolerance": {"cpu": EXACT if exact else max(INT8, round(2 * seen, 3)), "gpu": HALF_TOLERANCE},
    }
    write_text(folder / FILE, json.dumps(content, ensure_ascii=False) + "\n")


def _small(body: bytes, spec: ModelSpec) -> bytes:
    if len(body) <= FILE_BYTES:
        return body
    file = io.BytesIO()
    Image.fromarray(read(body, spec.size, spec.resize)).save(file, "PNG", optimize=True)
    return file.getvalue()
