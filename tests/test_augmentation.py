import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from training.augmentation import Draws, draw_mix, erase, flip_and_shift, jitter, random_boxes, rotate, turn
from training.trivial_augment import OPERATIONS, trivial_augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(count, seed=0, rows=slice(None)):
    return Draws(generator(seed), count, torch.arange(count)[rows])


def numbered(count=6, height=8, width=8):
    """Images whose red is the column and whose green is the row."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.uint8) for n in (height, width)), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)], dim=2).expand(count, height, width, 3)


def photographs(count, height=24, width=24):
    """Smooth colour images with some noise, uint8: neighbouring pixels are alike, as in a photograph."""
    small = torch.rand((count, 3, 6, 6), generator=generator(1)) * 230
    smooth = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic").permute(0, 2, 3, 1)
    noise = 8 * torch.rand((count, height, width, 3), generator=generator(2))
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def test_off_is_off():
    crops = numbered()
    assert flip_and_shift(crops, False, 0, draws(6)) is crops
    assert jitter(crops, 0.0, draws(6)) is crops
    assert rotate(crops, 0.0, draws(6)) is crops
    assert erase(crops, 0.0, draws(6)) is crops


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others():
    crops = numbered(count=400)
    got = flip_and_shift(crops, True, 0, draws(400))
    mirrored = (got == crops.flip(2)).flatten(1).all(dim=1)
    kept = (got == crops).flatten(1).all(dim=1)
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


@given(st.integers(1, 7), st.integers(8, 11), st.integers(8, 11), st.integers(0, 99))
def test_a_shift_is_a_crop_of_the_image_padded_with_mirrored_edges(padding, height, width, seed):
    crops = numbered(5, height, width)
    got = flip_and_shift(crops, False, padding, draws(5, seed))
    padded = torch.nn.functional.pad(crops.permute(0, 3, 1, 2).float(), [padding] * 4, mode="reflect")
    padded = padded.permute(0, 2, 3, 1).to(torch.uint8)
    for before, after in zip(padded, got, strict=True):
        corners = itertools.product(range(2 * padding + 1), repeat=2)
        windows = [before[y : y + height, x : x + width] for y, x in corners]
        assert any(torch.equal(window, after) for window in windows)


def test_an_oblong_image_is_mirrored_across_its_width():
    crops = numbered(40, 8, 12)
    got = flip_and_shift(crops, True, 1, draws(40))[:, 1:-1, 1:-1, 0].int().diff(dim=2)  # of columns, without edges
    assert set(got.unique().tolist()) == {-1, 1}


def test_every_shift_happens():
    crops = numbered(count=500)
    got = flip_and_shift(crops, False, 2, draws(500))
    assert {tuple(image[4, 4, :2].tolist()) for image in got} == {(x, y) for x in range(2, 7) for y in range(2, 7)}


def test_jitter_changes_images_one_by_one_and_within_its_strength():
    crops = torch.full((64, 4, 4, 3), 100, dtype=torch.uint8)  # grey: contrast and saturation leave it alone
    got = jitter(crops, 0.2, draws(64))
    assert got.dtype == torch.uint8
    means = got.float().mean(dim=(1, 2, 3))
    assert len(means.unique()) > 20
    assert means.min() >= 80
    assert means.max() <= 120


AUGMENTATIONS = {
    "flip and shift": lambda crops, d: flip_and_shift(crops, True, 3, d),
    "jitter": lambda crops, d: jitter(crops, 0.3, d),
    "rotate": lambda crops, d: rotate(crops, 90, d),
    "trivial": trivial_augment,
    "erase": lambda crops, d: erase(crops, 0.5, d),
}


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_the_seed_decides(augment):
    crops = photographs(8)
    assert torch.equal(augment(crops, draws(8, 1)), augment(crops, draws(8, 1)))
    assert not torch.equal(augment(crops, draws(8, 1)), augment(crops, draws(8, 2)))


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(augment):
    crops = photographs(8)
    whole = augment(crops, draws(8))
    assert (whole.dtype, whole.shape) == (torch.uint8, crops.shape)
    assert not torch.equal(whole, crops)
    for rows in (slice(0, 3), slice(3, 8), [7, 0, 2]):
        assert torch.equal(augment(crops[rows], draws(8, rows=rows)), whole[rows])


def test_mixup_blends_each_image_with_its_neighbour():
    mix = draw_mix(0.4, 0, 8, 8, generator())
    images, neighbours = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    assert mix.box is None
    assert torch.allclose(mix(images, neighbours), torch.tensor(1 - mix.kept))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 20)])
def test_cutmix_counts_the_label_by_the_pixels(height, width):
    images, neighbours = torch.zeros(2, 3, height, width), torch.ones(2, 3, height, width)
    kept, ends = set(), []
    for seed in range(50):
        mix = draw_mix(0, 1.0, height, width, generator(seed))
        assert float(mix(images, neighbours).mean()) == pytest.approx(1 - mix.kept)
        kept.add(round(mix.kept, 3))
        ends.append((mix.box[1], mix.box[3]))
    assert len(kept) > 15
    assert tuple(map(max, zip(*ends, strict=True))) == (height, width)  # boxes lie anywhere
    assert images.sum() == 0  # the batch itself is left alone


def test_with_both_a_coin_decides_and_with_none_nothing_is_drawn():
    coin = generator()
    cuts = [draw_mix(0.2, 1.0, 8, 8, coin).box is not None for _ in range(200)]
    assert 60 < sum(cuts) < 140
    state = coin.get_state()
    assert draw_mix(0, 0, 8, 8, coin) is None
    assert torch.equal(coin.get_state(), state)


RATIO = (3 / 4, 4 / 3)


def sides_px(boxes, shapes):
    """Width and height of each box, float64 (n,), px."""
    left, top, right, bottom = boxes.double().T
    return (right - left) * shapes[:, 1], (bottom - top) * shapes[:, 0]


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.01, 1), st.integers(0, 99))
def test_a_random_box_lies_in_its_image_and_keeps_to_area_and_aspect_ratio(height, width, scale, seed):
    shapes = torch.tensor([[height, width]]).expand(16, 2)
    boxes = random_boxes(shapes, scale, RATIO, draws(16, seed))
    assert boxes.dtype == torch.float32
    assert boxes.shape == (16, 4)
    assert ((boxes >= 0) & (boxes <= 1)).all()
    wide, high = sides_px(boxes, shapes)
    share, aspect = wide * high / (height * width), wide / high
    assert (aspect > RATIO[0] * 0.999).all()
    assert (aspect < RATIO[1] * 1.001).all()
    centred = ((boxes[:, :2] + boxes[:, 2:] - 1).abs() < 1e-5).all(dim=1)
    assert ((share > scale * 0.999) | centred).all()  # one that no attempt gave is centred, and as large as can be
    assert (share < 1.001).all()


def test_random_boxes_are_spread_as_torchvisions_are():
    """Means and quartiles of 5,000 boxes of each; the standard error of a mean is below 0.004."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    height, width, count = 300, 400, 20_000
    shapes = torch.tensor([[height, width]]).expand(count, 2)
    got = random_boxes(shapes, 0.2, RATIO, draws(count)).double()
    image = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(image, [0.2, 1.0], list(RATIO)) for _ in range(count)]
    top, left, high, wide = torch.tensor(drawn, dtype=torch.float64).T
    expected = torch.stack([left / width, top / height, (left + wide) / width, (top + high) / height], dim=1)
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    assert (got.mean(dim=0) - expected.mean(dim=0)).abs().max() < 0.02
    assert (got.quantile(at, dim=0) - expected.quantile(at, dim=0)).abs().max() < 0.03
    areas, wanted = (((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])).quantile(at) for b in (got, expected))
    assert (areas - wanted).abs().max() < 0.03


