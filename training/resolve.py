"""From what was asked for to what will be done: the one place where "auto" and None become values.

`resolve_reading` decides what must be known before an image is decoded, `resolve` the rest. Everything that comes
later reads the `Plan`, and has no default of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from model import registry
from model.registry import Pretrained
from predictor.spec import PixelRule
from training import distributed
from training.options import (
    DEFAULT_BATCH,
    DEFAULT_CROP_RATIO,
    DEFAULT_EPOCHS,
    DEFAULT_LR,
    FINE_TUNING_RATE,
    LARGE_SIZE,
    LARGER_BATCH,
    MANY_IMAGES,
    TrainOptions,
    as_rgb,
)
from training.size import ImageSize, as_size


@dataclass(frozen=True)
class Reading:
    """How images are read: by `rule`, as the spec has it, and by `workers` threads.

    train_size: of what is trained on; crop_padding: px; mean, std: RGB, for pixels in 0..1.
    """

    rule: PixelRule
    train_size: ImageSize
    crop_padding: int
    workers: int
    mean: tuple[float, ...] = registry.IMAGENET_MEAN
    std: tuple[float, ...] = registry.IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does. Most fields are the options of the same name (training/options.py); these are not:

    mean, std: RGB, for pixels in 0..1.
    epochs, seconds: after which the run ends, whichever comes first; infinite where it has no such limit.
    checkpoint_seconds: between two states saved within an epoch; infinite for none there.
    device: where it computes; amp: the type that autocast computes in, float32 for none.
    """

    arch: str
    rule: PixelRule
    mean: tuple[float, ...]
    std: tuple[float, ...]
    freeze: bool
    cache_features: bool
    unfreeze_at: int
    head_first: bool
    hold_norms: bool
    freeze_first: float
    layer_decay: float

    flip: bool
    crop_padding: int
    crop_scale: float
    train_size: ImageSize
    crop_ratio: float
    jitter: float
    rotate: float
    trivial: bool
    erase: float
    mixup: float
    cutmix: float

    epochs: float
    seconds: float
    checkpoint_seconds: float
    batch_size: int
    accumulate: int
    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    label_smoothing: float
    schedule: str
    warmup: float
    step_size: int
    gamma: float
    clip_grad_norm: float
    ema: float
    balance: str
    select: str
    patience: int

    device: torch.device
    amp: torch.dtype
    channels_last: bool
    compile: bool
    seed: int

    @property
    def size(self) -> ImageSize:
        """Of what is evaluated and served."""
        return ImageSize(self.rule.height, self.rule.width)


def resolve_reading(options: TrainOptions, weights: Pretrained | None = None) -> Reading:
    """What the architecture and its weights say about the images, where the options leave it open.

    Raises:
        ValueError: no such architecture, or it cannot take images of this size.
    """
    registry.check_name(options.arch)
    preset = registry.preset(options.arch)
    own = weights.rule if weights else PixelRule.square(preset.size, preset.resize)
    size = size_of(options, own)
    short = min(size)
    resize = options.resize or round(short * own.resize / min(own.height, own.width))
    if resize < short:
        raise ValueError(f"--resize {resize}: must be at least the short edge of --size {size}")
    padding = options.crop_padding
    if padding is None:
        padding = 0 if options.flips_only or options.crop_scale else short // 8
    if padding >= short:
        raise ValueError(f"--crop-padding {padding}: must be below the short edge of --size {size}")
    network = registry.build(options.arch, 2, *size)
    if options.train_size and not options.crop_scale:
        raise ValueError(f"--train-size {options.train_size}: is the side of random crops; pass --crop-scale too")
    if options.crop_ratio != DEFAULT_CROP_RATIO and not options.crop_scale:
        raise ValueError(f"--crop-ratio {options.crop_ratio:g}: is the shape of random crops; pass --crop-scale too")
    seen = as_size(options.train_size) if options.train_size else size
    if seen != size and not registry.takes(network, 2, *seen):
        raise ValueError(f"--train-size {seen}: {options.arch} of {size} px cannot take {seen} px; leave it out")
    fit = options.fit or own.fit
    if options.fill and fit != "pad":
        raise ValueError(f"--fill {options.fill}: is the colour around a padded image; pass --fit pad too")
    rule = PixelRule(
        height=size.height,
        width=size.width,
        resize=resize if fit == "crop" else short,
        interpolation=options.interpolation or own.interpolation,
        fit=fit,
        fill=as_rgb(options.fill, int) if options.fill else own.fill,
        colour=options.colour or own.colour,
    )
    return Reading(rule, seen, padding, workers_of(options), *_mean_and_std(options, weights))


