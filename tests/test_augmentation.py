import torch
from hypothesis import given
from hypothesis import strategies as st

from training.augmentation import flip_and_shift, jitter


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count=6, size=8):
    """Pictures whose red is the column and whose green is the row."""
    steps = torch.arange(size, dtype=torch.uint8)
    columns, rows = steps.expand(size, size), steps[:, None].expand(size, size)
    return torch.stack([columns, rows, torch.zeros_like(rows)], dim=2).expand(count, size, size, 3)


def test_off_is_off():
    crops = numbered()
    assert flip_and_shift(crops, False, 0, generator()) is crops
    assert jitter(crops, 0.0, generator()) is crops


def test_flip_mirrors_about_half_of_the_pictures_and_leaves_the_others():
    crops = numbered(count=400)
    got = flip_and_shift(crops, True, 0, generator())
    mirrored = (got == crops.flip(2)).flatten(1).all(dim=1)
    kept = (got == crops).flatten(1).all(dim=1)
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


@given(st.integers(1, 7), st.integers(0, 99))
def test_a_shift_is_a_crop_of_the_picture_padded_with_mirrored_edges(padding, seed):
    crops = numbered(count=5)
    got = flip_and_shift(crops, False, padding, generator(seed))
    padded = torch.nn.functional.pad(crops.permute(0, 3, 1, 2).float(), [padding] * 4, mode="reflect")
    padded = padded.permute(0, 2, 3, 1).to(torch.uint8)
    for before, after in zip(padded, got, strict=True):
        windows = [before[y : y + 8, x : x + 8] for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
        assert any(torch.equal(window, after) for window in windows)


def test_every_shift_happens():
    crops = numbered(count=500)
    got = flip_and_shift(crops, False, 2, generator())
    assert {tuple(picture[4, 4, :2].tolist()) for picture in got} == {(x, y) for x in range(2, 7) for y in range(2, 7)}


def test_jitter_changes_pictures_one_by_one_and_within_its_strength():
    crops = torch.full((64, 4, 4, 3), 100, dtype=torch.uint8)  # grey: contrast and saturation leave it alone
    got = jitter(crops, 0.2, generator())
    assert got.dtype == torch.uint8
    means = got.float().mean(dim=(1, 2, 3))
    assert len(means.unique()) > 20
    assert means.min() >= 80
    assert means.max() <= 120


def test_the_seed_decides():
    crops = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8)
    for augment in (lambda g: flip_and_shift(crops, True, 3, g), lambda g: jitter(crops, 0.3, g)):
        assert torch.equal(augment(generator(1)), augment(generator(1)))
        assert not torch.equal(augment(generator(1)), augment(generator(2)))
