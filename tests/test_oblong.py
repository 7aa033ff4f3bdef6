"""Networks that see oblong images, from --size HEIGHTxWIDTH to the exported graphs."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from benchmarks import resume as kills
from export.graphs import exported_program
from export.graphs import onnx as onnx_files
from model import Classifier, load_run
from predictor.pillow_preprocessing import crop, decode
from predictor.spec import PixelRule
from tests.conftest import reports
from tests.folders import COLOURS, image
from train import main
from training.report import write_report

TRAINED = ["--arch", "fastnet_small", "--size", "32x48", "--resize", "36", "--batch-size", "8", "--warmup", "0"]
AUGMENTED = ["--crop-scale", "0.35", "--train-size", "24x36", "--rotate", "10", "--erase", "0.5", "--cutmix", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Oblong images, lying and standing."""
    root = tmp_path_factory.mktemp("oblong")
    for label, colour in COLOURS.items():
        (root / label).mkdir()
        for i in range(12):
            image(colour, i, (72 + i, 50) if i % 3 else (50, 72)).save(root / label / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run of two epochs, with most augmentations."""
    out = tmp_path_factory.mktemp("runs") / "oblong"
    with reports(write_report):
        options = [*TRAINED, *AUGMENTED, "--epochs", "2"]
        assert main(["--data", str(folder), *options, "--out", str(out)]) == 0
    return out


def test_a_run_sees_the_shape_that_was_asked_for_and_records_it(run):
    spec, network = load_run(run)
    assert spec.rule == PixelRule(height=32, width=48, resize=36)
    assert network(torch.zeros(2, 3, 32, 48)).shape == (2, 3)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["size"], config["resize"], config["train_size"]) == ("32x48", 36, "24x36")
    assert json.loads((run / "metrics.json").read_text())["train"]["options"]["train_size"] == "24x36"


def test_a_run_that_goes_on_is_the_same_bit_for_bit(folder, tmp_path):
    options = ["--data", str(folder), *TRAINED, *AUGMENTED, "--schedule", "constant"]
    assert main([*options, "--epochs", "2", "--out", str(tmp_path / "whole")]) == 0
    assert main([*options, "--epochs", "1", "--out", str(tmp_path / "parts")]) == 0
    assert main(["--resume", str(tmp_path / "parts"), "--epochs", "2"]) == 0
    assert kills.differences(tmp_path / "whole", tmp_path / "parts") == []


def test_images_that_are_shifted_train_it_too(folder, tmp_path):
    options = ["--data", str(folder), *TRAINED, "--trivial", "--mixup", "0.2", "--crop-padding", "6", "--epochs", "1"]
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    assert load_run(tmp_path / "run")[0].rule == PixelRule(height=32, width=48, resize=36)


def test_scoring_reads_its_images_as_it_was_trained(run, folder, tmp_path):
    scores = tmp_path / "scores.json"
    assert main(["--evaluate", str(run), "--data", str(folder), "--split", "test", "--out", str(scores)]) == 0
    test = json.loads((run / "metrics.json").read_text())["test"]
    assert json.loads(scores.read_text())["loss"] == pytest.approx(test["loss"], rel=1e-4)


def test_the_exported_graph_gives_for_any_image_what_pillow_and_the_network_give(run, folder, tmp_path):
    spec, network = load_run(run)
    classifier = Classifier(network, spec).eval()
    onnx_files.save(exported_program.trace(classifier), spec, tmp_path, "net")
    session = onnxruntime.InferenceSession(tmp_path / "net.pixels.onnx", providers=["CPUExecutionProvider"])
    for path in (folder / "red" / "0.jpg", folder / "blue" / "7.jpg"):  # standing and lying
        whole = decode(path.read_bytes())
        with torch.inference_mode():
            expected = classifier.classify_crops(torch.from_numpy(crop(whole, spec.rule)[None].copy()))
        (got,) = session.run(["probabilities"], {"images": np.asarray(whole)[None]})
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-3)
