"""What is said of a data set before a run: counts of all images, sizes from the headers of some."""

import io
import struct

import pytest
from PIL import Image, ImageFile

from dataset.overview import look
from dataset.sources import open_source
from predictor.image_headers import KINDS
from tests.folders import as_tar, as_zip, image, make_folder
from tests.kinds import HEIC


def uneven(root):
    """Ten red images of 40×30 px, two green ones of 90×60 and a blue one of 8×8."""
    for label, count, size, kind in (
        ("red", 10, (40, 30), "jpg"),
        ("green", 2, (90, 60), "png"),
        ("blue", 1, (8, 8), "webp"),
    ):
        (root / label).mkdir(parents=True)
        for i in range(count):
            image((9, 9, 9), i, size).save(root / label / f"{i}.{kind}")
    return root


EXPECTED = [
    '13 images in 3 classes, 1 ("blue") to 10 ("red") each; the largest class has 10 times the smallest\'s images',
    "median 40×30 px, from 8×8 to 90×60, 10 JPEG, 2 PNG, 1 WebP",
]


@pytest.mark.parametrize("pack", [None, "zip", "tar", "tar.gz"])
def test_a_folder_and_its_archives_are_described_alike(tmp_path, pack):
    data = uneven(tmp_path / "pics")
    if pack == "zip":
        data = as_zip(data, tmp_path / "pics.zip", True)
    elif pack:
        data = as_tar(data, tmp_path / f"pics.{pack}", pack.partition(".")[2], True)
    found = look(open_source(str(data)))
    assert found.lines() == EXPECTED
    assert (found.looked_at, found.ratio) == (13, 10)


def test_a_large_tar_is_looked_at_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.sources.archives.KEPT_BYTES", 0)
    source = open_source(str(as_tar(uneven(tmp_path / "pics"), tmp_path / "pics.tar", "", False)))
    found = look(source, count=4)
    assert (found.looked_at, found.images) == (4, 13)


def test_equal_classes_and_equal_sizes_are_said_in_short(tmp_path):
    found = look(open_source(str(make_folder(tmp_path, count=2))))
    assert found.lines() == ["6 images in 3 classes, 2 each", "40×30 px, JPEG"]


def test_built_in_images_have_sizes_too():
    found = look(open_source("digits"))
    assert (found.images, found.looked_at, found.median_size) == (1797, 200, (8, 8))


def test_only_as_many_headers_are_read_as_asked_for_and_evenly_spread(tmp_path, monkeypatch):
    source = open_source(str(make_folder(tmp_path, count=10)))
    asked, real = [], source.peek
    monkeypatch.setattr(source, "peek", lambda indices: asked.extend(indices) or real(indices))
    assert look(source, count=6).looked_at == 6
    assert asked == [0, 5, 10, 15, 20, 25]
    assert look(source, seconds=0).looked_at == 1


def test_damaged_and_missing_files_are_passed_over_and_still_counted(tmp_path):
    folder = make_folder(tmp_path, count=2)
    source = open_source(str(folder))
    (folder / "red" / "0.jpg").write_bytes(b"\xff\xd8\xff\xe1\xff\xff")
    (folder / "red" / "1.jpg").write_bytes(b"II*\0\xff\xff\xff\xff")
    (folder / "green" / "0.jpg").unlink()
    found = look(source)
    assert (found.images, found.looked_at) == (6, 3)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"nothing")
    assert look(source).lines() == ["6 images in 3 classes, 2 each", "JPEG"]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp", "gif", "tif"])
def test_no_pixel_is_decoded(tmp_path, monkeypatch, kind):
    source = open_source(str(make_folder(tmp_path, count=1, kind=kind)))
    readers = [ImageFile.ImageFile, *ImageFile.ImageFile.__subclasses__()]
    for reader in (one for one in readers if "load" in vars(one)):
        monkeypatch.setattr(reader, "load", lambda *_: pytest.fail("decoded"))
    found = look(source)
    assert (found.looked_at, found.median_size) == (3, (40, 30))


@pytest.mark.skipif("HEIF" not in KINDS, reason="pip install pi-heif")
def test_no_pixel_of_a_heic_file_is_decoded(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, count=1)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(HEIC)
    monkeypatch.setattr("pi_heif.HeifImageFile.load", lambda *_: pytest.fail("decoded"))
    assert look(open_source(str(folder))).looked_at == 3


def test_what_decoding_refuses_has_no_size(tmp_path):
    """A size beyond the limit, and a kind that Pillow knows and we do not read."""
    folder = make_folder(tmp_path, count=2)
    source = open_source(str(folder))
    header = struct.pack("<IIiiHHIIiiII", 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (folder / "red" / "0.jpg").write_bytes(b"BM" + bytes(8) + header)
    (folder / "red" / "1.jpg").write_bytes(b"P6 90 60 255\n" + bytes(90 * 60 * 3))
    found = look(source)
    assert (found.looked_at, found.size_range) == (4, ((40, 30), (40, 30)))


STARTS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"II*\0", b"no"]


@pytest.mark.parametrize("start", STARTS)
def test_of_an_endless_file_little_is_read(monkeypatch, start):
    """As of a member of an archive that unpacks to gigabytes."""

    class Endless(io.BytesIO):
        total = 0

        def read(self, size=-1):
            assert size >= 0, "all of it is asked for"
            self.total += size
            return (start + bytes(size))[:size] if self.total == size else bytes(size)

    source, file = open_source("digits"), Endless()
    monkeypatch.setattr(source, "peek", lambda indices: iter([file]))
    assert look(source).looked_at == 0
    assert file.total <= 32 << 20


def test_sizes_are_of_the_upright_image(tmp_path):
    folder = make_folder(tmp_path, count=1)
    exif = Image.Exif()
    exif[274] = 6
    for path in folder.rglob("*.jpg"):
        turned = io.BytesIO()
        image((9, 9, 9), 0).save(turned, "JPEG", exif=exif)
        path.write_bytes(turned.getvalue())
    assert look(open_source(str(folder))).median_size == (30, 40)
