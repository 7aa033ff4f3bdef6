"""Training images as whole frames: crops equal Pillow's, and a run with random crops repeats to the bit."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import resume as kills
from dataset import frames as frames_module
from dataset.frames import Frames, MemoryBodies, edge_for, encode, make_frame, resized_box, view
from dataset.loading import load
from predictor.pillow_preprocessing import FILTERS, crop, crop_box, decode, pad_box
from predictor.spec import PixelRule
from tests.folders import COLOURS, image, make_folder
from tests.kinds import gradient, save
from tests.learning import Training, make_plan
from tests.test_colour_profiles import P3
from train import main
from training import ahead, start
from training.augmentation import Draws, random_boxes
from training.epoch import shuffled
from training.options import TrainOptions
from training.randomness import crop_generator
from training.resolve import resolve_reading


def photograph(size, seed=0):
    """Smooth and noisy, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def jpeg(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.fixture
def frames():
    bodies = MemoryBodies(5, "raw")
    for row, size in enumerate([(60, 40), (40, 60), (33, 33), (90, 20), (8, 8)]):
        bodies[row] = photograph(size, row)
    return Frames(bodies, workers=2)


BOXES = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.3, 0.3], [0.0, 0.5, 1.0, 1.0]])


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=str)
def test_a_crop_is_what_pillow_makes_of_the_box_in_whole_pixels(frames, size, interpolation):
    frames._interpolation = interpolation
    rows = torch.tensor([3, 0, 4, 1])
    crops = frames.crops(rows, BOXES, size)
    assert crops.shape == (4, *size, 3)
    boxes = [(9, 4, 63, 18), (0, 0, 60, 40), (2, 2, 3, 3), (0, 30, 40, 60)]
    for got, row, box in zip(crops, rows.tolist(), boxes, strict=True):
        whole = photograph([(60, 40), (40, 60), (33, 33), (90, 20), (8, 8)][row], row)
        expected = whole.crop(box).resize(size[::-1], FILTERS[interpolation])
        np.testing.assert_allclose(got.numpy().astype(int), np.asarray(expected), atol=1)


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_a_box_of_no_pixels_is_one_pixel(encoding):
    bodies = MemoryBodies(1, encoding)
    bodies[0] = photograph((40, 30))
    corner = torch.tensor([[1.0, 1, 1, 1]])
    crop = Frames(bodies, 1).crops(torch.tensor([0]), corner, (4, 4))[0]
    assert (crop == torch.from_numpy(np.array(bodies_image(bodies))[-1, -1])).all()


def bodies_image(bodies):
    return view(bodies[0], *bodies.shapes[0].tolist(), bodies.encoding)


def test_threads_that_cut_crops_do_not_share_torchs_own():
    before, bodies = torch.get_num_threads(), MemoryBodies(1, "raw")
    torch.set_num_threads(3)
    try:
        assert Frames(bodies, 1)._pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as others:
            assert others.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_shapes_are_height_and_width(frames):
    assert frames.shapes(torch.tensor([3, 0])).tolist() == [[20, 90], [40, 60]]


def test_what_was_prepared_is_taken_and_is_the_same(frames, monkeypatch):
    rows = torch.tensor([0, 1, 2, 3])
    expected = [frames.crops(rows, boxes, (12, 12)) for boxes in (BOXES, BOXES.flip(0))]
    cut = []
    monkeypatch.setattr(frames_module, "resized_box", lambda *given: cut.append(given) or resized_box(*given))
    for boxes in (BOXES, BOXES.flip(0), BOXES):  # the last is on its way
        frames.prepare(rows, boxes, (12, 12))
    assert torch.equal(frames.crops(rows, BOXES, (12, 12)), expected[0])
    assert torch.equal(frames.crops(rows, BOXES.flip(0), (12, 12)), expected[1])
    assert len(cut) == 8


