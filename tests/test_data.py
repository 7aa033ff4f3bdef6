import threading

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.pictures import crop
from tests.folders import as_zip, make_folder
from train import main
from training import data as training_data
from training.data import FilePixels, cut_splits, load, read_split
from training.sources import DataError, Entry


def test_a_folder_becomes_crops_and_targets(tmp_path):
    folder = make_folder(tmp_path, count=10, kind="png")
    data = load(str(folder), size=16, resize=20)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 3, 3)
    for split in (data.train, data.val, data.test):
        for place, name in enumerate(split.names):
            expected = crop(Image.open(folder / name), 16, 20)
            np.testing.assert_array_equal(split.crops(slice(place, place + 1))[0].numpy(), expected)
            assert data.labels[split.targets[place]] == name.split("/")[0]


def test_the_cuts_keep_every_class_and_depend_on_the_seed_alone(tmp_path):
    entries = [Entry(f"{label}/{i}", label, "") for label in "ab" for i in range(50)]
    splits = cut_splits(entries, 0.1, 0.2, seed=0)
    assert splits == cut_splits(entries, 0.1, 0.2, seed=0) != cut_splits(entries, 0.1, 0.2, seed=1)
    for label in (0, 50):
        part = splits[label : label + 50]
        assert (part.count("val"), part.count("test")) == (5, 10)


def test_the_smallest_class_gives_one_picture_to_each_split():
    entries = [Entry(f"{label}/{i}", label, "") for label in "ab" for i in range(3)]
    for fraction in (0.1, 0.9):
        splits = cut_splits(entries, fraction, fraction, seed=0)
        assert sorted(splits[:3]) == sorted(splits[3:]) == ["test", "train", "val"]


def test_given_splits_are_kept_and_only_what_is_missing_is_cut():
    entries = [Entry(f"{s}/{label}/{i}", label, s) for s in ("train", "test") for label in "ab" for i in range(10)]
    splits = cut_splits(entries, 0.1, 0.1, seed=0)
    assert splits[20:] == ["test"] * 20
    assert splits[:20].count("val") == 2


def test_a_class_that_cannot_be_cut_is_named():
    with pytest.raises(DataError, match="class 'b' has 2 pictures; it needs 3"):
        cut_splits([Entry(f"{c}/{i}", c, "") for c in "aab" for i in range(2)], 0.1, 0.1, 0)


def test_unreadable_pictures_stop_the_run_with_all_their_names(tmp_path):
    folder = make_folder(tmp_path, count=5)
    (folder / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "blue" / "page.png").write_text("<html>")
    (folder / "blue" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=r"3 of 18 pictures cannot be read.*--skip-bad") as caught:
        load(str(folder), size=16, resize=16)
    for name in ("red/broken.jpg", "blue/page.png", "blue/phone.heic: HEIC is not supported"):
        assert name in str(caught.value)


def test_skip_bad_leaves_them_out_and_lists_them(tmp_path):
    folder = make_folder(tmp_path, count=5)
    (folder / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    data = load(str(folder), size=16, resize=16, skip_bad=True)
    assert len(data.train) + len(data.val) + len(data.test) == 15
    assert len(data.skipped) == 1
    assert data.skipped[0].startswith("red/broken.jpg: ")


def test_a_class_of_which_nothing_is_readable_is_named(tmp_path):
    folder = make_folder(tmp_path, count=5)
    for path in (folder / "red").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="'red' has no readable training picture"):
        load(str(folder), size=16, resize=16, skip_bad=True)


def test_samples_are_whole_files_of_the_val_split(tmp_path):
    folder = make_folder(tmp_path / "pets", count=10)
    data = load(str(as_zip(folder, tmp_path / "pets.zip", wrapped=True)), size=16, resize=16)
    assert sorted(data.samples) == ["blue-0.jpg", "green-0.jpg", "red-0.jpg"]
    files = {path.read_bytes() for path in folder.rglob("*.jpg")}
    assert set(data.samples.values()) <= files


def test_the_test_files_of_a_run_are_what_a_client_would_send(tmp_path):
    folder = make_folder(tmp_path, count=10)
    data = load(str(folder), size=16, resize=16)
    sent = {name: (label, body) for name, label, body in read_split(str(folder), "test")}
    assert sorted(sent) == sorted(data.test.names)
    for name, (label, body) in sent.items():
        assert body == (folder / name).read_bytes()
        assert label == name.split("/")[0]


def test_what_does_not_fit_in_memory_is_kept_in_a_file(tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path, count=6)
    expected = load(str(folder), size=16, resize=16)

    class Little:
        available = 1000

    monkeypatch.setattr(training_data.psutil, "virtual_memory", lambda: Little)
    got = load(str(folder), size=16, resize=16, scratch=tmp_path)
    assert "temporary file" in capsys.readouterr().out
    assert torch.equal(got.train.crops(slice(None)), expected.train.crops(slice(None)))


def test_a_disk_without_room_for_the_file_is_an_error_before_anything_is_read(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, count=6)
    monkeypatch.setattr(training_data, "free_memory", lambda: 1000)

    class Full:
        free = 2000

    monkeypatch.setattr(training_data.shutil, "disk_usage", lambda folder: Full)
    with pytest.raises(DataError, match=r"has room for 0.0 GB; choose another disk \(--out\)"):
        load(str(folder), size=16, resize=16, scratch=tmp_path)


def test_a_run_that_streams_ends_with_the_bits_of_one_that_does_not(tmp_path, monkeypatch):
    """Each batch but the first of an epoch was asked for while the one before it was trained on."""
    train = ["--data", "digits", "--epochs", "2", "--mixup", "0.2", "--flip", "--jitter", "0.1"]
    assert main([*train, "--out", str(tmp_path / "whole")]) == 0
    waited, read = [], FilePixels._read

    def noted(self, places):
        waited.append(threading.current_thread() is threading.main_thread())
        return read(self, places)

    monkeypatch.setattr(FilePixels, "_read", noted)
    monkeypatch.setattr(training_data, "free_memory", lambda: 1000)
    assert main([*train, "--out", str(tmp_path / "streamed")]) == 0
    weights = [checkpoint.load_state_dict(tmp_path / name / "model.pt") for name in ("whole", "streamed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    batches = -(-1295 // 32)
    assert waited.count(False) == 2 * (batches - 1)  # in two epochs


def test_the_processes_of_a_machine_share_its_memory(monkeypatch):
    alone = training_data.free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert training_data.free_memory() < alone / 50


def test_a_temporary_file_that_was_cut_is_an_error(tmp_path):
    pixels = FilePixels(4, 8, tmp_path)
    pixels[3] = torch.full((8, 8, 3), 7, dtype=torch.uint8)
    assert int(pixels[torch.tensor([3])].sum()) == 7 * 8 * 8 * 3
    pixels._file.truncate(100)
    with pytest.raises(OSError, match="cut short; is the disk full"):
        pixels[torch.tensor([3])]
