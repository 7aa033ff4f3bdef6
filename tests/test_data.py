import hashlib
import json
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.__main__ import serve_command
from model import checkpoint
from predictor.pillow_preprocessing import crop
from tests.conftest import reports
from tests.folders import as_zip, make_folder
from train import export_command, main
from training import data as training_data
from training import splits
from training.data import FilePixels, load, read_split
from training.report import write_report
from training.sources import DataError


def test_a_folder_becomes_crops_and_targets(tmp_path):
    folder = make_folder(tmp_path, count=10, kind="png")
    data = load(str(folder), size=16, resize=20)
    assert len(data.train) + len(data.val) + len(data.test) == 30
    assert min(len(data.train), len(data.val), len(data.test)) > 0
    for split in (data.train, data.val, data.test):
        for place, name in enumerate(split.names):
            expected = crop(Image.open(folder / name), 16, 20)
            np.testing.assert_array_equal(split.crops(slice(place, place + 1))[0].numpy(), expected)
            assert data.labels[split.targets[place]] == name.split("/")[0]


def test_unreadable_images_stop_the_run_with_all_their_names(tmp_path):
    folder = make_folder(tmp_path, count=5)
    (folder / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "blue" / "page.png").write_text("<html>")
    (folder / "blue" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match=r"3 of 18 images cannot be read.*--skip-bad") as caught:
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
    with pytest.raises(DataError, match="'red' has no readable training image"):
        load(str(folder), size=16, resize=16, skip_bad=True)


