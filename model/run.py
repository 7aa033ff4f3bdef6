"""A run folder, read back: the spec and the network with its weights, checked against each other."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from model import registry
from model.checkpoint import CheckpointError, load_into, load_state_dict
from predictor.files import sha256
from predictor.spec import ModelSpec


def load_run(run: Path | str) -> tuple[ModelSpec, nn.Module]:
    """The spec and the network of `runs/NAME`, in evaluation mode, on the CPU.

    Raises:
        SpecError, CheckpointError: a file is missing, damaged, or does not belong to the other.
    """
    run = Path(run)
    spec = ModelSpec.load(run)
    weights = run / "model.pt"
    state = load_state_dict(weights)
    if sha256(weights) != spec.weights_sha256:
        raise CheckpointError(f"{weights}: is not the file that spec.json was written for (SHA-256); re-run train.py")
    network = registry.build(spec.arch, len(spec.labels), spec.height, spec.width)
    try:
        load_into(network, state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{weights}: does not fit the network that spec.json names ({reason[:200]})") from None
    return spec, network.eval()
