from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from model.tensor_preprocessing import Resize, _halves, _to_levels, normalise
from predictor.pillow_preprocessing import crop, crop_box, pad_box
from predictor.spec import FITS, INTERPOLATIONS, PixelRule


def noise(width: int, height: int, seed: int = 0, levels: int = 256) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    return (values * (255 // (levels - 1))).astype(np.uint8)


def resized(pixels: np.ndarray, rule: PixelRule) -> np.ndarray:
    return Resize(rule)(torch.from_numpy(pixels.copy())[None])[0].numpy()


@st.composite
def rules(draw, fits=FITS, interpolations=INTERPOLATIONS):
    height = draw(st.integers(1, 64))
    width = draw(st.one_of(st.just(height), st.integers(1, 64)))
    fit, least = draw(st.sampled_from(fits)), min(height, width)
    return PixelRule(
        height=height,
        width=width,
        resize=draw(st.integers(least, 2 * least)) if fit == "crop" else least,
        interpolation=draw(st.sampled_from(interpolations)),
        fit=fit,
        fill=draw(st.tuples(*[st.integers(0, 255)] * 3)) if fit == "pad" else (0, 0, 0),
    )


sides = st.integers(1, 300)


@given(sides, sides, rules(["crop"], ["bilinear"]), st.integers(0, 9), st.sampled_from([2, 4, 256]))
@example(640, 427, PixelRule.square(224, 256), 0, 256)  # a photograph
@example(427, 640, PixelRule.square(224), 0, 2)
@example(192, 192, PixelRule.square(32), 0, 256)  # weights that are odd multiples of 1/72: sums end in exactly .5
@example(16, 16, PixelRule.square(224), 0, 256)  # and here multiples of 1/28
@example(1, 3000, PixelRule.square(32, 36), 0, 256)
@example(3000, 1, PixelRule.square(32), 0, 256)
@example(8, 8, PixelRule.square(32), 0, 256)
@example(1, 1, PixelRule.square(5, 9), 0, 256)
def test_the_resize_in_the_graph_is_pillows_bit_for_bit(width, height, rule, seed, levels):
    pixels = noise(width, height, seed, levels)
    np.testing.assert_array_equal(resized(pixels, rule), crop(Image.fromarray(pixels), rule))


@pytest.mark.parametrize("is_square", [True, False])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@given(width=sides, height=sides, any_rule=rules(), seed=st.integers(0, 9), levels=st.sampled_from([2, 4, 256]))
def test_so_is_it_with_each_filter_and_fit(interpolation, fit, is_square, width, height, any_rule, seed, levels):
    rule = replace(any_rule, interpolation=interpolation, fit=fit)
    if is_square:
        rule = replace(rule, width=rule.height)
    least = min(rule.height, rule.width)
    rule = replace(rule, resize=max(rule.resize, least) if fit == "crop" else least)
    pixels = noise(width, height, seed, levels)
    np.testing.assert_array_equal(resized(pixels, rule), crop(Image.fromarray(pixels), rule))


@pytest.mark.parametrize("rule", [PixelRule.square(224, 256), PixelRule.square(32), PixelRule.square(299, 342)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_it_is_exact_on_a_photograph_too(rule, interpolation):
    from sklearn.datasets import load_sample_images

    for photograph in load_sample_images().images:
        for changed in (rule, replace(rule, height=rule.width * 3 // 4, fit="pad", fill=(9, 99, 199))):
            changed = replace(changed, interpolation=interpolation)
            np.testing.assert_array_equal(resized(photograph, changed), crop(Image.fromarray(photograph), changed))


@pytest.mark.parametrize("fit", FITS)
def test_filters_that_overshoot_are_clipped_to_grey_levels(fit):
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[3:6, 3:6] = 255
    for interpolation in ("bicubic", "lanczos"):
        rule = replace(PixelRule.square(64), interpolation=interpolation, fit=fit)
        np.testing.assert_array_equal(got := resized(pixels, rule), crop(Image.fromarray(pixels), rule))
        assert {0, 255} < set(np.unique(got).tolist())


def test_a_tall_image_is_resized_across_first():
    """Pillow 13 would begin with the longer way."""
    rule = replace(PixelRule.square(19), interpolation="bicubic", fit="squash")
    pixels = noise(42, 280, levels=2)
    across = Image.fromarray(pixels).resize((19, 280), Image.Resampling.BICUBIC)
    expected = np.asarray(across.resize((19, 19), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(crop(Image.fromarray(pixels), rule), expected)


def test_images_of_a_batch_do_not_touch_each_other():
    batch = torch.from_numpy(np.stack([noise(40, 30, seed) for seed in range(3)]))
    for rule in (PixelRule.square(16, 20), replace(PixelRule.square(16), interpolation="lanczos", fit="pad")):
        resize = Resize(rule)
        assert torch.equal(resize(batch), torch.cat([resize(one[None]) for one in batch]))


@given(st.integers(1, 5000), st.integers(1, 5000), rules(["crop"]))
def test_the_crop_is_a_centred_box_of_the_networks_aspect_ratio(width, height, rule):
    left, top, right, bottom = crop_box(width, height, rule)
    across, down = right - left, bottom - top
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    assert abs((width - right) - left) <= 1
    assert abs((height - bottom) - top) <= 1
    share = min(Fraction(width, rule.width), Fraction(height, rule.height)) * Fraction(
        min(rule.height, rule.width), rule.resize
    )
    assert across == 1 or abs(across - share * rule.width) <= Fraction(1, 2)
    assert down == 1 or abs(down - share * rule.height) <= Fraction(1, 2)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 96), st.integers(0, 96))
def test_a_square_crop_is_that_of_version_1(width, height, size, margin):
    rule = PixelRule.square(size, size + margin)
    side = max(1, (2 * min(width, height) * size + rule.resize) // (2 * rule.resize))
    left, top = (width - side) // 2, (height - side) // 2
    assert crop_box(width, height, rule) == (left, top, left + side, top + side)


@given(st.integers(1, 5000), st.integers(1, 5000), rules(["pad"]))
def test_a_padded_image_is_whole_centred_and_as_large_as_fits(width, height, rule):
    assert crop_box(width, height, rule) == (0, 0, width, height)
    left, top, right, bottom = pad_box(width, height, rule)
    across, down = right - left, bottom - top
    assert (across, down) == (rule.width, down) or (across, down) == (across, rule.height)
    assert abs((rule.width - right) - left) <= 1
    assert abs((rule.height - bottom) - top) <= 1
    scale = min(Fraction(rule.width, width), Fraction(rule.height, height))
    assert across == 1 or abs(across - scale * width) <= Fraction(1, 2)
    assert down == 1 or abs(down - scale * height) <= Fraction(1, 2)


def test_what_is_around_a_padded_image_is_its_fill():
    rule = PixelRule(height=30, width=20, resize=20, fit="pad", fill=(7, 8, 9))
    got = crop(Image.new("RGB", (40, 20), "white"), rule)
    assert (got[:10] == (7, 8, 9)).all()
    assert (got[10:20] == 255).all()
    assert (got[20:] == (7, 8, 9)).all()


def test_a_long_thin_image_costs_no_more_than_its_square():
    image = Image.new("RGB", (1, 30_000), "red")  # resizing its short edge to 256 would make 2 gigapixels
    assert crop(image, PixelRule.square(224, 256)).shape == (224, 224, 3)


def test_normalise_is_the_formula_and_gives_planes():
    crops = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    expected = (crops.float() / 255 - mean) / std
    got = normalise(crops, mean, std)
    assert got.shape == (2, 3, 4, 5)
    torch.testing.assert_close(got, expected.permute(0, 3, 1, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weights_survive_half_precision_storage(dtype):
    """Each half of a weight has 11 bits: TF32 and fp16 matrix units keep them, bfloat16 does not.

    So the resize of one axis is exact with weights that have been through fp16, and is not through bfloat16.
    """
    side, size = torch.tensor(427.0), 224
    pixels = torch.from_numpy(noise(427, 427))[..., 0].float()
    high, low = _halves(torch.arange(427.0), side, size)
    assert torch.equal(high, high.round())
    assert torch.equal(low, low.round())
    assert 0 <= min(high.min(), low.min()) <= max(high.max(), low.max()) <= 2048
    expected = _to_levels(pixels @ high.T, pixels @ low.T)
    stored = _to_levels(*(pixels @ part.to(dtype).float().T for part in (high, low)))
    assert torch.equal(stored, expected) == (dtype is torch.float16)
