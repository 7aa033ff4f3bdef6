"""What a finished training leaves in its run folder: weights, spec, metrics, samples, report."""

from __future__ import annotations

import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset.decoded_images import Data
from dataset.sample_images import save_samples
from model.registry import is_timm
from predictor.files import sha256, write_text
from predictor.spec import ModelSpec
from training.calibration import fit_temperature
from training.evaluation import evaluate
from training.metrics import calibrated_score
from training.options import TrainOptions, shown_on_card
from training.resolve import Plan
from training.resume_state import Progress

log = logging.getLogger(__name__)


def score_splits(network: nn.Module, data: Data, scale: tuple[Tensor, Tensor]) -> tuple[dict[str, Any], float, Tensor]:
    """The scores of test and val, the temperature, which val decides, and the calibrated logits of test."""
    val = evaluate(network, data.val, *scale)
    test = evaluate(network, data.test, *scale)
    temperature = fit_temperature(val, data.val.targets)
    scores = {
        "test": calibrated_score(test, data.test.targets, data.labels, temperature),
        "val": calibrated_score(val, data.val.targets, data.labels, temperature),
    }
    return scores, temperature, test / temperature


def training_facts(
    chosen: TrainOptions,
    progress: Progress,
    network: nn.Module,
    data: Data,
    device: torch.device,
    seconds: float,
    data_seconds: float,
) -> dict[str, Any]:
    """What metrics.json says of the training itself; `chosen`: the options, of which the model card lists some."""
    return {
        "seconds": round(seconds, 2),
        "data_seconds": round(data_seconds, 2),
        "images_per_second": round(progress.images / max(progress.train_seconds, 1e-9), 1),
        "epochs": progress.history[-1]["epoch"],
        "best_epoch": progress.best.epoch,
        "images": len(data.train),
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": str(device),
        "options": shown_on_card(vars(chosen)),
    }


def write_results(
    out: Path,
    plan: Plan,
    data: Data,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    temperature: float,
    metrics: dict[str, Any],
) -> ModelSpec:
    """spec.json of the weights that lie in the folder, metrics.json and the samples; returns the spec."""
    spec = make_spec(plan, data, mean, std, temperature, metrics["test"], out / "model.pt")
    spec.save(out / "spec.json")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    save_samples(data.samples, out / "samples", say=log.info)
    return spec


def make_spec(
    plan: Plan,
    data: Data,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    temperature: float,
    test: dict[str, Any],
    weights: Path,
) -> ModelSpec:
    """The contract of the weights in the file `weights`; `test`: their scores."""
    import torchvision  # late, as in model.registry

    return ModelSpec(
        arch=plan.arch,
        labels=tuple(data.labels),
        **vars(plan.rule),
        mean=mean,
        std=std,
        temperature=temperature,
        trained_on=f"{data.name}, {len(data.train):,} images",
        metrics={name: test[name] for name in ("accuracy", "top5", "ece", "images")},
        weights_sha256=sha256(weights),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        | ({"timm": version("timm")} if is_timm(plan.arch) else {}),
    )
