"""The contract that training, export, serving and foreign runtimes share: `ModelSpec`, kept as `spec.json`."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from predictor.files import write_text

SPEC_VERSION = 2

LARGEST_SIZE = 4096  # px: far above any classifier in use; bounds what a damaged file can make a reader allocate


class SpecError(ValueError):
    """A spec that breaks a rule. The message names the source, the field, the rule and the way out."""


INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
FITS = ("crop", "squash", "pad")
COLOURS = ("srgb", "as-stored")


@dataclass(frozen=True, kw_only=True)
class PixelRule:
    """How an image becomes the pixels that the network sees.

    Pixels are resized with Pillow's antialiased filter `interpolation` (bicubic: a = -0.5; lanczos: 3 lobes) to
    `height`×`width`. Of an image of W×H px, `fit` says which:

        crop    the centred box of the network's aspect ratio, as large as fits, times min(height, width) / resize
        squash  the whole image, its aspect ratio lost
        pad     the whole image, as large as fits inside; `fill` around it

    `predictor.pillow_preprocessing.crop_box` and `pad_box` give the boxes in whole numbers, rounded half up.
    """

    height: int  # px
    width: int  # px
    resize: int  # px, the box's shorter side at the network's scale before the margin is cut; without crop none is
    interpolation: str = "bilinear"  # one of INTERPOLATIONS
    fit: str = "crop"  # one of FITS
    fill: tuple[int, int, int] = (0, 0, 0)  # RGB, 0..255, around a padded image
    colour: str = "srgb"  # "srgb": an embedded colour profile is converted to sRGB; "as-stored": it is ignored

    @classmethod
    def square(cls, size: int, resize: int | None = None) -> PixelRule:
        return cls(height=size, width=size, resize=resize or size)

    def in_words(self) -> str:
        """For people, in a line."""
        fits = {
            "crop": f"centre crop (shorter side {self.resize} px before it)",
            "squash": "whole image, squashed",
            "pad": f"whole image, padded with RGB {', '.join(map(str, self.fill))}",
        }
        colours = {"srgb": "colours converted to sRGB", "as-stored": "colour profiles ignored"}
        return f"{self.width}×{self.height} px, {fits[self.fit]}, {self.interpolation}, {colours[self.colour]}"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a trained classifier is, in everything that others must agree on.

    The pixel rule stands in `PixelRule`, whose fields these are; pixels / 255 are then normalised with `mean` and
    `std`. The network's logits divided by `temperature` go through softmax.

    Version 1 had `size` in the place of `height` and `width`, and only bilinear crops of colours as stored; it is read
    as such.

    Raises:
        SpecError: a field breaks its rule.
    """

    arch: str  # a name from model.registry.names()
    labels: tuple[str, ...]  # one per output of the head, in the head's order; unique
    height: int  # px, of the image that the network sees
    width: int  # px
    resize: int  # px, at least the shorter of those; equal to it, no margin is cut
    interpolation: str = "bilinear"  # one of INTERPOLATIONS
    fit: str = "crop"  # one of FITS
    fill: tuple[int, int, int] = (0, 0, 0)  # RGB, 0..255, around a padded image
    colour: str = "srgb"  # one of COLOURS
    mean: tuple[float, ...]  # RGB, for pixels in 0..1
    std: tuple[float, ...]  # RGB, for pixels in 0..1
    temperature: float = 1.0  # divides the logits; 1 leaves them as they are
    trained_on: str = ""  # for people: the data's name and the number of images
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the test split, e.g. {"accuracy": 0.98}
    weights_sha256: str = ""  # of the file model.pt
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries that trained it
    spec_version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        for name in ("labels", "fill", "mean", "std"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @property
    def rule(self) -> PixelRule:
        return PixelRule(**{field.name: getattr(self, field.name) for field in fields(PixelRule)})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "spec.json") -> ModelSpec:
        """Reads and checks a spec. `source` is what the error message calls it: a path, or an artifact.

        Raises:
            SpecError: not JSON, a field missing, unknown or out of its rule, or written by a newer version.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise SpecError(f"{source}: not JSON ({error}); re-run train.py or restore the file") from None
        if not isinstance(values, dict):
            raise SpecError(f"{source}: holds a {type(values).__name__}, not an object; re-run train.py")
        version = values.get("spec_version")
        if isinstance(version, int) and version > SPEC_VERSION:
            raise SpecError(
                f"{source}: 'spec_version' is {version} and this program reads up to {SPEC_VERSION}; "
                "use the version of this project that wrote it, or a newer one"
            )
        is_first = version == 1 and not isinstance(version, bool)
        own, rule = {f.name for f in fields(cls)}, {f.name for f in fields(PixelRule)}
        known = own - rule | {"size", "resize"} if is_first else own
        optional = {"temperature", "trained_on", "metrics", "weights_sha256", "versions"}
        if unknown := sorted(values.keys() - known):
            raise SpecError(f"{source}: unknown field '{unknown[0]}'; known are {', '.join(sorted(known))}")
        if missing := sorted(known - optional - values.keys()):
            raise SpecError(f"{source}: field '{missing[0]}' is missing; re-run train.py or add it")
        try:
            return cls(**(_of_version_1(**values) if is_first else values))
        except SpecError as error:
            raise SpecError(f"{source}: {error}") from None
        except TypeError as error:  # a list or a string where the other belongs
            raise SpecError(f"{source}: {error}; re-run train.py or fix the file") from None

    @classmethod
    def load(cls, path: Path | str) -> ModelSpec:
        """Reads `spec.json`, or the one in a run folder.

        Raises:
            SpecError: the file is missing or wrong.
        """
        path = Path(path)
        path = path / "spec.json" if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            command = f"python train.py --data DIR --out {shlex.quote(str(path.parent))}"
            raise SpecError(f"{path}: no such file; make a run with `{command}`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: cannot be read ({error})") from None
        return cls.from_json(text, source=str(path))

    def save(self, path: Path | str) -> None:
        """Writes `spec.json`: the old or the new file is there at any moment, never half of one."""
        write_text(Path(path), self.to_json())


def _of_version_1(size: Any, **values: Any) -> dict[str, Any]:
    """The fields of today for those of version 1, which had fewer and meant this."""
    _check_int("size", size, 1, LARGEST_SIZE)
    meant = {"interpolation": "bilinear", "fit": "crop", "fill": (0, 0, 0), "colour": "as-stored"}
    return {**values, "height": size, "width": size, **meant, "spec_version": SPEC_VERSION}


def _check(spec: ModelSpec) -> None:
    """Each rule once, the fields in the order of the class."""
    if not isinstance(spec.arch, str) or not spec.arch:
        raise SpecError(f"'arch' is {spec.arch!r}; it must be the name of an architecture")
    _check_labels(spec.labels)
    _check_rule(spec)
    for name in ("mean", "std"):
        values = getattr(spec, name)
        if len(values) != 3 or not all(_is_number(value) for value in values):
            raise SpecError(f"'{name}' is {list(values)!r}; it must be three numbers (R, G, B)")
    if min(spec.std) <= 0:
        raise SpecError(f"'std' is {list(spec.std)!r}; each must be above 0, since pixels are divided by it")
    if not _is_number(spec.temperature) or spec.temperature <= 0:
        raise SpecError(f"'temperature' is {spec.temperature!r}; it must be a number above 0 (1 for none)")
    if not isinstance(spec.trained_on, str):
        raise SpecError(f"'trained_on' is {spec.trained_on!r}; it must be text")
    _check_mapping("metrics", spec.metrics, _is_number, "finite numbers")
    if not isinstance(spec.weights_sha256, str) or not re.fullmatch(r"([0-9a-f]{64})?", spec.weights_sha256):
        raise SpecError(f"'weights_sha256' is {spec.weights_sha256!r}; it must be 64 lower-case hex digits")
    _check_mapping("versions", spec.versions, lambda value: isinstance(value, str), "texts")
    if spec.spec_version != SPEC_VERSION or isinstance(spec.spec_version, bool):
        raise SpecError(f"'spec_version' is {spec.spec_version!r}; it must be {SPEC_VERSION}")


def _check_rule(spec: ModelSpec) -> None:
    _check_int("height", spec.height, 1, LARGEST_SIZE)
    _check_int("width", spec.width, 1, LARGEST_SIZE)
    _check_int("resize", spec.resize, min(spec.height, spec.width), 2 * LARGEST_SIZE)
    for name, choices in (("interpolation", INTERPOLATIONS), ("fit", FITS), ("colour", COLOURS)):
        if (value := getattr(spec, name)) not in choices:
            raise SpecError(f"'{name}' is {value!r}; it must be one of {', '.join(choices)}")
    if spec.fit != "crop" and spec.resize != (least := min(spec.height, spec.width)):
        raise SpecError(f"'resize' is {spec.resize}; with fit '{spec.fit}' no margin is cut, so it must be {least}")
    if len(spec.fill) != 3:
        raise SpecError(f"'fill' is {list(spec.fill)!r}; it must be three whole numbers (R, G, B)")
    for value in spec.fill:
        _check_int("fill", value, 0, 255)


def _check_labels(labels: tuple[str, ...]) -> None:
    for label in labels:
        if not isinstance(label, str) or not label.strip() or not label.isprintable():
            raise SpecError(f"'labels' holds {label!r}; each must be printable text that is not blank")
    if len(labels) < 2:
        raise SpecError(f"'labels' has {len(labels)} entries; a classifier needs at least 2")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise SpecError(f"'labels' holds {twice!r} twice; answers are keyed by label, so rename one of them")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SpecError(f"'{name}' is {value!r}; it must be a whole number from {low} to {high}")


def _check_mapping(name: str, value: Any, rule: Any, values: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and rule(v) for k, v in value.items()):
        raise SpecError(f"'{name}' is {value!r}; it must map names to {values}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
