"""A logistic regression on frozen features of an ImageNet network: the floor that any fine-tuning has to beat.

    python -m benchmarks.photographs.logistic_regression --data DIR --out predictions.npz

EfficientNet-Lite0 with its ImageNet weights, at its own 224 px, sees each image and its mirror image; scikit-learn's
multinomial logistic regression learns from both. It ends when it ends, whatever --minutes says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import timm
from timm.data import create_transform, resolve_data_config
from torch import nn

from benchmarks.photographs.shared import ARCH, KEPT, fit_head, forward_all, load_pretrained, parse, read_image


def main(arguments: Sequence[str] | None = None) -> int:
    task = parse(__doc__, arguments)
    network: nn.Module = load_pretrained(timm.create_model(ARCH, num_classes=0))
    transform = create_transform(**resolve_data_config(model=network))
    images = [read_image(path, KEPT) for path in task.images]
    views = [transform, lambda image: transform(image).flip(2)]
    regression = fit_head([forward_all(network, images, view).numpy() for view in views], task.targets, task.seed)
    seconds = task.seconds
    probabilities = regression.predict_proba(forward_all(network, task.test, transform).numpy())
    task.save(probabilities, seconds, c=regression.C)
    return 0


if __name__ == "__main__":
    sys.exit(main())