def test_what_was_prepared_and_not_wanted_is_dropped(frames):
    rows = torch.tensor([0, 1, 2, 3])
    frames.prepare(rows, BOXES, (12, 12))
    expected = torch.from_numpy(resized_box(np.asarray(frames.frame(4)), (0, 0, 1, 1), (12, 12), "bilinear")[None])
    assert torch.equal(frames.crops(torch.tensor([4]), torch.tensor([[0.0, 0, 1, 1]]), (12, 12)), expected)
    assert not frames._coming


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crops_are_as_sharp_as_what_the_rule_makes(folder, interpolation):
    """Of the whole of a square, a random crop is the rule's own; of every image, made with the rule's filter."""
    rule = replace(PixelRule.square(16), interpolation=interpolation)
    bodies = MemoryBodies(1, "raw")
    bodies[0] = photograph((20, 20))
    frames, row, whole = Frames(bodies, 1, interpolation), torch.tensor([0]), torch.tensor([[0.0, 0, 1, 1]])
    got, own = frames.crops(row, whole, (16, 16)).int(), frames.squares(row, rule).int()
    assert (got - own).abs().max() <= 1
    loaded = load(str(folder), rule=rule, edge=edge_for((16, 16), rule)).train.frames
    expected = resized_box(np.asarray(loaded.frame(0)), (0, 0, 1, 1), (16, 16), interpolation)
    np.testing.assert_array_equal(loaded.crops(row, whole, (16, 16))[0].numpy(), expected)


def test_a_mistake_in_a_thread_is_not_lost(frames):
    frames.prepare(torch.tensor([9]), BOXES[:1], (12, 12))
    with pytest.raises(IndexError):
        frames.crops(torch.tensor([9]), BOXES[:1], (12, 12))


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [
        ((400, 300), 150, (200, 150)),
        ((300, 400), 150, (150, 200)),
        ((100, 120), 150, (100, 120)),
        ((900, 7), 5, (643, 5)),
    ],
)
def test_a_frames_short_edge_is_reduced_and_never_enlarged(size, edge, expected):
    assert make_frame(photograph(size), edge).size == expected
    assert make_frame(jpeg(photograph(size)), edge).size == expected


RULES = [
    *(PixelRule.square(192, 219), PixelRule.square(192), PixelRule.square(160)),
    *(PixelRule(height=96, width=160, resize=resize) for resize in (96, 120)),
    *(PixelRule(height=160, width=96, resize=96, fit=fit) for fit in ("pad", "squash")),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (400, 400), (2000, 300)], ids=str)
def test_what_the_rule_makes_of_a_frame_is_never_enlarged(rule, size):
    """Frames for random crops of 160 px; the images are larger."""
    frame = make_frame(Image.new("RGB", size), edge_for((160, 160), rule))
    left, top, right, bottom = crop_box(*frame.size, rule)
    inner = pad_box(*frame.size, rule)
    assert right - left >= inner[2] - inner[0]
    assert bottom - top >= inner[3] - inner[1]
    assert min(frame.size) >= 256  # and crops of two fifths of the area are not enlarged either


def test_a_run_keeps_frames_for_the_larger_of_what_it_trains_at_and_what_it_serves_at(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(start, "load", lambda *_, edge, **options: seen.append((edge, options["rule"].resize)))
    for sizes in ({"size": 48, "train_size": 24}, {"size": 48}, {"size": "24x48", "train_size": "20x40"}):
        options = TrainOptions(data=str(folder), out=str(tmp_path), arch="fastnet_small", crop_scale=0.5, **sizes)
        start.read_data(options, resolve_reading(options))
    assert seen == [(48, 48), (77, 48), (64, 24)]


def test_the_colours_of_frames_are_those_of_the_rule(tmp_path):
    """A photograph in Display P3 beside others."""
    folder = make_folder(tmp_path, count=8)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(save(gradient(40, 30), "JPEG", icc_profile=P3))
    frames = {}
    for colour in ("srgb", "as-stored"):
        rule = replace(PixelRule.square(16), colour=colour)
        data = load(str(folder), rule=rule, edge=64)
        frames[colour] = np.asarray(data.train.frames.frame(0))
        np.testing.assert_array_equal(frames[colour], np.asarray(decode(path.read_bytes(), colour=colour)))
    assert (frames["srgb"] != frames["as-stored"]).any()


def test_a_small_image_is_its_own_frame():
    body = jpeg(photograph((50, 40)))
    np.testing.assert_array_equal(np.asarray(make_frame(body, 64)), np.asarray(decode(body)))


def test_a_large_jpeg_file_is_decoded_small_and_upright_but_not_too_small(monkeypatch):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    body = jpeg(photograph((1000, 800)), exif=exif.tobytes())
    loaded = []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *_: loaded.append(self.size) or self)
    make_frame(body, 150)
    make_frame(body, 201)
    assert loaded == [(200, 250), (400, 500)]


