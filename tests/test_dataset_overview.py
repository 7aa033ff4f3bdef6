"""What is said of a data set before a run: counts of all images, sizes from the headers of some."""

import io

import pytest
from PIL import Image

from dataset.overview import look
from dataset.sources import open_source
from tests.folders import as_tar, as_zip, image, make_folder


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


def test_no_pixel_is_decoded(tmp_path, monkeypatch):
    source = open_source(str(make_folder(tmp_path, count=1, kind="tif")))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert look(source).median_size == (40, 30)


def test_sizes_are_of_the_upright_image(tmp_path):
    folder = make_folder(tmp_path, count=1)
    exif = Image.Exif()
    exif[274] = 6
    for path in folder.rglob("*.jpg"):
        turned = io.BytesIO()
        image((9, 9, 9), 0).save(turned, "JPEG", exif=exif)
        path.write_bytes(turned.getvalue())
    assert look(open_source(str(folder))).median_size == (30, 40)
