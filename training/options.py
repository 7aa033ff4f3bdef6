"""Every option of `train.py`, once: type, default, group, help, range, choices, and what else depends on it.

The command line, the files, the checks and the model card are made from the fields of `TrainOptions`; nothing else
lists them. recipes.yaml changes some by name. What is None here becomes a value in training/resolve.py.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from predictor.files import write_text
from training.lengths import fitted
from training.size import as_size

RECIPES = Path(__file__).with_name("recipes.yaml")
REMOVED = {"low_res"}  # options of earlier versions, which stand in the config.yaml of their runs

# What the help promises for an option that is not given, and training/resolve.py keeps.
DEFAULT_EPOCHS = 10
DEFAULT_LR = {"adam": 3e-3, "adamw": 3e-3, "sgd": 0.05, "muon": 0.24}
FINE_TUNING_RATE = 0.1  # of these, for trained weights that are not frozen
DEFAULT_BATCH, LARGER_BATCH = 32, 64  # images
DEFAULT_CROP_RATIO = 4 / 3  # as torchvision's RandomResizedCrop
MANY_IMAGES, LARGE_SIZE = 10_000, 128  # the larger batch: for so many training images, of fewer px than that

METAVARS = {int: "N", float: "X", str: "NAME"}

ALWAYS, IF_CHANGED, WITH_STEP = "always", "if changed", "with the step schedule"


def _option(
    default: Any,
    group: str,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    resumable: bool = False,
    scoring: bool = False,
    card: str = "",
    announced: bool = False,
    rgb: type | None = None,
    is_size: bool = False,
) -> Any:
    """A field with what the lists are made from.

    Args:
        low, high: the range, both ends included; `low=0` without `high`: any finite number above 0.
        resumable: whether a run that goes on may have another value.
        scoring: whether --evaluate takes it, in the place of the run's own.
        card: whether the model card shows it: ALWAYS, IF_CHANGED (from the default), WITH_STEP (schedule), or never.
        announced: whether it is said at the beginning of a run that it is not at its default.
        rgb: of a text of three numbers, R,G,B, their type.
        is_size: whether it is what `training.size.as_size` takes, with the range for each side.
    """
    metadata = {"group": group, "help": help, "low": low, "high": high, "choices": choices, "rgb": rgb}
    metadata["is_size"] = is_size
    uses = {"resumable": resumable, "scoring": scoring, "card": card, "announced": announced}
    return field(default=default, metadata=metadata | uses)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training run is asked to do. None means: chosen from the data, the architecture or the optimizer.

    Raises:
        ValueError: a value out of its rule; the message names the flag.
    """

    data: str = _option(
        MISSING,
        "data",
        "digits, cifar10, cifar100, mnist, fashion-mnist; or a folder, .zip, .tar, .tar.gz or .tar.xz "
        "of images as CLASS/* or {train,val,test}/CLASS/*; or a .csv or .parquet with the columns path and label; "
        "or a folder that Hugging Face's save_to_disk has written",
        resumable=True,
        scoring=True,
    )
    out: str = _option(MISSING, "data", "run folder to write, e.g. runs/NAME", scoring=True)
    download_dir: str = _option("data", "data", "where torchvision's data sets are kept", resumable=True, scoring=True)
    val_fraction: float = _option(
        0.1, "data", "share of train cut for validation where there is no val split", low=0.001, high=0.9, scoring=True
    )
    test_fraction: float = _option(
        0.1, "data", "share cut for test where there is no test split", low=0.001, high=0.9, scoring=True
    )
    split_seed: int = _option(
        0, "data", "seed of these cuts; keep it, so that runs share their test split", scoring=True
    )
    skip_bad: bool = _option(
        False, "data", "leave unreadable images out (and list them) instead of stopping", scoring=True
    )
    store: str = _option(
        "auto",
        "data",
        "where decoded images are kept: memory; DIR, for all runs; auto: memory, or a folder in the user's cache where "
        "they would fill it (python -m dataset store lists what is there)",
        resumable=True,
    )
    workers: int | None = _option(
        None,
        "data",
        "threads that decode the images (default: one for each core)",
        low=1,
        high=1024,
        resumable=True,
        scoring=True,
    )

    arch: str = _option(
        "simplecnn",
        "network",
        "simplecnn, fastnet, fastnet_small, a torchvision classifier, or timm/NAME for one of timm's (--list-archs) "
        "(default: what suits the images; simplecnn for small ones)",
    )
    size: int | str | None = _option(
        None,
        "network",
        "what the network sees, px: the side of a square, or HEIGHTxWIDTH such as 160x224 (default: its own)",
        low=1,
        high=4096,
        is_size=True,
    )
    resize: int | None = _option(
        None,
        "network",
        "short edge before the centre crop, px (default: the architecture's own, scaled to --size)",
        low=1,
        high=8192,
    )
    fit: str | None = _option(
        None,
        "network",
        "which part of an image the network sees: its centre, all of it squashed, or all of it with --fill around "
        "(default: the weights' own, else crop)",
        choices=("crop", "squash", "pad"),
    )
    interpolation: str | None = _option(
        None,
        "network",
        "filter that resizes images (default: the weights' own, else bilinear)",
        choices=("bilinear", "bicubic", "lanczos"),
    )
    fill: str | None = _option(
        None,
        "network",
        "colour around an image that --fit pad leaves whole, each of 0 to 255 (default: the weights' own, else black)",
        low=0,
        high=255,
        rgb=int,
    )
    colour: str | None = _option(
        None,
        "network",
        "what becomes of an embedded colour profile: srgb converts the pixels, as-stored ignores it (default: the "
        "weights' own, else srgb)",
        choices=("srgb", "as-stored"),
    )
    mean: str | None = _option(
        None,
        "network",
        "subtracted from pixels of 0 to 1 (default: the weights' own, else ImageNet's)",
        low=0,
        high=1,
        rgb=float,
    )
    std: str | None = _option(
        None,
        "network",
        "that pixels are then divided by (default: the weights' own, else ImageNet's)",
        low=0.001,
        high=1,
        rgb=float,
    )
    pretrained: bool = _option(False, "network", "start from published weights, or from --weights", card=ALWAYS)
    weights: str | None = _option(
        None, "network", "a state_dict of the architecture to start from: .pt, .pth or .safetensors", card=ALWAYS
    )
    freeze: bool = _option(False, "network", "train the head only; BatchNorm statistics stay too", card=ALWAYS)
    cache_features: bool = _option(
        True,
        "network",
        "compute once what the head sees of each image and its mirror image while --freeze holds, which is much "
        "faster; --no-cache-features augments, and drops out, anew in each epoch (default: on)",
    )
    unfreeze_at: int = _option(
        0,
        "network",
        "end --freeze after this many epochs; the rest then learns at a tenth of the rate; 0: never",
        low=0,
        high=1_000_000,
        card=IF_CHANGED,
    )
    head_first: bool = _option(
        False,
        "network",
        "fit the head to what the weights see of each image, by logistic regression, before the first epoch; kept if "
        "no epoch is better",
        card=IF_CHANGED,
        announced=True,
    )
    hold_norms: bool = _option(
        False,
        "network",
        "keep BatchNorm's statistics as the weights bring them: those of small batches are worse",
        card=IF_CHANGED,
        announced=True,
    )
    freeze_first: float = _option(
        0.0,
        "network",
        "share of the layers, from the first on, that keep their weights: they are general, and cost most of the time",
        low=0,
        high=0.999,
        card=IF_CHANGED,
        announced=True,
    )
    layer_decay: float = _option(
        1.0,
        "network",
        "learning rate of the first layer as a share of the head's, those between them in geometric steps; 1: one rate "
        "for all",
        low=0,
        high=1,
        card=IF_CHANGED,
        announced=True,
    )

    flip: bool | None = _option(
        None, "augmentation", "mirror half of the images (default: on, but not for digits)", card=ALWAYS
    )
    crop_padding: int | None = _option(
        None,
        "augmentation",
        "shift by up to this many px, edges mirrored; 0 for off (default: an eighth of --size's short edge)",
        low=0,
        high=4096,
        card=ALWAYS,
    )
    crop_scale: float = _option(
        0.0,
        "augmentation",
        "smallest share of an image's area that its random crop has, such as 0.35, in the place of the shift; 0: off",
        low=0,
        high=1,
        card=IF_CHANGED,
    )
    train_size: int | str | None = _option(
        None,
        "augmentation",
        "side of the random crops of --crop-scale, or HEIGHTxWIDTH, px; they may be smaller than what is evaluated "
        "(default: --size)",
        low=1,
        high=4096,
        card=IF_CHANGED,
        is_size=True,
    )
    crop_ratio: float = _option(
        DEFAULT_CROP_RATIO,
        "augmentation",
        "how many times as wide, or as high, as the network's own shape the random crops of --crop-scale may be; 1: of "
        "that shape only (default: 4/3)",
        low=1,
        high=10,
        card=IF_CHANGED,
    )
    jitter: float = _option(
        0.0, "augmentation", "brightness, contrast, saturation by ±this share; 0 for off", low=0, high=1, card=ALWAYS
    )
    rotate: float = _option(
        0.0,
        "augmentation",
        "turn by up to this many degrees, edges mirrored; 0 for off",
        low=0,
        high=180,
        card=IF_CHANGED,
        announced=True,
    )
    trivial: bool = _option(
        False,
        "augmentation",
        "TrivialAugment: one of 14 operations of random strength on each image",
        card=IF_CHANGED,
        announced=True,
    )
    erase: float = _option(
        0.0,
        "augmentation",
        "share of the images in which a rectangle becomes noise, such as 0.25; 0 for off",
        low=0,
        high=1,
        card=IF_CHANGED,
        announced=True,
    )

    mixup: float = _option(
        0.0, "augmentation", "alpha of mixup, such as 0.2; 0 for off", low=0, high=10, card=IF_CHANGED, announced=True
    )
    cutmix: float = _option(
        0.0,
        "augmentation",
        "alpha of CutMix, such as 1; with --mixup a coin decides; 0 for off",
        low=0,
        high=10,
        card=IF_CHANGED,
        announced=True,
    )

    epochs: int | None = _option(
        None,
        "optimisation",
        f"passes over the training images (default: {DEFAULT_EPOCHS}, or as many as --minutes has time for)",
        low=1,
        high=1_000_000,
        resumable=True,
    )
    minutes: float | None = _option(
        None,
        "optimisation",
        "train this long; with --epochs too, until the first of them is over",
        low=0,
        resumable=True,
    )
    batch_size: int | None = _option(
        None,
        "optimisation",
        f"images per step, of all processes and parts together (default: {DEFAULT_BATCH}; {LARGER_BATCH} for "
        f"{MANY_IMAGES:,} and more of below {LARGE_SIZE} px)",
        low=1,
        high=1_000_000,
        card=ALWAYS,
    )
    optimizer: str = _option(
        "adamw", "optimisation", "optimizer", choices=("adam", "adamw", "sgd", "muon"), card=ALWAYS
    )
    lr: float | None = _option(
        None,
        "optimisation",
        f"peak learning rate (default: {', '.join(f'{name} {rate:g}' for name, rate in DEFAULT_LR.items())}; "
        f"{FINE_TUNING_RATE:g} of it for trained weights that are not frozen)",
        low=0,
        card=ALWAYS,
    )
    weight_decay: float = _option(
        0.01,
        "optimisation",
        "of the weights; biases and norms have none, nor have muon's filters",
        low=0,
        high=10,
        card=ALWAYS,
    )
    momentum: float = _option(
        0.9, "optimisation", "of sgd, and of muon's filters; Nesterov's", low=0, high=0.9999, card=ALWAYS
    )
    label_smoothing: float = _option(
        0.0, "optimisation", "of the cross-entropy, 0 to below 1", low=0, high=0.99, card=ALWAYS
    )
    schedule: str = _option(
        "cosine",
        "optimisation",
        "learning rate over time",
        choices=("cosine", "linear", "step", "constant"),
        card=ALWAYS,
    )
    warmup: float = _option(
        0.05, "optimisation", "share of the run in which the rate rises from 0", low=0, high=1, card=ALWAYS
    )
    step_size: int = _option(
        4, "optimisation", "epochs between two drops of the step schedule", low=1, high=1_000_000, card=WITH_STEP
    )
    gamma: float = _option(
        0.3, "optimisation", "factor of each drop of the step schedule", low=0, high=1, card=WITH_STEP
    )
    ema: float = _option(
        0.0,
        "optimisation",
        "decay of a moving average of the weights, such as 0.999, which is evaluated and kept; 0: off",
        low=0,
        high=0.99999,
        card=IF_CHANGED,
        announced=True,
    )
    clip_grad_norm: float = _option(
        0.0,
        "optimisation",
        "largest norm of all gradients together; 0: no limit",
        low=0,
        high=1e6,
        card=IF_CHANGED,
        announced=True,
    )
    accumulate: int = _option(
        1,
        "optimisation",
        "parts that each batch goes through the network in, to save memory",
        low=1,
        high=100_000,
        card=IF_CHANGED,
        announced=True,
    )
    balance: str = _option(
        "none",
        "optimisation",
        "of unequal classes: loss weights each image's loss against its class's size; sampler draws images so that all "
        "classes are equally likely",
        choices=("none", "loss", "sampler"),
        card=IF_CHANGED,
        announced=True,
    )
    select: str = _option(
        "accuracy",
        "optimisation",
        "measure on val by which the best epoch is kept",
        choices=("accuracy", "macro-f1", "loss"),
        card=IF_CHANGED,
        announced=True,
    )
    patience: int = _option(
        0,
        "optimisation",
        "stop after this many epochs without a better val accuracy (or --select's measure); 0: never",
        low=0,
        high=1_000_000,
    )

    checkpoint_minutes: float = _option(
        0.0,
        "machine",
        "save the state within epochs too, whenever this many minutes have passed since the last time; 0: after each "
        "epoch only",
        low=0,
        high=1_000_000,
        resumable=True,
    )
    device: str = _option("auto", "machine", "auto, cpu, cuda, cuda:N or mps", resumable=True, scoring=True)
    amp: str = _option(
        "off",
        "machine",
        "precision of the forward pass; auto: bf16 on GPUs and processors that compute in it",
        choices=("auto", "bf16", "fp16", "off"),
        card=IF_CHANGED,
        announced=True,
    )
    channels_last: bool = _option(
        False, "machine", "keep tensors as (N, H, W, C), faster on some devices", announced=True
    )
    compile: bool = _option(
        False, "machine", "torch.compile the network; on the CPU it needs a C++ compiler", announced=True
    )
    seed: int = _option(0, "machine", "seed of weights, order and augmentation", card=ALWAYS)

    def __post_init__(self) -> None:
        for option in fields(self):
            _check(option.name, getattr(self, option.name), option.metadata)
        if self.unfreeze_at and not self.freeze:
            raise ValueError(f"--unfreeze-at {self.unfreeze_at}: there is nothing to end without --freeze; pass both")
        mixed = {"head_first": self.head_first, "freeze_first": self.freeze_first, "layer_decay": self.layer_decay != 1}
        if self.freeze and any(mixed.values()):
            name = next(name for name, on in mixed.items() if on)
            raise ValueError(f"{flag(name)}: belongs to training all layers; leave it out, or --freeze")
        if self.layer_decay != 1 and self.optimizer == "muon":
            raise ValueError(f"--layer-decay {self.layer_decay}: muon has one rate for all; pass --optimizer adamw")
        if self.unfreeze_at and self.optimizer == "muon":
            raise ValueError("--unfreeze-at: muon sets the norms of all filters anew; pass --optimizer sgd or adamw")
        if self.crop_scale and self.crop_padding:
            raise ValueError(f"--crop-padding {self.crop_padding}: --crop-scale takes its place; pass one of them")
        if self.flips_only:
            for name in (
                "crop_padding",
                "crop_scale",
                "rotate",
                "trivial",
                "jitter",
                "erase",
                "mixup",
                "cutmix",
            ):
                if value := getattr(self, name):
                    typed = flag(name) if value is True else f"{flag(name)} {value}"
                    raise ValueError(
                        f"{typed}: --freeze computes the features of each "
                        "image once; leave it out (or 0), or pass --no-cache-features, which is slower"
                    )

    @property
    def flips_only(self) -> bool:
        """Whether no epoch augments images, beyond mirroring them."""
        return self.freeze and self.cache_features and not self.unfreeze_at

    @property
    def switched_on(self) -> dict[str, Any]:
        """The options that are announced where they are not at their default."""
        wanted = [option for option in fields(self) if option.metadata["announced"]]
        return {o.name: getattr(self, o.name) for o in wanted if getattr(self, o.name) != o.default}

    def save(self, path: Path) -> None:
        """Writes every option, so that `train.py --config PATH --out OTHER` repeats the run."""
        write_text(path, yaml.safe_dump(asdict(self), sort_keys=False))