def test_frames_survive_as_bytes():
    picture = photograph((45, 31))
    raw = view(encode(picture, "raw"), 31, 45, "raw")
    np.testing.assert_array_equal(np.asarray(raw), np.asarray(picture))
    lossy = np.asarray(view(encode(picture, "jpeg"), 31, 45, "jpeg")).astype(int)
    assert np.abs(lossy - np.asarray(picture)).mean() < 2


def test_only_the_training_split_becomes_frames_and_val_and_test_keep_their_pixels(tmp_path):
    folder = make_folder(tmp_path, count=8)
    rule = PixelRule.square(16, 20)
    squares, whole = load(str(folder), rule=rule), load(str(folder), rule=rule, edge=19)
    for split in ("val", "test"):
        expected, got = getattr(squares, split), getattr(whole, split)
        assert torch.equal(got.crops(slice(None)), expected.crops(slice(None)))
        assert (got.names, got.frames) == (expected.names, None)
    assert whole.train.names == squares.train.names
    assert whole.train.frames.shapes(whole.train.rows).tolist() == [[19, 25]] * len(whole.train)
    for i, name in enumerate(whole.train.names):
        frame = make_frame((folder / name).read_bytes(), 19)
        np.testing.assert_array_equal(whole.train.crops(slice(i, i + 1))[0].numpy(), crop(frame, rule))


def test_squares_of_frames_that_were_not_reduced_are_exact(tmp_path):
    folder = make_folder(tmp_path, count=8)
    rule = PixelRule.square(16, 20)
    squares, whole = load(str(folder), rule=rule), load(str(folder), rule=rule, edge=64)
    assert torch.equal(whole.train.crops(slice(None)), squares.train.crops(slice(None)))


def test_an_unreadable_training_image_is_left_out(tmp_path):
    folder = make_folder(tmp_path, count=8, splits=("train", "test"))
    (folder / "train" / "red" / "0.jpg").write_bytes(b"nothing")
    data = load(str(folder), rule=PixelRule.square(16), edge=19, skip_bad=True)
    assert "train/red/0.jpg" not in data.train.names
    assert (data.train.frames.shapes(data.train.rows) > 0).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs that are larger than their frames."""
    root = tmp_path_factory.mktemp("photographs")
    for label, colour in COLOURS.items():
        (root / label).mkdir()
        for i in range(12):
            image(colour, i, (64 + i, 50)).save(root / label / f"{i}.jpg")
    return root


OPTIONS = ["--size", "32", "--batch-size", "8", "--crop-scale", "0.35", "--jitter", "0.1"]


def batches(data, **options):
    """The images of an epoch as the network sees them."""
    training = Training(data, size=32, batch_size=8, crop_scale=0.35, flips=True, **options)
    seen = []
    training.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    training.epoch()
    return torch.cat(seen)


def test_preparing_changes_no_batch(folder, monkeypatch):
    data = load(str(folder), rule=PixelRule.square(32), edge=37)
    expected = batches(data, jitter=0.1)
    taken = []
    monkeypatch.setattr(Frames, "prepare", lambda self, *_: taken.append(self))
    got = batches(data, jitter=0.1)
    assert len(taken) > 2
    assert torch.equal(got, expected)


def test_two_processes_cut_the_crops_of_one(folder, monkeypatch):
    data = load(str(folder), rule=PixelRule.square(32), edge=37)

    def shares(world, rank):
        """This process's images of each batch of an epoch, without the neighbours."""
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(rank))
        plan = make_plan(len(data.train), size=32, batch_size=8, crop_scale=0.35)
        learner = type("Learner", (), {"features": None})()
        order = shuffled(torch.Generator().manual_seed(3), data.train.targets, plan)
        coming, found = ahead.Ahead(learner, data.train, order, plan, 0), []
        for step, indices in enumerate(order):
            rows = data.train.rows[indices[ahead.share_of(len(indices))]]
            found.append(data.train.frames.crops(rows, coming.boxes(step), (32, 32))[1:])
            coming.prepare(step)
        return found

    one, first, second = shares(1, 0), shares(2, 0), shares(2, 1)
    assert len(second) > 2  # of two processes a last batch that is too small is left out
    assert all(torch.equal(a, torch.cat([b, c])) for a, b, c in zip(one, first, second, strict=False))