@pytest.mark.parametrize(("shape", "share"), [((10, 1000), 4 / 300), ((1000, 10), 4 / 300), ((50, 50), 1.0)])
def test_where_no_random_box_fits_it_is_the_largest_in_the_centre(shape, share):
    boxes = random_boxes(torch.tensor([shape]), 1.0, RATIO if share < 1 else (1.0, 1.0), draws(1))
    wide, high = sides_px(boxes, torch.tensor([shape]))
    assert float(wide * high) / math.prod(shape) == pytest.approx(share, rel=1e-5)
    assert torch.allclose(boxes[0, :2] + boxes[0, 2:], torch.ones(2))


def test_random_boxes_of_a_part_of_a_batch_are_those_of_the_whole():
    shapes = torch.randint(20, 500, (8, 2), generator=generator())
    whole = random_boxes(shapes, 0.3, RATIO, draws(8))
    for rows in (slice(0, 3), slice(3, 8), [7, 0, 2]):
        assert torch.equal(random_boxes(shapes[rows], 0.3, RATIO, draws(8, rows=rows)), whole[rows])
    assert not torch.equal(whole, random_boxes(shapes, 0.3, RATIO, draws(8, seed=1)))


def test_an_image_turned_by_nothing_stays_and_by_right_angles_is_exact():
    crops = photographs(4)
    degrees = torch.tensor([0.0, 90.0, 180.0, -90.0])
    assert torch.equal(turn(crops, torch.zeros(4)), crops)
    for turned, crop, quarters in zip(turn(crops, degrees), crops, (0, 1, 2, -1), strict=True):
        assert (turned.int() - crop.rot90(quarters).int()).abs().max() <= 1  # counter-clockwise


