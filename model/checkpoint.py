"""Checkpoints: plain dicts of tensors and numbers, written whole or not at all, read with `weights_only=True`."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from predictor.files import atomic_write


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file, the reason and the way out."""


def save(values: Mapping[str, Any], path: Path | str) -> None:
    """Writes `values` to `path`; a kill at any moment leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written, as on a full disk. The old one is left.
    """
    with atomic_write(path) as file:
        try:
            torch.save(dict(values), file)
        except RuntimeError as error:  # PyTorch's own ("unexpected pos"), in the place of the one that led to it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path | str) -> dict[str, Any]:
    """Reads a dict onto the CPU. Runs no code from the file.

    Raises:
        CheckpointError: missing, damaged, or holding more than tensors, numbers, texts, lists and dicts.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; make a run with train.py") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: holds more than weights and is not loaded ({reason})") from None
    except Exception as error:  # the unpickler raises whatever the damage leads it into
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({reason})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a dict of tensors")
    return values


def load_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Reads a state_dict: a `.safetensors` file, or one of PyTorch's, where it may be an entry of the outer dict.

    Raises:
        CheckpointError: as `load`, or an entry is not a tensor.
    """
    file: dict[str, Any] = _load_safetensors(path) if Path(path).suffix == ".safetensors" else load(path)
    values = next((file[name] for name in ("state_dict", "model") if isinstance(file.get(name), dict)), file)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: '{name}' is a {type(value).__name__}, not a tensor; pass a state_dict")
    return values


def _load_safetensors(path: Path | str) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; pass the path of a .safetensors file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None


def load_into(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`network.load_state_dict` of a plain dict, which lacks the layout's version that torchvision's MNASNet asks for.

    Raises:
        RuntimeError: the state_dict is another network's.
    """
    versioned = OrderedDict(state)
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(versioned)