def test_a_run_with_random_crops_resumes_bit_for_bit(folder, tmp_path):
    options = ["--data", str(folder), *OPTIONS, "--schedule", "constant", "--warmup", "0"]
    assert main([*options, "--epochs", "2", "--out", str(tmp_path / "whole")]) == 0
    assert main([*options, "--epochs", "1", "--out", str(tmp_path / "parts")]) == 0
    assert main(["--resume", str(tmp_path / "parts"), "--epochs", "2"]) == 0
    assert kills.differences(tmp_path / "whole", tmp_path / "parts") == []


def test_the_crops_may_be_smaller_than_what_is_evaluated(folder):
    rule = PixelRule.square(32)
    data = load(str(folder), rule=rule, edge=edge_for((24, 24), rule))
    seen = batches(data, arch="fastnet_small", train_size=24, mixup=0.2)
    assert seen.shape[1:] == (3, 24, 24)


def aspects(data, **options):
    """Width / height of random crops, px; and their boxes."""
    plan = make_plan(len(data.train), **{"size": 32, "crop_scale": 0.1, **options})
    order = torch.arange(len(data.train)).repeat(20)
    boxes = ahead.draw_boxes(data.train, order, torch.arange(len(order)), plan, epoch=2, step=3)
    height, width = data.train.frames.shapes(data.train.rows[order]).T
    return (boxes[:, 2] - boxes[:, 0]) * width / ((boxes[:, 3] - boxes[:, 1]) * height), boxes


def test_random_crops_are_as_wide_and_as_high_as_the_ratio_and_by_default_as_ever(folder):
    data = load(str(folder), rule=PixelRule.square(32), edge=50)
    default, boxes = aspects(data)
    draws = Draws(crop_generator(0, 2, 3), len(boxes), torch.arange(len(boxes)))
    shapes = data.train.frames.shapes(data.train.rows).repeat(20, 1)
    assert torch.equal(boxes, random_boxes(shapes, 0.1, (3 / 4, 4 / 3), draws))
    assert 0.749 < default.min() < 0.8
    assert 1.25 < default.max() < 1.334
    wide, _ = aspects(data, crop_ratio=2.0)
    assert 0.499 < wide.min() < 0.6
    assert 1.7 < wide.max() < 2.001
    squares, _ = aspects(data, crop_ratio=1.0)
    torch.testing.assert_close(squares, torch.ones(len(squares)), rtol=1e-4, atol=0)


def test_the_ratio_is_that_to_the_networks_own_shape(folder):
    data = load(str(folder), rule=PixelRule.square(32), edge=50)
    shaped, _ = aspects(data, size="32x40", crop_ratio=1.0)
    torch.testing.assert_close(shaped, torch.full((len(shaped),), 40 / 32), rtol=1e-4, atol=0)
    around, _ = aspects(data, size="40x20", arch="fastnet_small", train_size="32x16")
    assert 0.374 < around.min() < 0.4
    assert 0.62 < around.max() < 0.667


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_size": 24}, "--train-size 24: is the side of random crops; pass --crop-scale too"),
        ({"crop_ratio": 2.0}, "--crop-ratio 2: is the shape of random crops; pass --crop-scale too"),
        ({"crop_scale": 0.5, "crop_ratio": 0.75}, "--crop-ratio 0.75: must be from 1 to 10"),
        ({"crop_scale": 0.5, "crop_padding": 4}, "--crop-padding 4: --crop-scale takes its place"),
        ({"crop_scale": 0.5, "freeze": True, "pretrained": True}, "--crop-scale 0.5: --freeze computes the features"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        resolve_reading(TrainOptions(data="digits", out="x", **options))


def test_a_network_for_one_size_cannot_train_on_another():
    with pytest.raises(ValueError, match="--train-size 24: simplecnn of 32 px cannot take 24 px"):
        resolve_reading(TrainOptions(data="digits", out="x", crop_scale=0.5, train_size=24))
