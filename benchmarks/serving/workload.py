"""The two models and the images that every server gets."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from export.graphs import exported_program, onnx, quantization, torchscript
from export.pipeline import Options, export_run
from model import Classifier, ModelSpec, registry
from predictor.files import write_text
from predictor.pillow_preprocessing import crop, decode
from train import train
from training.options import TrainOptions

SMALL, LARGE = "small", "large"  # names of the models


def make_small(folder: Path) -> Path:
    """An export of simplecnn, trained on the digits; the large image sizes of the growth part resize to its 32 px."""
    run = folder / SMALL
    with contextlib.redirect_stdout(io.StringIO()):
        train(TrainOptions(data="digits", arch="simplecnn", out=str(run)))
        export_run(run, Options(name=SMALL))
    (run / "export" / "spec.json").write_text((run / "spec.json").read_text())
    return run / "export"


def make_large(folder: Path) -> Path:
    """ResNet-18 at 224 px in fp32 and int8. Its weights are random: nothing here is about accuracy."""
    torch.manual_seed(0)
    mean, std = registry.IMAGENET_MEAN, registry.IMAGENET_STD
    labels = tuple(f"class {i}" for i in range(10))
    spec = ModelSpec(arch="resnet18", labels=labels, height=224, width=224, resize=256, mean=mean, std=std)
    classifier = Classifier(registry.build("resnet18", len(labels), spec.height), spec).eval()
    export = folder / LARGE
    export.mkdir()
    torchscript.save(classifier, spec, export / f"{LARGE}.pt")
    onnx.save(exported_program.trace(classifier), spec, export, LARGE)
    crops = np.stack([crop(decode(body), spec.rule) for body in photographs(8)])
    quantization.make_int8(spec, export / f"{LARGE}.onnx", crops, export, LARGE)
    spec.save(export / "spec.json")
    write_text(export / "index_to_name.json", json.dumps({str(i): label for i, label in enumerate(labels)}))
    return export


def digits(side: int = 32, count: int = 8) -> list[bytes]:
    """JPEG files of digits, about 1 kB each at 32 px."""
    from sklearn.datasets import load_digits

    images = load_digits().images[:count] / 16 * 255
    return [_jpeg(Image.fromarray(image.astype(np.uint8)).convert("RGB").resize((side, side)), 90) for image in images]


def photographs(count: int) -> list[bytes]:
    """JPEG files of 500×375 px and about 45 kB, cut out of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(image) for image in load_sample_images().images]
    cuts = (images[i % 2].crop((x, y, x + 500, y + 375)) for i in range(count) for x, y in [(17 * i % 140, 6 * i % 52)])
    return [next(body for quality in range(95, 40, -1) if len(body := _jpeg(cut, quality)) <= 46_000) for cut in cuts]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
