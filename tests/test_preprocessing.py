import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from model.tensor_preprocessing import _to_levels, _weights, normalise, resize_crop
from predictor.pillow_preprocessing import crop, crop_box
from predictor.spec import PixelRule


def noise(width: int, height: int, seed: int = 0, levels: int = 256) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    return (values * (255 // (levels - 1))).astype(np.uint8)


@st.composite
def rules(draw):
    size = draw(st.integers(1, 96))
    return size, draw(st.integers(size, 2 * size))


@given(st.integers(1, 300), st.integers(1, 300), rules(), st.integers(0, 9), st.sampled_from([2, 4, 256]))
@example(640, 427, (224, 256), 0, 256)  # a photograph
@example(427, 640, (224, 224), 0, 2)  # Pillow chooses the order of its passes by the shape
@example(192, 192, (32, 32), 0, 256)  # weights that are odd multiples of 1/72: sums end in exactly .5
@example(16, 16, (224, 224), 0, 256)  # and here multiples of 1/28
@example(1, 3000, (32, 36), 0, 256)
@example(3000, 1, (32, 32), 0, 256)
@example(8, 8, (32, 32), 0, 256)
@example(1, 1, (5, 9), 0, 256)
def test_the_resize_in_the_graph_is_pillows_bit_for_bit(width, height, rule, seed, levels):
    pixels = noise(width, height, seed, levels)
    got = resize_crop(torch.from_numpy(pixels)[None], *rule)[0].numpy()
    np.testing.assert_array_equal(got, crop(Image.fromarray(pixels), *rule))


def test_it_is_exact_on_a_photograph_too():
    from sklearn.datasets import load_sample_images

    for photograph in load_sample_images().images:
        for rule in ((224, 256), (32, 32), (299, 342)):
            got = resize_crop(torch.from_numpy(photograph.copy())[None], *rule)[0].numpy()
            np.testing.assert_array_equal(got, crop(Image.fromarray(photograph), *rule))


def test_images_of_a_batch_do_not_touch_each_other():
    batch = torch.from_numpy(np.stack([noise(40, 30, seed) for seed in range(3)]))
    together = resize_crop(batch, 16, 20)
    alone = torch.cat([resize_crop(one[None], 16, 20) for one in batch])
    assert torch.equal(together, alone)


@given(st.integers(1, 5000), st.integers(1, 5000), rules())
def test_the_crop_is_a_centred_square_inside_the_image(width, height, rule):
    left, top, right, bottom = crop_box(width, height, *rule)
    assert right - left == bottom - top >= 1
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    assert abs((width - right) - left) <= 1
    assert abs((height - bottom) - top) <= 1


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
    high, low = _weights(torch.arange(427.0), side, size)
    assert torch.equal(high, high.round())
    assert torch.equal(low, low.round())
    assert 0 <= min(high.min(), low.min()) <= max(high.max(), low.max()) <= 2048
    expected = _to_levels(pixels @ high.T, pixels @ low.T)
    stored = _to_levels(*(pixels @ part.to(dtype).float().T for part in (high, low)))
    assert torch.equal(stored, expected) == (dtype is torch.float16)