def flag(name: str) -> str:
    """An option as it is typed: `batch_size` is `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def as_rgb(text: str, kind: type = float) -> tuple[Any, Any, Any]:
    """The three numbers of `R,G,B`.

    Raises:
        ValueError: it holds anything else.
    """
    red, green, blue = map(kind, text.split(","))
    return red, green, blue


def option_names() -> tuple[str, ...]:
    return tuple(option.name for option in fields(TrainOptions))


def resumable() -> tuple[str, ...]:
    """The options that a run that goes on may be given anew."""
    return tuple(option.name for option in fields(TrainOptions) if option.metadata["resumable"])


def scoring() -> tuple[str, ...]:
    """The options that --evaluate may be given."""
    return tuple(option.name for option in fields(TrainOptions) if option.metadata["scoring"])


def shown_on_card(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of all options, those that the model card lists; paths and what belongs to the machine stay out."""

    def is_shown(option: Field[Any]) -> bool:
        changed = values[option.name] != option.default
        with_step = values["schedule"] == "step"
        return {ALWAYS: True, IF_CHANGED: changed, WITH_STEP: with_step}.get(option.metadata["card"], False)

    return {option.name: values[option.name] for option in fields(TrainOptions) if is_shown(option)}


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
        if name in REMOVED and not value:
            continue
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


