"""Where decoded images lie: in memory while there is room, else in a file that streams."""

import threading

import pytest
import torch

from dataset import decoded_images
from dataset.decoded_images import FilePixels, allocate, free_memory
from dataset.loading import load
from dataset.sources import DataError, open_source
from model import checkpoint
from predictor.pillow_preprocessing import crop, decode
from predictor.spec import PixelRule
from tests.folders import make_folder
from train import main
from training.evaluation import read_images
from training.options import TrainOptions
from training.resolve import Reading
from training.size import ImageSize
from training.start import read_data


def test_what_does_not_fit_in_memory_is_kept_in_a_file(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, count=6)
    expected = load(str(folder), rule=PixelRule.square(16))

    class Little:
        available = 1000

    monkeypatch.setattr(decoded_images.psutil, "virtual_memory", lambda: Little)
    said = []
    got = load(str(folder), rule=PixelRule.square(16), store="memory", scratch=tmp_path, say=said.append)
    assert f"they stream from a temporary file in {tmp_path}" in said[-1]
    assert torch.equal(got.train.crops(slice(None)), expected.train.crops(slice(None)))


def test_a_disk_without_room_for_the_file_is_an_error_before_anything_is_read(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, count=6)
    monkeypatch.setattr(decoded_images, "free_memory", lambda processes: 1000)

    class Full:
        free = 2000

    monkeypatch.setattr(decoded_images.shutil, "disk_usage", lambda folder: Full)
    with pytest.raises(DataError, match=r"has room for 0.0 GB; choose another disk \(--out\)"):
        load(str(folder), rule=PixelRule.square(16), store="memory", scratch=tmp_path)


def test_a_run_that_streams_ends_with_the_bits_of_one_that_does_not(tmp_path, monkeypatch):
    """Each batch but the first of an epoch was asked for while the one before it was trained on."""
    train = ["--data", "digits", "--epochs", "2", "--mixup", "0.2", "--flip", "--jitter", "0.1"]
    assert main([*train, "--out", str(tmp_path / "whole")]) == 0
    waited, read = [], FilePixels._read

    def noted(self, rows):
        waited.append(threading.current_thread() is threading.main_thread())
        return read(self, rows)

    monkeypatch.setattr(FilePixels, "_read", noted)
    monkeypatch.setattr(decoded_images, "free_memory", lambda processes: 1000)
    assert main([*train, "--out", str(tmp_path / "streamed")]) == 0
    weights = [checkpoint.load_state_dict(tmp_path / name / "model.pt") for name in ("whole", "streamed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    batches = -(-1293 // 32)
    assert waited.count(False) == 2 * (batches - 1) + 1  # in two epochs, and as the test images are scored


def test_the_processes_of_a_machine_share_its_memory(tmp_path, monkeypatch):
    class Some:
        available = 100 * 2 * 16 * 16 * 3  # bytes: twice what 100 images take

    monkeypatch.setattr(decoded_images.psutil, "virtual_memory", lambda: Some)
    assert free_memory(1) >= 50 * free_memory(100)
    assert isinstance(allocate(100, 16, 16, tmp_path, processes=1), torch.Tensor)
    assert isinstance(allocate(100, 16, 16, tmp_path, processes=2, say=lambda line: None), FilePixels)


def test_training_tells_how_many_processes_share_the_memory(tmp_path, monkeypatch):
    told = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(decoded_images, "free_memory", lambda processes: told.append(processes) or 1 << 40)
    reading = Reading(rule=PixelRule.square(16), train_size=ImageSize(16, 16), crop_padding=0, workers=1)
    read_data(TrainOptions(data="digits", out=str(tmp_path)), reading)
    assert told == [3]


def test_a_temporary_file_that_was_cut_is_an_error(tmp_path):
    pixels = FilePixels(4, 8, 8, tmp_path)
    pixels[3] = torch.full((8, 8, 3), 7, dtype=torch.uint8)
    assert int(pixels[torch.tensor([3])].sum()) == 7 * 8 * 8 * 3
    pixels._file.truncate(100)
    with pytest.raises(OSError, match="cut short; is the disk full"):
        pixels[torch.tensor([3])]


@pytest.mark.parametrize("free", [1 << 40, 1000], ids=["memory", "file"])
def test_images_need_not_be_squares(tmp_path, monkeypatch, free):
    folder, rule = make_folder(tmp_path, count=6), PixelRule(height=12, width=20, resize=12)
    monkeypatch.setattr(decoded_images, "free_memory", lambda processes: free)
    source, labels = open_source(str(folder)), ("blue", "green", "red")
    loaded = load(str(folder), rule=rule, scratch=tmp_path, say=lambda line: None).train
    scored = read_images(source, labels, rule, range(18), TrainOptions(data=str(folder), out=""))
    assert isinstance(scored.pixels, torch.Tensor) == (free > 1000)
    for split in (loaded, scored):
        crops = split.crops(slice(None)).numpy()
        expected = [crop(decode((folder / name).read_bytes()), rule) for name in split.names]
        assert crops.shape == (len(split), 12, 20, 3)
        assert (crops == expected).all()