def test_samples_are_whole_files_of_the_val_split(tmp_path):
    folder = make_folder(tmp_path / "pets", count=10)
    data = load(str(as_zip(folder, tmp_path / "pets.zip", wrapped=True)), size=16, resize=16)
    assert len(data.samples) == len(data.val)
    assert {name.split("-")[0] for name in data.samples} == {name.split("/")[0] for name in data.val.names}
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
    batches = -(-1293 // 32)
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


def long_png(width):
    """A PNG of 16-bit RGBA, one row high: Pillow cannot count the bits of a row from 33,554,425 px on."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, 16, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    )
    packed = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


NO_IMAGES = {
    "empty.jpg": (b"", "the file is empty"),
    "page.png": (b"<html>", "the file is not "),
    "cut.png": (b"\x89PNG\r\n\x1a\n", "truncated or damaged"),
    "phone.heic": (b"\0\0\0\x18ftypheic", "HEIC is not supported"),
    "far.bmp": (
        b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "0",
    ),
    "long.png": (long_png(40_000_000), ""),
}


def test_what_training_says_of_a_file_speaks_of_files_and_not_of_requests(tmp_path, capsys):
    """Among them one so long that Pillow raises MemoryError."""
    folder = make_folder(tmp_path / "pics", count=20)
    for name, (body, _) in NO_IMAGES.items():
        (folder / "red" / name).write_bytes(body)
    lines = dict(line.split(": ", 1) for line in load(str(folder), size=8, resize=8, skip_bad=True).skipped)
    assert lines.keys() == {f"red/{name}" for name in NO_IMAGES}
    for name, (_, words) in NO_IMAGES.items():
        assert words in lines[f"red/{name}"]
    assert not [line for line in lines.values() if "body" in line or "send" in line]


def test_an_image_that_takes_too_much_memory_is_an_unreadable_one(tmp_path, monkeypatch):
    folder, real = make_folder(tmp_path, count=20), training_data.read
    large = (folder / "red" / "3.jpg").read_bytes()

    def read(body, *sizes):
        if body == large:
            raise MemoryError
        return real(body, *sizes)

    monkeypatch.setattr(training_data, "read", read)
    data = load(str(folder), size=8, resize=8, skip_bad=True)
    assert data.skipped == ["red/3.jpg: the image is too long or too large to be decoded"]


def test_names_that_are_not_utf8_or_end_a_line_are_trained_on_and_printed(tmp_path, capsys):
    folder = make_folder(tmp_path / "pics", count=20)
    (folder / "red" / "0.jpg").rename(folder / "red" / os.fsdecode(b"caf\xe9.jpg"))
    (folder / "red" / os.fsdecode(b"bad\xff\n\x1b[2J.jpg")).write_bytes(b"nothing")
    arguments = ["--data", str(folder), "--epochs", "1", "--skip-bad", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert r"red/bad\udcff\n\x1b[2J.jpg: the file is not" in out
    out.encode()
    assert "red/caf\udce9.jpg" in splits.read(tmp_path / "run")
    assert r"red/caf\udce9.jpg" in {name for side in splits.SPLITS for name, *_ in read_split(str(folder), side)}
    assert main(["--evaluate", str(tmp_path / "run"), "--skip-bad"]) == 0
    assert r"left out red/bad\udcff\n\x1b[2J.jpg" in capsys.readouterr().out


def test_labels_that_are_mathematics_or_longer_than_a_file_name_are_trained_on(tmp_path):
    long = "l" * 250
    names = {"red": "$5_$", "green": long + "one", "blue": long + "two"}
    folder, target = make_folder(tmp_path / "pics", count=20), tmp_path / "pics.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.jpg")):
            archive.write(path, f"{names[path.parent.name]}/{path.name}")
    with reports(write_report):
        assert main(["--data", str(target), "--epochs", "1", "--lr", "1e-9", "--out", str(tmp_path / "run")]) == 0
    for name in ("confusion.png", "mistakes.png"):
        assert (tmp_path / "run" / "report" / name).read_bytes().startswith(b"\x89PNG")
    written = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    val = load(str(target), size=8, resize=8).val
    assert len(written) == len(val)  # although two labels begin alike
    assert {name.rpartition("-")[0] for name in written} <= {"_5__", "l" * 80}


def test_samples_of_an_earlier_run_are_removed_and_the_users_files_are_not(tmp_path, capsys):
    folder = tmp_path / "samples"
    training_data.save_samples({"a-0.png": b"1", "a-1.png": b"2", "a-2.png": b"3", "b-0.png": b"4"}, folder)
    (folder / "a-1.png").write_bytes(b"changed by hand")
    (folder / "mine.png").write_bytes(b"mine")
    (folder / "c-0.png").write_bytes(b"mine too")
    (folder / "notes").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(b"4")
    (folder / "b-0.png").unlink()
    (folder / "b-0.png").symlink_to(tmp_path / "elsewhere.png")
    training_data.save_samples({"a-0.png": b"new", "c-0.png": b"5", "d-0.png": b"6"}, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert files == {
        "a-0.png": b"new", "a-1.png": b"changed by hand", "mine.png": b"mine", "c-0.png": b"mine too", "d-0.png": b"6",
        "b-0.png": b"4",
    }  # fmt: skip
    assert (folder / "notes").is_dir()
    assert "1 files that no run has written were left as they are, such as c-0.png" in capsys.readouterr().out
    training_data.save_samples({}, folder)
    assert {path.name for path in folder.iterdir()} == {"a-1.png", "mine.png", "c-0.png", "notes", "b-0.png"}


def test_a_list_of_samples_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "mine.txt").write_bytes(b"mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    for content in ({"../mine.txt": digest, str(tmp_path / "mine.txt"): digest}, ["mine.txt"], 3):
        (tmp_path / "samples.json").write_text(json.dumps(content))
        training_data.save_samples({"a-0.png": b"1"}, tmp_path / "samples")
    assert (tmp_path / "mine.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["samples", "report"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_run_does_not_write_through_links(tmp_path, capsys, name, kind):
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.mkdir()
    (mine / "photo.png").write_bytes(b"mine")
    (mine / "index.html").write_bytes(b"mine")
    if kind == "link":
        (run / name).symlink_to(mine)
    else:
        (run / name).write_bytes(b"mine")
    assert main(["--data", "digits", "--epochs", "1", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{run / name}: is a {kind}" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == {"photo.png": b"mine", "index.html": b"mine"}
    assert [path.name for path in run.iterdir()] == [name]  # found before anything was read


@pytest.mark.parametrize(
    ("folder", "export", "serve"),
    [
        ("runs/digits", "python -m export runs/digits", "make serve RUN=runs/digits"),
        ("my runs/a", "python -m export 'my runs/a'", "python serve.py 'my runs/a'"),
        ("runs/my pets", "python -m export 'runs/my pets' --name my-pets", "python serve.py 'runs/my pets'"),
        ("runs/$(ls)é", "python -m export 'runs/$(ls)é' --name ls-", "python serve.py 'runs/$(ls)é'"),
    ],
)
def test_the_next_command_can_be_pasted(folder, export, serve):
    assert export_command(Path(folder)) == export
    assert serve_command(Path(folder)) == serve
