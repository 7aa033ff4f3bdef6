"""From the bytes of images to predictions: `Predictor`, opened from an archive, an unpacked one, or an export folder.

    predictor = Predictor.open(Path("runs/digits/export/digits.mar"))
    predictor.predict([Path("seven.png").read_bytes()])  # [{"7": 0.98, "1": 0.01, …}]

What an archive is served with stands in its model-config.yaml, and is kept here: backend, threads, topk, max_pixels.
TorchServe's handler adds the time that a batch has; the batch job and the command line use this class as it is.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from predictor import backends
from predictor.golden_check import FILE as GOLDEN
from predictor.golden_check import Golden
from predictor.pillow_preprocessing import MAX_PIXELS, NO_MEMORY, ImageError, crop, read
from predictor.spec import ModelSpec

Prediction = dict[str, float]  # label to probability, best first

BATCH = 64  # images that `predict` decodes and puts through the network at a time
CONFIG, ARCHIVE_MANIFEST = "model-config.yaml", "MAR-INF/MANIFEST.json"
MOST_TEXT = 64_000_000  # bytes of a text inside an archive: a zip file can promise terabytes


class Predictor:
    """A model that is ready to predict."""

    def __init__(
        self,
        spec: ModelSpec,
        classify_crops: backends.Classify,
        golden: Golden,
        *,
        topk: int = 5,
        max_pixels: int | None = MAX_PIXELS,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            classify_crops: uint8 (N, height, width, 3), RGB, to probabilities float32 (N, C).
            topk: labels of a prediction; fewer where the model has fewer.
            max_pixels: of one image, checked in its header before anything is decoded; None for no limit.
            device: `cpu` or `gpu`, by which the golden images allow a difference.
        """
        self.spec, self.golden, self.topk, self.max_pixels = spec, golden, topk, max_pixels
        self.probabilities = classify_crops
        self._rule, self._labels, self._device = spec.rule, spec.labels, device

    @classmethod
    def load(cls, folder: Path, name: str, settings: Mapping[str, Any], *, gpu: int | None = None) -> Predictor:
        """The model of an unpacked archive.

        Args:
            folder: holds spec.json, golden.json and the files of the graphs.
            name: of the model, as its files have it.
            settings: of model-config.yaml.
            gpu: number of the GPU, or None for the CPU.

        Raises:
            ValueError: the spec, a setting or a file breaks its rule; the message names it.
        """
        spec = ModelSpec.load(folder / "spec.json")
        topk, max_pixels = setting(settings, "topk", 5), setting(settings, "max_pixels", MAX_PIXELS)
        backend, threads = settings.get("backend", "torchscript"), setting(settings, "threads", 1)
        classify_crops = backends.load(backend, folder, name, threads=threads, gpu=gpu)
        device = "cpu" if gpu is None else "gpu"
        return cls(spec, classify_crops, Golden(folder), topk=topk, max_pixels=max_pixels, device=device)

    @classmethod
    def open(cls, path: Path, *, gpu: int | None = None) -> Predictor:
        """The model of an archive NAME.mar, of a folder into which one was unpacked, or of an export folder.

        Of an archive no program is run, and nothing but the spec, the golden images, the settings and the graph is
        unpacked, into a temporary folder that is gone when this returns.

        Raises:
            ValueError: `path` is none of these, or a file in it is damaged or breaks its rule; the message names it.
            ImportError: its backend is not installed.
        """
        with tempfile.TemporaryDirectory(prefix="predictor-") as temporary:
            where = _find(path, Path(temporary))
            return cls.load(where.folder, where.name, where.settings, gpu=gpu)

    def decode(self, body: bytes, elsewhere: Callable[[bytes], np.ndarray] | None = None) -> np.ndarray:
        """An image file to the crop that the network sees, uint8 (height, width, 3), RGB.

        Args:
            elsewhere: reads what is not plain, in the place of this process.

        Raises:
            ImageError: see there for the causes.
        """
        return read(body, self._rule, self.max_pixels, elsewhere)

    def crop(self, pixels: np.ndarray) -> np.ndarray:
        """The same of an image that is decoded already, uint8 (H, W, 3), RGB."""
        return crop(Image.fromarray(pixels), self._rule)

    def rank(self, probabilities: np.ndarray) -> list[Prediction]:
        """Probabilities float32 (N, C) to N predictions of the best labels."""
        labels = self._labels
        indices = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.topk]
        values = np.take_along_axis(probabilities, indices, axis=1)
        return [
            {labels[index]: value for index, value in zip(row_indices, row_values, strict=True)}
            for row_indices, row_values in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def infer(self, crops: np.ndarray) -> list[Prediction]:
        """Crops uint8 (N, height, width, 3), RGB, to N predictions."""
        return self.rank(self.probabilities(crops))

    def predict(self, bodies: Sequence[bytes]) -> list[Prediction | ImageError]:
        """A prediction for each image file, in order, or the error that stands for it: one never costs another."""
        outcomes: list[Prediction | ImageError] = []
        for start in range(0, len(bodies), BATCH):
            crops = [self._decoded(body) for body in bodies[start : start + BATCH]]
            good = [crop for crop in crops if isinstance(crop, np.ndarray)]
            predictions = iter(self.infer(np.stack(good)) if good else ())
            outcomes += [crop if isinstance(crop, ImageError) else next(predictions) for crop in crops]
        return outcomes

    def compare_golden(self, count: int | None = None) -> tuple[float, str]:
        """How far the first `count` golden images are from their answers, or all: see `Golden.compare`."""
        return self.golden.compare(self._of_golden, self._device, count)

    def check_golden(self) -> None:
        """
        Raises:
            ValueError: a golden image is answered wrongly on this machine; the message names it.
        """
        self.golden.check(self._of_golden, self._device)

    def _of_golden(self, bodies: list[bytes]) -> np.ndarray:
        return self.probabilities(np.stack([read(body, self._rule) for body in bodies]))

    def _decoded(self, body: bytes) -> np.ndarray | ImageError:
        try:
            return self.decode(body)
        except ImageError as error:
            return error.bare()
        except MemoryError:
            return ImageError("too_many_pixels", NO_MEMORY)
        except Exception as error:  # of a decoder: one file must not end a job of millions
            return ImageError("truncated", f"the image cannot be read ({type(error).__name__}: {error})")


def setting(settings: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number of model-config.yaml.

    Raises:
        ValueError: it is something else.
    """
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"model-config.yaml: '{name}' is {value!r}; it must be a whole number above 0")
    return value


def read_settings(text: str) -> dict[str, Any]:
    """The settings of model-config.yaml that stand on a line of their own: numbers and words.

    PyYAML is not among what a predictor needs.
    """
    lines = re.findall(r"(?m)^(\w+):[ \t]+(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\s#'\"][^\s#]*))", text)
    return {name: _plain(plain) if plain else double or single for name, double, single, plain in lines}


def _plain(text: str) -> str | int:
    """A word without quotes as YAML 1.1 reads it, whose whole numbers include 50_000_000, 0x10, 0b11 and 010 (8)."""
    if not re.fullmatch(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)", text):
        return text
    digits = text.replace("_", "")
    return int(digits, 8 if re.match(r"[-+]?0[0-7]", digits) else 0)


# What is named


@dataclass(frozen=True)
class _Model:
    """Where the files of a model lie, and what it is served with."""

    folder: Path
    name: str
    settings: dict[str, Any]


def _find(path: Path, temporary: Path) -> _Model:
    if path.is_file():
        return _packed(path, temporary)
    if not path.is_dir():
        raise ValueError(f"{path}: no such archive or folder; `python -m export RUN` makes one")
    if (path / ARCHIVE_MANIFEST).is_file():
        return _unpacked(path, str(path))
    folder = path / "export" if (path / "export").is_dir() else path
    folder = folder.parent if folder.name == "archive" and not any(folder.glob("*.pt")) else folder
    archives = sorted(folder.glob("*.mar"))
    own = [archive for archive in archives if archive.with_suffix(".pt").is_file()]  # a rollout keeps NAME-VERSION.mar
    if len(own) != 1:
        found = "no model" if not own else f"{len(own)} models"
        raise ValueError(f"{path}: has {found}; name an archive NAME.mar, or the folder of an export")
    return _packed(own[0], temporary)


def _unpacked(folder: Path, source: str) -> _Model:
    try:
        name = json.loads((folder / ARCHIVE_MANIFEST).read_text(encoding="utf-8"))["model"]["serializedFile"]
        settings = read_settings((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{CONFIG} or {ARCHIVE_MANIFEST} is missing or damaged: {_line(error)}"
        raise ValueError(f"{source}: no archive of this project ({reason}); `python -m export RUN` makes one") from None
    if not isinstance(name, str) or PurePosixPath(name).name != name:
        raise ValueError(f"{source}: its manifest names {name!r} as model; export again")
    return _Model(folder, PurePosixPath(name).stem, settings)


def _packed(archive: Path, folder: Path) -> _Model:
    """Unpacks what is needed of an archive, after its members' names were checked."""
    try:
        with zipfile.ZipFile(archive) as packed:
            names = packed.namelist()
            _check_names(archive, names)
            for text in (ARCHIVE_MANIFEST, CONFIG, "spec.json", GOLDEN):
                if text in names and packed.getinfo(text).file_size > MOST_TEXT:
                    raise ValueError(f"{archive}: {text} is larger than {MOST_TEXT:,} bytes; get it from its maker")
                if text in names:
                    packed.extract(text, folder)
            model = _unpacked(folder, str(archive))
            served = {pattern.format(model.name) for pattern in backends.FILES.values()}
            for name in served & set(names):
                packed.extract(name, folder)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive}: no whole archive ({_line(error)}); `python -m export RUN` makes one") from None
    return model


def _check_names(archive: Path, names: Sequence[str]) -> None:
    way_out = "get the archive from its maker"
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{archive}: its member {name!r} lies outside of it; {way_out}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{archive}: its member {twice[0]!r} is inside twice; {way_out}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
