"""Each filter and fit through the exported graphs: they give what Pillow gives, and the spec's rule travels along."""

import json
from dataclasses import replace

import numpy as np
import onnx
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
from tests.test_colour_profiles import P3

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
    session = onnxruntime.InferenceSession(onnx_of(rule).SerializeToString())
    for size in IMAGES:
        pixels = noise(*size)
        got = session.run(None, {"images": pixels[None]})[0][0].astype(int)
        off = np.abs(got - crop(Image.fromarray(pixels), rule))
        assert off.max() <= (rule.interpolation == "lanczos")  # the last bit of a sine is each library's own
        assert (off > 0).mean() < 0.002


@pytest.mark.parametrize("rule", [RULES[1], PixelRule.square(24, 28)], ids=["squash", "square crop"])
def test_a_bilinear_squash_or_square_crop_needs_no_float64(rule):
    """Some runtimes have none (docs/onnx.md)."""
    assert (rule.interpolation, rule.fit) in (("bilinear", "squash"), ("bilinear", "crop"))
    graph = onnx.shape_inference.infer_shapes(onnx_of(rule)).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    assert len(values) > 20
    kinds = {value.type.tensor_type.elem_type for value in values} | {value.data_type for value in graph.initializer}
    assert onnx.TensorProto.FLOAT in kinds
    assert onnx.TensorProto.DOUBLE not in kinds


def onnx_of(rule: PixelRule) -> onnx.ModelProto:
    example = torch.zeros(2, 33, 38, 3, dtype=torch.uint8)
    open_dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    return onnx_files.convert(exported_program._trace(Resize(rule), example, open_dimensions, "images", "crops"))


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


VERSION_1 = """{
  "arch": "simplecnn",
  "labels": ["a", "b"],
  "size": 32,
  "resize": 36,
  "mean": [0.5, 0.4, 0.3],
  "std": [0.2, 0.25, 0.3],
  "temperature": 1.5,
  "trained_on": "photos, 60 images",
  "metrics": {"accuracy": 0.75},
  "weights_sha256": "",
  "versions": {"torch": "2.13.0"},
  "spec_version": 1
}
"""  # a file that programs of version 1 wrote


def test_version_1_of_the_spec_still_serves(tmp_path):
    (tmp_path / "spec.json").write_text(VERSION_1)
    old = ModelSpec.load(tmp_path)
    values = json.loads(VERSION_1)
    size = values.pop("size")
    meant = {"height": size, "width": size, "interpolation": "bilinear", "fit": "crop", "fill": (0, 0, 0)}
    today = values | meant | {"colour": "as-stored", "spec_version": 2}
    assert old == ModelSpec(**today)

    image = Image.fromarray(noise(50, 37))
    body = save(image, "PNG", icc_profile=P3)  # which version 1 ignores
    box = (8, 2, 41, 35)  # 33 = 37 * 32 / 36, rounded, in the middle
    seen = image.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read(body, old.rule), np.asarray(seen))

    torch.manual_seed(0)
    network = registry.build("simplecnn", 2, 32)
    expected = probabilities(network, today, image)
    torch.testing.assert_close(probabilities(network, json.loads(VERSION_1), image), expected, rtol=0, atol=0)
    for other in ({"resize": 40}, {"interpolation": "lanczos"}, {"temperature": 3.0}):  # it could differ
        assert not torch.equal(probabilities(network, today | other, image), expected), other


def probabilities(network: torch.nn.Module, spec: dict, image: Image.Image) -> torch.Tensor:
    """float32 (1, C), of the pixel graph of a spec as it stands in a file."""
    classifier = Classifier(network, ModelSpec.from_json(json.dumps(spec))).eval()
    with torch.inference_mode():
        return classifier(torch.from_numpy(np.array(image))[None])


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
    with pytest.raises(ValueError, match=r"^--size 32x48: vit_b_16 cannot take it \(it takes squares only\)"):
        registry.build(arch, 2, 32, 48)
