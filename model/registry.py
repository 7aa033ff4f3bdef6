"""Networks by name, each with a head for our labels: our own, torchvision's classifiers, and timm's as `timm/NAME`."""

from __future__ import annotations

import difflib
import fnmatch
import pickle
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import timm_models
from model.checkpoint import load_into, load_state_dict
from model.fastnet import FastNet
from model.preset import IMAGENET_MEAN as IMAGENET_MEAN
from model.preset import IMAGENET_STD as IMAGENET_STD
from model.preset import Preset
from predictor.files import sha256
from predictor.spec import ModelSpec, PixelRule

FASTNETS = {"fastnet": (64, 256, 256), "fastnet_small": (64, 128, 128)}  # channels of the blocks
OWN = ("simplecnn", *FASTNETS)

# Densenet's published files say norm.1 where its layers are called norm1; torchvision's loader renames them too.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")

_NUMBERED = re.compile(r"(?:[^.]+\.)*?[^.]*\d[^.]*(?=\.)")  # of a name, up to the first part that holds a digit


class SimpleCNN(nn.Module):
    """The classic small network (LeCun et al. 1998, with ReLU and max-pooling): conv 6/16, fc 120/84/N."""

    def __init__(self, classes: int, size: int = 32, width: int | None = None) -> None:
        super().__init__()
        # Two 5×5 convolutions without padding, each halved by its pooling.
        height, width = (((side - 4) // 2 - 4) // 2 for side in (size, width or size))
        if min(height, width) < 1:
            least = min(size, width or size)
            raise ValueError(f"simplecnn needs images of at least 16 px, not {least}; pass --size 16 or more")
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * height * width, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


@lru_cache
def names() -> tuple[str, ...]:
    """Our own networks and torchvision's. timm's are `timm_models.names()`, which takes seconds to import."""
    models = _torchvision()
    return (*OWN, *models.list_models(module=models))


def matching(pattern: str) -> list[str]:
    """The names that a pattern such as `timm/*vit*` matches; without one, all but timm's, of which a line tells."""
    if not pattern:
        return [*names(), "timm/NAME (timm's: --list-archs 'timm/*')"]
    return fnmatch.filter(timm_models.names() if is_timm(pattern) else names(), pattern)


def check_name(arch: str) -> None:
    """
    Raises:
        ValueError: no such architecture; the message names those that are spelt alike.
    """
    if is_timm(arch):
        known, usual = timm_models.is_known(arch), ["timm/resnet18", "timm/mobilenetv3_small_050"]
    else:
        known, usual = arch in OWN or arch in names(), ["simplecnn", "resnet18", "mobilenet_v3_small"]
    if known:
        return
    close = timm_models.alternatives(arch) if is_timm(arch) else difflib.get_close_matches(arch, names(), n=3)
    raise ValueError(
        f"--arch {arch}: no such architecture; did you mean {', '.join(close or usual)}? "
        "(--list-archs; timm's: --list-archs 'timm/*')"
    )


def is_timm(arch: str) -> bool:
    return arch.startswith(timm_models.PREFIX)


def build(arch: str, classes: int, size: int, width: int | None = None) -> nn.Module:
    """A network with random weights: float32 (N, 3, size, width), normalised, to logits float32 (N, classes).

    Args:
        width: where it is another than the height, `size`.

    Raises:
        ValueError: no such architecture, or it cannot take images of this size; the message says what can.
    """
    check_name(arch)
    try:
        network = _build(arch, classes, size, width)
        _check_shapes(network, classes, size, width)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        best = preset(arch).size
        shown = size if width in (None, size) else f"{size}x{width}"
        raise ValueError(f"--size {shown}: {arch} cannot take it ({reason}); --size {best} is its own") from None
    return network


def preset(arch: str) -> Preset:
    """The pixels that the architecture was made for."""
    if arch in OWN:
        return Preset(32, 32)
    if is_timm(arch):
        return timm_models.preset(arch)
    found = _torchvision().get_model_weights(arch).DEFAULT.transforms()
    mean, std = tuple(found.mean), tuple(found.std)
    if arch in ("googlenet", "inception_v3"):  # ported from TensorFlow; torchvision re-scales inside the network
        mean = std = (0.5, 0.5, 0.5)
    return Preset(found.crop_size[0], found.resize_size[0], mean, std, found.interpolation.value)


def takes(network: nn.Module, classes: int, height: int, width: int) -> bool:
    """Whether the network gives logits for images of this size, px, which may not be the one that it was built for."""
    try:
        _check_shapes(network, classes, height, width)
    except (RuntimeError, ValueError, AssertionError, TypeError):
        return False
    return True


def can_build(arch: str, size: tuple[int, int], other: tuple[int, int] | None = None) -> bool:
    """Whether there is such a network for images of `size`, height and width in px; and whether that one takes images
    of the `other` size too."""
    try:
        network = build(arch, 2, *size)
    except ValueError:
        return False
    return other is None or other == size or takes(network, 2, *other)


@dataclass(frozen=True)
class Pretrained:
    """Trained weights to start from, by name, and the pixels that they were trained on (`own_rule`, mean and std)."""

    source: str  # what messages call them
    state: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rule: PixelRule


def has_installed_weights(arch: str) -> bool:
    """Whether `--pretrained` works without a network: the weights are in an installed package or a download cache."""
    if arch in OWN:
        return False
    if is_timm(arch):
        return timm_models.installed_file(arch) is not None or timm_models.is_cached(arch)
    return _downloaded(arch).exists()


def own_rule(arch: str, weights: Path | None = None) -> PixelRule:
    """The pixels that trained weights want: the whole rule of the spec beside those that were trained here, else the
    architecture's preset.

    Raises:
        ValueError: the spec is damaged.
    """
    if made := spec_beside(weights):
        return made.rule
    own = preset(arch)
    return replace(PixelRule.square(own.size, own.resize), interpolation=own.interpolation, fit=own.fit)


def read_pretrained(arch: str, weights: Path | None = None) -> Pretrained:
    """An architecture's published weights, downloaded unless they are there; or those of a state_dict file.

    Raises:
        ValueError: there are none, or they cannot be had or read.
    """
    own: Preset | ModelSpec = preset(arch)
    if weights is None:
        source, state = _published(arch)
        return Pretrained(source, state, own.mean, own.std, own_rule(arch))
    state = {_OLD_DENSENET.sub(r"\1\2", name): value for name, value in load_state_dict(weights).items()}
    own = spec_beside(weights) or own
    return Pretrained(str(weights), state, own.mean, own.std, own_rule(arch, weights))


def spec_beside(weights: Path | None) -> ModelSpec | None:
    """The spec that a training here wrote for this very file."""
    if weights is None or not weights.is_file() or not (spec := weights.with_name("spec.json")).is_file():
        return None
    made = ModelSpec.load(spec)
    return made if made.weights_sha256 == sha256(weights) else None


def load_pretrained(network: nn.Module, arch: str, pretrained: Pretrained) -> list[str]:
    """Puts trained weights into all but the head, which keeps its random ones; returns the names that were left.

    Raises:
        ValueError: they belong to another architecture.
    """
    own = network.state_dict()
    state = timm_models.adapted(network, pretrained.state) if is_timm(arch) else pretrained.state
    fits = {n: value for n, value in state.items() if n in own and own[n].shape == value.shape}
    left = [name for name in own if name not in fits and not name.endswith(".num_batches_tracked")]  # old files lack it
    head = set(head_names(network))
    if missing := [name for name in left if name not in head]:
        raise ValueError(f"{pretrained.source}: not weights of {arch}: '{missing[0]}' is missing or has another shape")
    load_into(network, {**own, **fits})
    return left


def freeze_backbone(network: nn.Module) -> list[nn.Parameter]:
    """Leaves only the head trainable; returns what was trainable besides it.

    With `train_mode` the BatchNorm statistics stay as they are too.
    """
    head = set(head_names(network))
    backbone = [p for name, p in network.named_parameters() if name not in head and p.requires_grad]
    for parameter in backbone:
        parameter.requires_grad_(False)
    return backbone


def freeze_first(network: nn.Module, share: float) -> None:
    """Leaves the first layers, this share of all, as they are; what `layer_numbers` counts."""
    numbers = layer_numbers(network)
    last = max(1, *numbers.values())
    for name, parameter in network.named_parameters():
        if numbers[name] / last < share:
            parameter.requires_grad_(False)


def train_mode(network: nn.Module, *, hold_norms: bool = False) -> None:
    """`network.train()`, but BatchNorm whose parameters are frozen keeps its statistics; with `hold_norms` any does."""
    network.train()
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and (hold_norms or not own[0].requires_grad):
            module.eval()


def layer_numbers(network: nn.Module) -> dict[str, int]:
    """How deep each parameter lies, by name: 0 for the first layer, the most for the head.

    What a number tells apart, such as `layer3`, `blocks.4` or `inception3a`, counts as one layer, whatever it consists
    of; so does each other part of the network.
    """
    head, numbers, seen = head_name(network), dict[str, int](), dict[str, int]()
    for name, _ in network.named_parameters():
        if name.startswith(f"{head}."):
            continue
        numbered = _NUMBERED.match(name)
        block = numbered.group() if numbered else name.partition(".")[0]
        numbers[name] = seen.setdefault(block, len(seen))
    return numbers | {name: len(seen) for name in head_names(network)}


def head_names(network: nn.Module) -> list[str]:
    """The names of the heads' parameters."""
    heads = [(head, network.get_submodule(head)) for head in _heads(network)]
    return [f"{head}.{parameter}" for head, module in heads for parameter, _ in module.named_parameters()]


def head_name(network: nn.Module) -> str:
    """The name of the head.

    Raises:
        ValueError: there are several, as in networks that were distilled from others.
    """
    heads = _heads(network)
    if len(heads) != 1:
        raise ValueError(f"the network has {len(heads)} heads, {', '.join(heads)}, and not one")
    return heads[0]


def _heads(network: nn.Module) -> list[str]:
    if hasattr(network, "get_classifier"):  # timm's
        return timm_models.head_names(network)
    return [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1:]


def _build(arch: str, classes: int, size: int, width: int | None = None) -> nn.Module:
    width = width or size
    if arch == "simplecnn":
        return SimpleCNN(classes, size, width)
    if arch in FASTNETS:
        return FastNet(classes, FASTNETS[arch])
    if is_timm(arch):
        return timm_models.build(arch, classes, size, width)
    options: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # the second heads only serve ImageNet training
    elif arch.startswith("vit_"):
        if width != size:
            raise ValueError("it takes squares only")
        options = {"image_size": size}
    elif arch.startswith("maxvit"):
        options = {"input_size": (size, width)}
    return _torchvision().get_model(arch, weights=None, num_classes=classes, **options)


def _check_shapes(network: nn.Module, classes: int, size: int, width: int | None = None) -> None:
    """Runs shapes alone through the network, on the meta device: a size that it cannot take is found at once."""
    training = network.training
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad():
        shapes = {name: value.to("meta") for name, value in tensors.items()}
        images = torch.empty(2, 3, size, width or size, device="meta")
        logits = torch.func.functional_call(network.eval(), shapes, images)
    network.train(training)
    assert logits.shape == (2, classes), f"it gives {tuple(logits.shape)}"


def _published(arch: str) -> tuple[str, dict[str, Tensor]]:
    """What messages call the published weights, and the weights."""
    if arch in OWN:
        raise ValueError(f"--pretrained: there are no published weights of {arch}; pass --weights FILE")
    if is_timm(arch):
        return timm_models.read_published(arch)
    # By today's names: only torchvision's own loader knows what each file lacks or calls otherwise.
    try:
        network = _torchvision().get_model(arch, weights="DEFAULT", progress=True)
        return "torchvision's weights", network.state_dict()
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    file = _downloaded(arch)
    if file.exists():  # it was there, or came
        raise ValueError(f"--pretrained: {file}: damaged ({reason}); delete it and try again")
    raise ValueError(
        f"--pretrained: torchvision's weights of {arch} cannot be downloaded ({reason}); "
        "download them where there is a network and pass --weights FILE"
    )


def _downloaded(arch: str) -> Path:
    """Where torchvision keeps the architecture's weights."""
    return Path(torch.hub.get_dir(), "checkpoints", _torchvision().get_model_weights(arch).DEFAULT.url.split("/")[-1])


def _torchvision() -> Any:
    """torchvision.models, when one of them is wanted: importing it takes longer than importing PyTorch."""
    import torchvision.models

    return torchvision.models