def test_an_image_that_is_no_square_turns_without_being_distorted():
    """In the middle, where no edge is mirrored, as torchvision turns it."""
    crop = photographs(1, height=20, width=40)
    turned = turn(crop, torch.tensor([30.0])).permute(0, 3, 1, 2).int()
    bilinear = functional.InterpolationMode.BILINEAR
    expected = functional.rotate(crop.permute(0, 3, 1, 2), 30.0, interpolation=bilinear).int()
    assert (turned - expected)[..., 6:14, 16:24].abs().max() <= 1


def test_images_turn_both_ways_by_no_more_than_was_asked(monkeypatch):
    seen = []
    monkeypatch.setattr("training.augmentation.turn", lambda crops, degrees: seen.append(degrees))
    rotate(numbered(count=400), 15.0, draws(400))
    (degrees,) = seen
    assert -15 <= degrees.min() < -13
    assert 13 < degrees.max() <= 15
    assert len(degrees.unique()) > 300


@pytest.mark.parametrize("seed", range(4))
def test_what_is_erased_is_a_rectangle_of_noise(seed):
    crops = torch.zeros((16, 32, 32, 3), dtype=torch.uint8)
    got = erase(crops, 1.0, draws(16, seed))
    changed = (got > 0).any(dim=3)  # noise that is black in all three channels is one pixel in 16 million
    for image in changed:
        down, across = image.any(dim=1).nonzero().flatten(), image.any(dim=0).nonzero().flatten()
        height, width = int(down[-1] - down[0]) + 1, int(across[-1] - across[0]) + 1
        assert image.sum() == height * width
        # A share of 0.02 to 0.33 of the area; each side may be off by half a pixel both ways.
        assert (height - 1) * (width - 1) <= 0.33 * 32**2
        assert (height + 1) * (width + 1) >= 0.02 * 32**2
    assert len(got[changed].unique()) > 100


def test_images_are_erased_as_often_as_was_asked():
    crops = torch.zeros((400, 8, 8, 3), dtype=torch.uint8)
    erased = erase(crops, 0.25, draws(400)).flatten(1).any(dim=1).sum()
    assert 60 < erased < 140


def by_torchvision(name, image, level):
    """What TrivialAugmentWide's operation of this name does to one image, uint8 (3, H, W)."""
    shear, centre = math.degrees(math.atan(0.99 * level)), [0.0, 0.0]
    shift = int(32 * level)
    still = {"angle": 0.0, "scale": 1.0}
    return {
        "identity": lambda: image,
        "shear x": lambda: functional.affine(image, translate=[0, 0], shear=[shear, 0.0], center=centre, **still),
        "shear y": lambda: functional.affine(image, translate=[0, 0], shear=[0.0, shear], center=centre, **still),
        "translate x": lambda: functional.affine(image, translate=[shift, 0], shear=[0.0, 0.0], **still),
        "translate y": lambda: functional.affine(image, translate=[0, shift], shear=[0.0, 0.0], **still),
        "rotate": lambda: functional.rotate(image, 135 * level),
        "brightness": lambda: functional.adjust_brightness(image, 1 + 0.99 * level),
        "colour": lambda: functional.adjust_saturation(image, 1 + 0.99 * level),
        "contrast": lambda: functional.adjust_contrast(image, 1 + 0.99 * level),
        "sharpness": lambda: functional.adjust_sharpness(image, 1 + 0.99 * level),
        "posterize": lambda: functional.posterize(image, 8 - round(6 * abs(level))),
        "solarize": lambda: functional.solarize(image, 255 * (1 - abs(level))),
        "autocontrast": lambda: functional.autocontrast(image),
        "equalize": lambda: functional.equalize(image),
    }[name]()


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name):
    """Of each image at its own strength. Where a position is on the edge between two pixels, either may be taken;
    colours may be two levels apart, since torchvision rounds down, and in between."""
    levels = torch.tensor([-1.0, -0.7, -0.4, -0.1, 0.0, 0.2, 0.5, 0.9, 1.0])
    crops = photographs(len(levels), height=40, width=48)
    got = OPERATIONS[name](crops, levels)
    assert (got.dtype, got.shape) == (torch.uint8, crops.shape)
    for image, crop, level in zip(got, crops, levels.tolist(), strict=True):
        expected = by_torchvision(name, crop.permute(2, 0, 1), level).permute(1, 2, 0)
        apart = (image.int() - expected.int()).abs()[1:-1, 1:-1]  # torchvision does not sharpen the outermost pixels
        assert float((apart <= 2).float().mean()) > 0.98, level


def test_every_operation_happens_and_each_to_some_images_of_a_batch():
    crops = photographs(1).expand(600, -1, -1, -1)
    got = trivial_augment(crops, draws(600))
    kept = (got == crops).flatten(1).all(dim=1).sum()
    assert 600 / 14 * 0.5 < kept < 600 / 14 * 4  # identity, and others at no strength
    assert len(got.unique(dim=0)) > 200
