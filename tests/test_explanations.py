"""Integrated gradients: what makes them a method and not an image."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from export.graphs import torchscript
from model import Classifier, registry
from predictor.pillow_preprocessing import crop, decode
from predictor.spec import ModelSpec, PixelRule


@pytest.fixture(scope="module")
def explainer(exported):
    from handler.explanations import Explainer

    return Explainer(exported / "digits.pt", None)


@pytest.fixture(scope="module")
def crops(run):
    return [crop(decode(path.read_bytes()), PixelRule.square(32)) for path in sorted((run / "samples").iterdir())[:12]]


def test_they_add_up_to_the_difference_of_the_logits(explainer, crops, exported, monkeypatch):
    """The axiom of completeness: nothing of the answer is left unexplained, and nothing is invented."""
    monkeypatch.setitem(explainer.attributions.__globals__, "STEPS", 512)
    module, _ = torchscript.load(exported / "digits.pt")
    for pixels in crops:
        planes = module.to_planes(torch.from_numpy(pixels[None].copy()))
        with torch.no_grad():
            logits, grey = module.network(planes)[0], module.network(torch.zeros_like(planes))[0]
        place = int(logits.argmax())
        total = explainer.attributions(pixels, place, time.monotonic() + 60).sum()
        # middles stand for the integral; the network has kinks (ReLU), so the sum is close and not equal
        assert total == pytest.approx(float(logits[place] - grey[place]), rel=0.05, abs=0.1)


def test_a_pixel_that_does_not_matter_gets_nothing(explainer, crops, exported):
    """The axiom of sensitivity, for a pixel that is the baseline's: the mean colour explains nothing."""
    _, spec = torchscript.load(exported / "digits.pt")
    pixels = crops[0].copy()
    pixels[4:12, 4:12] = np.round(np.array(spec.mean) * 255)
    attributions = explainer.attributions(pixels, 3, time.monotonic() + 60)
    assert attributions.shape == (32, 32)
    assert np.abs(attributions[4:12, 4:12]).max() < 0.05 * np.abs(attributions).max()


def test_another_label_has_another_explanation(explainer, crops):
    one, other = (explainer.attributions(crops[0], place, time.monotonic() + 60) for place in (1, 7))
    assert np.abs(one - other).max() > 0.1 * np.abs(one).max()


def test_a_network_of_another_shape_is_explained_pixel_by_pixel(tmp_path):
    from handler.explanations import Explainer

    torch.manual_seed(0)
    spec = ModelSpec(
        arch="simplecnn", labels=("a", "b"), height=24, width=40, resize=24, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    torchscript.save(Classifier(registry.build("simplecnn", 2, 24, 40), spec).eval(), spec, tmp_path / "net.pt")
    pixels = np.full((24, 40, 3), 128, np.uint8)  # the mean, about which there is nothing to say
    pixels[:, 30:] = np.random.default_rng(0).integers(0, 256, (24, 10, 3))
    attributions = np.abs(Explainer(tmp_path / "net.pt", None).attributions(pixels, 1, time.monotonic() + 60))
    assert attributions.shape == (24, 40)
    assert attributions[:, :30].max() < 0.05 * attributions[:, 30:].max()


@pytest.mark.parametrize(
    ("shape", "shown"),  # height, width, px
    [
        ((32, 32), (224, 224)),
        ((224, 224), (224, 224)),
        ((299, 299), (299, 299)),
        ((32, 96), (75, 224)),
        ((96, 32), (224, 75)),
        ((160, 320), (160, 320)),
    ],
)
def test_what_is_for_the_label_is_red_and_what_is_against_it_is_blue(shape, shown):
    from handler.explanations import overlay

    attributions = np.zeros(shape, dtype=np.float32)
    attributions[: shape[0] // 4] = 1
    attributions[-shape[0] // 4 :] = -1
    image = Image.open(io.BytesIO(overlay(np.full((*shape, 3), 128, np.uint8), attributions)))
    pixels = np.asarray(image).astype(int)
    assert pixels.shape == (*shown, 3)
    top, middle, bottom = pixels[shown[0] // 10], pixels[shown[0] // 2], pixels[-shown[0] // 10]
    assert (top[:, 0] > top[:, 2] + 50).all()
    assert (bottom[:, 2] > bottom[:, 0] + 50).all()
    np.testing.assert_allclose(middle, 128, atol=2)


def test_nothing_at_all_is_shown_as_the_image():
    from handler.explanations import overlay

    image = Image.open(io.BytesIO(overlay(np.full((224, 224, 3), 90, np.uint8), np.zeros((224, 224), np.float32))))
    np.testing.assert_array_equal(np.asarray(image), 90)
