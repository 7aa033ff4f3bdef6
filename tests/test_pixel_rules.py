"""Each filter and fit through the exported graphs: they give what Pillow gives, and the spec's rule travels along."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from export.graphs import exported_program, torchscript
from export.graphs import onnx as onnx_files
from export.package.golden_images import _samples, _synthetic
from export.proof.parity import verify
from export.proof.runtimes import INSTALLED
from model import registry
from model.serving_graphs import Classifier
from model.tensor_preprocessing import Resize
from predictor.decoder_process import DecoderProcess
from predictor.pillow_preprocessing import crop, read
from predictor.spec import FITS, INTERPOLATIONS, ModelSpec, PixelRule
from tests.kinds import gradient, save

RULES = [
    PixelRule(height=24, width=36, resize=28 if fit == "crop" else 24, interpolation=name, fit=fit, fill=(9, 99, 199))
    for name in INTERPOLATIONS
    for fit in FITS
]
IMAGES = [(50, 37), (31, 90), (200, 9)]  # width, height: larger, taller, wider
ids = [f"{rule.interpolation}-{rule.fit}" for rule in RULES]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def spec_of(rule: PixelRule, **fields) -> ModelSpec:
    values = {"arch": "simplecnn", "labels": ("a", "b", "c"), "mean": (0.4,) * 3, "std": (0.2,) * 3, **vars(rule)}
    return ModelSpec(**values | fields)


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_the_resize_in_torchscript_is_pillows(rule):
    with torchscript._quiet():
        script = torch.jit.script(Resize(rule))
    for size in IMAGES:
        pixels = noise(*size)
        got = script(torch.from_numpy(pixels)[None])[0].numpy()
        np.testing.assert_array_equal(got, crop(Image.fromarray(pixels), rule))


@pytest.mark.parametrize("rule", RULES[::4], ids=ids[::4])  # each filter, each fit; an export takes a second
def test_the_exported_resize_in_onnx_runtime_is_pillows(rule):
    resize = Resize(rule)
    example = torch.zeros(2, 33, 38, 3, dtype=torch.uint8)
    open_dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    traced = exported_program._trace(resize, example, open_dimensions, "images", "crops")
    session = onnxruntime.InferenceSession(onnx_files.convert(traced).SerializeToString())
    for size in IMAGES:
        pixels = noise(*size)
        got = session.run(None, {"images": pixels[None]})[0][0]
        np.testing.assert_array_equal(got, crop(Image.fromarray(pixels), rule))


def test_a_model_of_another_shape_exports_and_every_runtime_agrees(tmp_path):
    spec = spec_of(replace(RULES[-1], fit="pad"))
    torch.manual_seed(0)
    classifier = Classifier(registry.build(spec.arch, 3, spec.height, spec.width), spec).eval()
    traced = exported_program.trace(classifier)
    torchscript.save(classifier, spec, tmp_path / "net.pt")
    exported_program.save(traced, spec, tmp_path, "net")
    onnx_files.save(traced, spec, tmp_path, "net")
    images = [(f"{size}", Image.fromarray(noise(*size))) for size in IMAGES * 2]
    rows = verify(classifier, spec, images, tmp_path, "net", INSTALLED)
    assert all(row.passed for row in rows), rows
    assert next(row for row in rows if row.graph == "resize").max_difference == 0


def test_version_1_of_the_spec_still_serves(tmp_path):
    old = {"arch": "simplecnn", "labels": ["a", "b"], "size": 32, "resize": 36, "mean": [0.5] * 3, "std": [0.2] * 3}
    spec = ModelSpec.from_json(json.dumps(old | {"spec_version": 1}))
    torch.manual_seed(0)
    classifier = Classifier(registry.build(spec.arch, 2, spec.height, spec.width), spec).eval()
    pixels = noise(50, 37)
    crops = torch.from_numpy(crop(Image.fromarray(pixels), spec.rule)[None].copy())
    with torch.inference_mode():
        expected = classifier.classify_crops(crops)
        assert torch.equal(classifier(torch.from_numpy(pixels)[None]), expected)


def test_the_decoder_process_reads_by_each_rule():
    body = save(gradient(200, 150), "TIFF")
    decoder = DecoderProcess()
    try:
        decoder.wait()
        for rule in (*RULES, replace(RULES[0], colour="as-stored")):
            decoder.begin_batch()
            np.testing.assert_array_equal(decoder.read(body, rule), read(body, rule))
    finally:
        decoder.close()


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_a_large_image_is_resized_in_strips_to_the_same_pixels(rule, monkeypatch):
    body = save(Image.fromarray(noise(120, 90)), "PNG")
    whole = read(body, rule)
    monkeypatch.setattr("predictor.pillow_preprocessing.STRIP", 1_000)
    np.testing.assert_array_equal(read(body, rule), whole)


@pytest.mark.parametrize("rule", RULES[:3], ids=ids[:3])
def test_golden_images_are_what_the_network_sees_with_its_margin(rule, tmp_path):
    (tmp_path / "samples").mkdir()
    gradient(300, 200).save(tmp_path / "samples" / "a.png")
    spec = spec_of(rule)
    (sample,) = _samples(tmp_path, spec)
    for pixels in (sample, *_synthetic(tmp_path, spec)):
        assert max(pixels.shape) <= 2 * max(rule.height, rule.width)
        assert crop(Image.fromarray(pixels), rule).shape == (rule.height, rule.width, 3)
    if rule.fit == "crop":
        np.testing.assert_allclose(crop(Image.fromarray(sample), rule), crop(gradient(300, 200), rule), atol=8)


@pytest.mark.parametrize("arch", ["vit_b_16"])
def test_a_network_that_takes_squares_only_says_so(arch):
    with pytest.raises(ValueError, match=r"32×48 px: vit_b_16 cannot take it \(it takes squares only\)"):
        registry.build(arch, 2, 32, 48)
