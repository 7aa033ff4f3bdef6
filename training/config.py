"""Every option of `train.py`, once: its default, its group, its help. The command line is made from this."""

from __future__ import annotations

import argparse
import difflib
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from predictor.files import write_text

RECIPES = Path(__file__).with_name("recipes.yaml")
EPOCHS = 10  # of a run that is given no length


def _option(default: Any, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a training run is asked to do. None means: chosen from the data, the architecture or the optimizer."""

    data: str = _option(
        MISSING,
        "data",
        "digits, cifar10, cifar100, mnist, fashion-mnist; or a folder, .zip, .tar, .tar.gz or .tar.xz "
        "of images as CLASS/* or {train,val,test}/CLASS/*",
    )
    out: str = _option(MISSING, "data", "run folder to write, e.g. runs/NAME")
    download_dir: str = _option("data", "data", "where torchvision's data sets are kept")
    val_fraction: float = _option(0.1, "data", "share of train cut for validation where there is no val split")
    test_fraction: float = _option(0.1, "data", "share cut for test where there is no test split")
    split_seed: int = _option(0, "data", "seed of these cuts; keep it, so that runs share their test split")
    skip_bad: bool = _option(False, "data", "leave unreadable images out (and list them) instead of stopping")
    workers: int | None = _option(None, "data", "threads that decode the images (default: one for each core)")

    arch: str = _option(
        "simplecnn", "network", "simplecnn, fastnet, fastnet_small or any torchvision classifier (--list-archs)"
    )
    size: int | None = _option(None, "network", "side of the square that the network sees, px (default: its own)")
    resize: int | None = _option(
        None, "network", "short edge before the centre crop, px (default: the architecture's own, scaled to --size)"
    )
    pretrained: bool = _option(False, "network", "start from torchvision's weights, or from --weights")
    weights: str | None = _option(None, "network", "a local state_dict of the architecture to start from")
    freeze: bool = _option(False, "network", "train the head only; BatchNorm statistics stay too")
    cache_features: bool = _option(
        True,
        "network",
        "compute once what the head sees of each image and its mirror image while --freeze holds, which is much "
        "faster; --no-cache-features augments, and drops out, anew in each epoch (default: on)",
    )
    unfreeze_at: int = _option(
        0, "network", "end --freeze after this many epochs; the rest then learns at a tenth of the rate; 0: never"
    )

    flip: bool | None = _option(None, "augmentation", "mirror half of the images (default: on, but not for digits)")
    crop_padding: int | None = _option(
        None, "augmentation", "shift by up to this many px, edges mirrored; 0 for off (default: size / 8)"
    )
    jitter: float = _option(0.0, "augmentation", "brightness, contrast, saturation by ±this share; 0 for off")

    mixup: float = _option(0.0, "augmentation", "alpha of mixup, such as 0.2; 0 for off")
    cutmix: float = _option(0.0, "augmentation", "alpha of CutMix, such as 1; with --mixup a coin decides; 0 for off")

    epochs: int | None = _option(
        None, "optimisation", "passes over the training images (default: 10, or as many as --minutes has time for)"
    )
    minutes: float | None = _option(
        None, "optimisation", "train this long; with --epochs too, until the first of them is over"
    )
    batch_size: int | None = _option(
        None,
        "optimisation",
        "images per step, of all processes and parts together (default: 32; 64 for 10,000 and more of below 128 px)",
    )
    accumulate: int = _option(1, "optimisation", "parts that each batch goes through the network in, to save memory")
    optimizer: str = _option("adamw", "optimisation", "optimizer", ("adam", "adamw", "sgd", "muon"))
    lr: float | None = _option(
        None,
        "optimisation",
        "peak learning rate (default: adam and adamw 3e-3, sgd 0.05, muon 0.24; a tenth for trained weights that are "
        "not frozen)",
    )
    weight_decay: float = _option(
        0.01, "optimisation", "of the weights; biases and norms have none, nor have muon's filters"
    )
    momentum: float = _option(0.9, "optimisation", "of sgd, and of muon's filters; Nesterov's")
    label_smoothing: float = _option(0.0, "optimisation", "of the cross-entropy, 0 to below 1")
    schedule: str = _option(
        "cosine", "optimisation", "learning rate over time", ("cosine", "linear", "step", "constant")
    )
    warmup: float = _option(0.05, "optimisation", "share of the run in which the rate rises from 0")
    step_size: int = _option(4, "optimisation", "epochs between two drops of the step schedule")
    gamma: float = _option(0.3, "optimisation", "factor of each drop of the step schedule")
    clip_grad_norm: float = _option(0.0, "optimisation", "largest norm of all gradients together; 0: no limit")
    ema: float = _option(
        0.0,
        "optimisation",
        "decay of a moving average of the weights, such as 0.999, which is evaluated and kept; 0: off",
    )
    low_res: float = _option(
        0.0,
        "optimisation",
        "share of the run, from its beginning, that sees the images at three quarters of --size, which is faster",
    )
    patience: int = _option(0, "optimisation", "stop after this many epochs without a better val accuracy; 0: never")

    device: str = _option("auto", "machine", "auto, cpu, cuda, cuda:N or mps")
    amp: str = _option(
        "off",
        "machine",
        "precision of the forward pass; auto: bf16 on GPUs and processors that compute in it",
        ("auto", "bf16", "fp16", "off"),
    )
    channels_last: bool = _option(False, "machine", "keep tensors as (N, H, W, C), faster on some devices")
    compile: bool = _option(False, "machine", "torch.compile the network; on the CPU it needs a C++ compiler")
    seed: int = _option(0, "machine", "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its rule, naming the flag."""
        for name, low, high in (
            ("size", 1, 4096),
            ("resize", 1, 8192),
            ("crop_padding", 0, 4096),
            ("jitter", 0, 1),
            ("mixup", 0, 10),
            ("cutmix", 0, 10),
            ("accumulate", 1, 100_000),
            ("clip_grad_norm", 0, 1e6),
            ("ema", 0, 0.99999),
            ("low_res", 0, 1),
            ("workers", 1, 1024),
            ("unfreeze_at", 0, 1_000_000),
            ("epochs", 1, 1_000_000),
            ("batch_size", 1, 1_000_000),
            ("weight_decay", 0, 10),
            ("momentum", 0, 0.9999),
            ("label_smoothing", 0, 0.99),
            ("warmup", 0, 1),
            ("step_size", 1, 1_000_000),
            ("gamma", 0, 1),
            ("patience", 0, 1_000_000),
            ("val_fraction", 0.001, 0.9),
            ("test_fraction", 0.001, 0.9),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
        for name in ("lr", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} {value}: must be above 0")
        if self.unfreeze_at and not self.freeze:
            raise ValueError(f"--unfreeze-at {self.unfreeze_at}: there is nothing to end without --freeze; pass both")
        if self.unfreeze_at and self.optimizer == "muon":
            raise ValueError("--unfreeze-at: muon sets the norms of all filters anew; pass --optimizer sgd or adamw")
        if self.flips_only:
            for name in ("crop_padding", "jitter", "mixup", "cutmix", "low_res"):
                if getattr(self, name):
                    raise ValueError(
                        f"--{name.replace('_', '-')} {getattr(self, name)}: --freeze computes the features of each "
                        "image once; leave it out (or 0), or pass --no-cache-features, which is slower"
                    )
        for option in fields(self):
            choices = option.metadata["choices"]
            if choices and getattr(self, option.name) not in choices:
                raise ValueError(f"--{option.name} {getattr(self, option.name)}: must be one of {', '.join(choices)}")

    @property
    def epoch_limit(self) -> float:
        """Epochs after which the run ends at the latest."""
        return self.epochs or (math.inf if self.minutes else EPOCHS)

    @property
    def flips_only(self) -> bool:
        """Whether no epoch augments images, beyond mirroring them."""
        return self.freeze and self.cache_features and not self.unfreeze_at

    def save(self, path: Path) -> None:
        """Writes every option, so that `train.py --config PATH --out OTHER` repeats the run."""
        write_text(path, yaml.safe_dump(asdict(self), sort_keys=False))


def read_config(path: Path | str) -> dict[str, Any]:
    """The options that a YAML file sets, such as a run's config.yaml; names as the flags, with `-` or `_`.

    Raises:
        ValueError: the file cannot be read, or an option in it is unknown or of another type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); give a YAML file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not options; write lines such as `epochs: 20`")
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in _kinds():
            close = difflib.get_close_matches(name, _kinds(), n=1)
            hint = f"did you mean {close[0]}?" if close else "the names are those of the flags (train.py --help)"
            raise ValueError(f"{path}: '{key}' is no option; {hint}")
        options[name] = _typed(f"{path}: '{key}'", name, value)
    return options


def recipes() -> dict[str, dict[str, Any]]:
    """The options that each recipe sets."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(RECIPES.read_text(encoding="utf-8"))
    return {
        recipe: {name: _typed(f"{RECIPES}: '{name}'", name, value) for name, value in options.items()}
        for recipe, options in found.items()
    }


def make_config(file: str | None, options: dict[str, Any], recipe: str | None = None) -> TrainConfig:
    """The given options, over those of the YAML file, over the recipe's, over the defaults.

    Raises:
        ValueError: as `read_config`, an option breaks its rule, or one without a default is missing.
    """
    if recipe is not None and recipe not in recipes():
        raise ValueError(f"--recipe {recipe}: there is none of this name; there are {', '.join(recipes())}")
    values = (recipes()[recipe] if recipe else {}) | (read_config(file) if file else {}) | options
    needed = [option.name for option in fields(TrainConfig) if option.default is MISSING]
    if missing := [f"--{name}" for name in needed if name not in values]:
        raise ValueError(f"{' and '.join(missing)}: needed, as a flag or in --config FILE")
    return TrainConfig(**values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `TrainConfig`. A flag that is not given leaves no attribute behind."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in fields(TrainConfig):
        meta = option.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        kind = _kinds()[option.name]
        shown = "" if option.default in (None, MISSING, False) or "default" in meta["help"] else f" ({option.default})"
        keywords: dict[str, Any] = {"help": meta["help"] + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords |= {
                "type": kind,
                "choices": meta["choices"],
                "metavar": None if meta["choices"] else {int: "N", float: "X", str: "NAME"}[kind],
            }
        groups[meta["group"]].add_argument(f"--{option.name.replace('_', '-')}", **keywords)


@cache
def _kinds() -> dict[str, type]:
    """The type of each option: bool, int, float or str; `int | None` counts as int."""
    hints = get_type_hints(TrainConfig)
    kinds = {option.name: hints[option.name] for option in fields(TrainConfig)}
    return {
        name: next(k for k in get_args(kind) if k is not type(None)) if get_origin(kind) is not None else kind
        for name, kind in kinds.items()
    }


def _typed(place: str, name: str, value: Any) -> Any:
    """`value` as the option's type, if it is one; `place` is what the error message calls it."""
    kind = _kinds()[name]
    if value is None and type(None) in get_args(get_type_hints(TrainConfig)[name]):
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-3 as a text
        except ValueError:
            pass
    if type(value) is not kind:
        rule = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        raise ValueError(f"{place} is {value!r}; it must be {rule}")
    return value
