"""What a corrupt image gets, and a name that is hard to print."""

import os
import struct
import zlib

import pytest

from dataset import decoding, splits
from dataset.loading import load, read_split
from dataset.sources import DataError
from predictor.spec import PixelRule
from tests.folders import make_folder
from train import main


def test_unreadable_images_stop_the_run_with_all_their_names(tmp_path):
    folder = make_folder(tmp_path, count=5)
    (folder / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "blue" / "page.png").write_text("<html>")
    (folder / "blue" / "phone.avif").write_bytes(b"\0\0\0\x18ftypavif")
    with pytest.raises(DataError, match=r"3 of 18 images cannot be read.*--skip-bad") as caught:
        load(str(folder), rule=PixelRule.square(16))
    for name in ("red/broken.jpg", "blue/page.png", "blue/phone.avif: AVIF is not supported"):
        assert name in str(caught.value)


def test_skip_bad_leaves_them_out_and_lists_them(tmp_path):
    folder = make_folder(tmp_path, count=5)
    (folder / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    data = load(str(folder), rule=PixelRule.square(16), skip_bad=True)
    assert len(data.train) + len(data.val) + len(data.test) == 15
    assert len(data.skipped) == 1
    assert data.skipped[0].startswith("red/broken.jpg: ")


def test_a_class_of_which_nothing_is_readable_is_named(tmp_path):
    folder = make_folder(tmp_path, count=5)
    for path in (folder / "red").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="'red' has no readable training image"):
        load(str(folder), rule=PixelRule.square(16), skip_bad=True)


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
    "phone.avif": (b"\0\0\0\x18ftypavif", "AVIF is not supported"),
    "far.bmp": (
        b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "0",
    ),
    "long.png": (long_png(40_000_000), ""),
}


def test_what_training_says_of_a_file_speaks_of_files_and_not_of_requests(tmp_path):
    """Among them one so long that Pillow raises MemoryError."""
    folder = make_folder(tmp_path / "pics", count=20)
    for name, (body, _) in NO_IMAGES.items():
        (folder / "red" / name).write_bytes(body)
    lines = dict(line.split(": ", 1) for line in load(str(folder), rule=PixelRule.square(8), skip_bad=True).skipped)
    assert lines.keys() == {f"red/{name}" for name in NO_IMAGES}
    for name, (_, words) in NO_IMAGES.items():
        assert words in lines[f"red/{name}"]
    assert not [line for line in lines.values() if "body" in line or "send" in line]


def test_an_image_that_takes_too_much_memory_is_an_unreadable_one(tmp_path, monkeypatch):
    folder, real = make_folder(tmp_path, count=20), decoding.read
    large = (folder / "red" / "3.jpg").read_bytes()

    def read(body, *sizes):
        if body == large:
            raise MemoryError
        return real(body, *sizes)

    monkeypatch.setattr(decoding, "read", read)
    data = load(str(folder), rule=PixelRule.square(8), skip_bad=True)
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