def size_of(options: TrainOptions, own: PixelRule) -> ImageSize:
    """What the network sees; `own`: the rule that the network or its weights want."""
    return as_size(options.size) if options.size else ImageSize(own.height, own.width)


def workers_of(options: TrainOptions) -> int:
    """Threads that decode the images."""
    return options.workers or os.cpu_count() or 1


def _mean_and_std(options: TrainOptions, weights: Pretrained | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As the options say, else as the weights want it, else ImageNet's."""
    mean, std = (weights.mean, weights.std) if weights else (registry.IMAGENET_MEAN, registry.IMAGENET_STD)
    return as_rgb(options.mean) if options.mean else mean, as_rgb(options.std) if options.std else std


def resolve(options: TrainOptions, reading: Reading, *, images: int, flips: bool, device: torch.device) -> Plan:
    """The plan of a run.

    Args:
        images: how many there are to train on.
        flips: whether the mirror image of one shows the same class.

    Raises:
        ValueError: the device or the number of images does not suit the options.
    """
    many_and_small = images >= MANY_IMAGES and max(reading.rule.height, reading.rule.width) < LARGE_SIZE
    minutes = options.minutes or math.inf
    decided = {
        "rule": reading.rule,
        "mean": reading.mean,
        "std": reading.std,
        "crop_padding": reading.crop_padding,
        "train_size": reading.train_size,
        "flip": flips if options.flip is None else options.flip,
        "batch_size": options.batch_size or (LARGER_BATCH if many_and_small else DEFAULT_BATCH),
        "lr": options.lr or default_lr(options),
        "epochs": options.epochs or (math.inf if options.minutes else DEFAULT_EPOCHS),
        "seconds": 60 * minutes,
        "checkpoint_seconds": 60 * options.checkpoint_minutes or math.inf,
        "device": device,
        "amp": amp_dtype(options.amp, device),
    }
    asked = {field.name: getattr(options, field.name) for field in fields(Plan) if field.name not in decided}
    plan = Plan(**asked | decided)
    _check_parts(plan, images)
    return plan


def recorded(options: TrainOptions, plan: Plan) -> TrainOptions:
    """The options with what was chosen for them: as config.yaml holds them, so that a run can be repeated.

    How long the run may take and the machine's own choices stay as they were asked for.
    """
    return replace(
        options,
        size=plan.size.typed,
        resize=plan.rule.resize,
        fit=plan.rule.fit,
        interpolation=plan.rule.interpolation,
        fill=_as_text(plan.rule.fill) if plan.rule.fit == "pad" else None,
        colour=plan.rule.colour,
        mean=_as_text(plan.mean),
        std=_as_text(plan.std),
        crop_padding=plan.crop_padding,
        train_size=plan.train_size.typed if plan.crop_scale else None,
        flip=plan.flip,
        batch_size=plan.batch_size,
        lr=plan.lr,
    )


def _as_text(rgb: Iterable[float]) -> str:
    return ",".join(map(str, rgb))


def default_lr(options: TrainOptions) -> float:
    """The peak learning rate where none is given."""
    fine_tuned = (options.pretrained or options.weights) and not options.freeze
    return DEFAULT_LR[options.optimizer] * (FINE_TUNING_RATE if fine_tuned else 1.0)


def pick_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU, else Apple's, else the CPU.

    Raises:
        ValueError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and distributed.world() > 1:
        gpus, processes = torch.cuda.device_count(), distributed.local_world()
        if gpus and processes > gpus:
            raise ValueError(f"{processes} processes for {gpus} GPUs; pass --nproc-per-node {gpus}, or --device cpu")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; pass --device auto or cpu") from None
    return device


def amp_dtype(amp: str, device: torch.device) -> torch.dtype:
    """The type that autocast computes in; float32 for no autocast.

    Raises:
        ValueError: the GPU has no bfloat16.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not has_bf16:
        raise ValueError("--amp bf16: this GPU has no bfloat16; pass --amp fp16 or off")
    if amp == "auto":
        is_fast = has_bf16 if device.type == "cuda" else device.type == "cpu" and cpu_computes_bf16()
        amp = "bf16" if is_fast else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def cpu_computes_bf16() -> bool:
    """Whether the processor multiplies in bfloat16; others convert, which is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)  # the last one is ARM's


def _check_parts(plan: Plan, images: int) -> None:
    smallest, parts = min(plan.batch_size, images), distributed.world() * plan.accumulate
    if parts > 1 and smallest < 2 * parts:  # BatchNorm has no variance of one image
        raise ValueError(
            f"--batch-size {smallest}: must be at least {2 * parts}, 2 images for each of "
            f"{distributed.world()} processes × {plan.accumulate} --accumulate"
        )