def beside(recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe sets where other options are given: its lengths suit them (`training.lengths`), and what a given
    option has no room for is left out.

    Raises:
        ValueError: no such architecture.
    """
    values = fitted(recipes()[recipe], given)
    ruled_out: set[str] = set()
    if given.get("crop_padding"):
        ruled_out |= {"crop_scale", "train_size"}
    if not given.get("crop_scale", True):
        ruled_out |= {"train_size"}
    if given.get("freeze"):
        ruled_out |= {"head_first", "freeze_first", "layer_decay", "hold_norms", "crop_scale", "train_size"}
    if given.get("optimizer", values.get("optimizer")) != values.get("optimizer"):
        ruled_out |= {"lr"} | ({"layer_decay"} if given["optimizer"] == "muon" else set())
    return {name: value for name, value in values.items() if name not in ruled_out}


def make_options(file: str | None, options: dict[str, Any], recipe: str | None = None) -> TrainOptions:
    """The given options, over those of the YAML file, over the recipe's, over the defaults.

    Raises:
        ValueError: as `read_config`, an option breaks its rule, or one without a default is missing.
    """
    if recipe is not None and recipe not in recipes():
        raise ValueError(f"--recipe {recipe}: there is none of this name; there are {', '.join(recipes())}")
    given = (read_config(file) if file else {}) | options
    values = (beside(recipe, given) if recipe else {}) | given
    needed = [option.name for option in fields(TrainOptions) if option.default is MISSING]
    if missing := [f"--{name}" for name in needed if name not in values]:
        raise ValueError(f"{' and '.join(missing)}: needed, as a flag or in --config FILE")
    return TrainOptions(**values)


def resumed_options(run: Path, source: str | None, options: dict[str, Any]) -> TrainOptions:
    """The options in the run's config.yaml, with what may be given anew.

    `--epochs` or `--minutes` may be changed, either in the place of both: the learning rate goes on where a run of that
    length would be. `--data` is for data that was moved; its classes must be the same, as last.ckpt has them.

    Args:
        source: "config" or "recipe" where that flag gives options too.

    Raises:
        ValueError: the run has no config.yaml, or an option was given that cannot change.
    """
    if source or (fixed := sorted(set(options) - {*resumable()})):
        name = source or fixed[0].replace("_", "-")
        raise ValueError(f"--resume {run}: goes on with the run's own options; leave --{name} out, or start a new run")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"--resume {run}: has no config.yaml; give a folder that train.py began, or start a new run")
    own = read_config(run / "config.yaml")
    for given, other in (("epochs", "minutes"), ("minutes", "epochs")):
        if given in options:
            own[other] = None
    return TrainOptions(**own | options | {"out": str(run)})


def add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `TrainOptions`. A flag that is not given leaves no attribute behind."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in fields(TrainOptions):
        meta = option.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        kind = _kinds()[option.name]
        shown = "" if option.default in (None, MISSING, False) or "default" in meta["help"] else f" ({option.default})"
        keywords: dict[str, Any] = {"help": meta["help"] + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            metavar = "R,G,B" if meta["rgb"] else "N|HEIGHTxWIDTH" if meta["is_size"] else METAVARS[kind]
            keywords |= {
                "type": _number_or_text if meta["is_size"] else kind,
                "choices": meta["choices"],
                "metavar": None if meta["choices"] else metavar,
            }
        groups[meta["group"]].add_argument(flag(option.name), **keywords)


def _number_or_text(text: str) -> int | str:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for a value out of its range or choices."""
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices and value is not None and value not in choices:
        raise ValueError(f"{flag(name)} {value}: must be one of {', '.join(choices)}")
    if value is None or low is None:
        return
    if kind := metadata["rgb"]:
        try:
            is_right = all(low <= number <= high for number in as_rgb(value, kind))
        except ValueError:
            is_right = False
        if not is_right:
            numbers = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"{flag(name)} {value}: must be R,G,B, three {numbers} from {low} to {high}")
        return
    if high is None and not low < value < float("inf"):
        raise ValueError(f"{flag(name)} {value}: must be above {low}")
    sides = as_size(value, flag(name)) if metadata["is_size"] else (value,)
    if high is not None and not all(low <= side <= high for side in sides):
        raise ValueError(f"{flag(name)} {value}: must be from {low} to {high}")


@cache
def _kinds() -> dict[str, type]:
    """The type of each option: bool, int, float or str; `int | None` and `int | str | None` count as int."""
    hints = get_type_hints(TrainOptions)
    kinds = {option.name: hints[option.name] for option in fields(TrainOptions)}
    return {
        name: next(k for k in get_args(kind) if k is not type(None)) if get_origin(kind) is not None else kind
        for name, kind in kinds.items()
    }


def _typed(where: str, name: str, value: Any) -> Any:
    """`value` as the option's type, if it is one; `where` is what the error message calls it."""
    kind, hint = _kinds()[name], get_type_hints(TrainOptions)[name]
    kinds = get_args(hint) or (hint,)
    if type(value) in kinds:
        return value
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-3 as a text
        except ValueError:
            pass
    rule = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    rule += " or HEIGHTxWIDTH" if kind is int and str in kinds else ""
    raise ValueError(f"{where} is {value!r}; it must be {rule}")
