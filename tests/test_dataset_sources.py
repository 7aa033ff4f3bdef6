import os
import socket
import zipfile
from pathlib import Path

import pytest

from dataset.sources import DataError, Unreadable, open_source
from dataset.sources.archives import TarSource
from tests.folders import COLOURS, as_tar, as_zip, image, make_folder


def names(source):
    return {(e.split, e.label, e.name.split("/")[-1]) for e in source.entries}


def content(source):
    return {source.entries[i].name.split("/", 1)[-1]: body for i, body in source.read()}


def test_a_folder_of_class_folders_is_read(tmp_path):
    source = open_source(str(make_folder(tmp_path / "pets", count=3)))
    assert (source.name, source.labels, len(source.entries)) == ("pets", ["blue", "green", "red"], 9)
    assert {entry.split for entry in source.entries} == {""}
    assert sorted(i for i, _ in source.read()) == list(range(9))


def test_a_folder_of_splits_is_read(tmp_path):
    source = open_source(str(make_folder(tmp_path, count=2, splits=("train", "Validation", "test"))))
    assert {entry.split for entry in source.entries} == {"train", "val", "test"}
    assert len(source.entries) == 18


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_an_archive_is_read_in_place_as_its_folder_is(tmp_path, kind, wrapped, splits):
    folder = make_folder(tmp_path / "pets", count=2, splits=splits)
    (folder / "README.txt").write_text("no image")
    target = tmp_path / f"pets.{kind}"
    if kind == "zip":
        as_zip(folder, target, wrapped)
    else:
        as_tar(folder, target, kind.partition(".")[2], wrapped)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(target))
    assert source.name == "pets"
    assert names(source) == names(open_source(str(folder)))
    bodies = sorted(body for _, body in source.read())
    assert bodies == sorted(path.read_bytes() for path in folder.rglob("*.jpg"))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_a_large_compressed_archive_is_unpacked_twice_and_a_small_one_once(tmp_path, monkeypatch):
    folder, target = make_folder(tmp_path / "pets", count=2), tmp_path / "pets.tar.xz"
    as_tar(folder, target, "xz", wrapped=False)
    passes, real = [], TarSource._members
    monkeypatch.setattr(TarSource, "_members", lambda *given: passes.append(None) or real(*given))
    once = sorted(open_source(str(target)).read())
    assert len(passes) == 1
    monkeypatch.setattr("dataset.sources.archives.KEPT_BYTES", 3000)
    assert sum(len(body) for _, body in once) > 3000
    assert sorted(open_source(str(target)).read()) == once
    assert len(passes) == 3


def test_a_class_may_be_called_train(tmp_path):
    for label in ("train", "plane"):
        (tmp_path / label).mkdir()
        image((9, 9, 9), 0).save(tmp_path / label / "1.png")
    assert open_source(str(tmp_path)).labels == ["plane", "train"]


def test_hidden_files_and_notes_are_passed_over(tmp_path):
    folder = make_folder(tmp_path, count=1)
    (folder / ".git").mkdir()
    image((0, 0, 0), 0).save(folder / ".git" / "x.png")
    (folder / "red" / "Thumbs.db").write_bytes(b"x")
    (folder / "red" / "._0.jpg").write_bytes(b"x")
    assert len(open_source(str(folder)).entries) == 3


def test_a_linked_folder_is_followed_once(tmp_path):
    folder = make_folder(tmp_path / "a", count=2)
    extra = tmp_path / "elsewhere"
    extra.mkdir()
    image((1, 2, 3), 0).save(extra / "1.png")
    (folder / "grey").symlink_to(extra)
    (folder / "red" / "loop").symlink_to(folder)
    source = open_source(str(folder))
    assert source.labels == ["blue", "green", "grey", "red"]
    assert len(source.entries) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: [p.unlink() for p in f.rglob("*.jpg")], "no images found"),
        (lambda f: (f / "yellow").mkdir(), "class 'yellow' has no training images"),
        (lambda f: (f / "red").rename(f / "r\u200bd"), "holds what cannot be printed"),
        (lambda f: (f / "Red").mkdir(), "'Red' and 'red' are two spellings"),
        (lambda f: image((0, 0, 0), 0).save(f / "lost.png"), "lie in no class folder, such as lost.png"),
        (
            lambda f: [
                (p.unlink() if p.is_file() else p.rmdir())
                for c in ("red", "green")
                for p in [*(f / c).iterdir(), f / c]
            ],
            "one class only",
        ),
    ],
)
def test_a_broken_layout_is_named(tmp_path, change, words):
    folder = make_folder(tmp_path, count=2)
    change(folder)
    with pytest.raises(DataError, match=words) as caught:
        open_source(str(folder))
    assert str(folder) in str(caught.value)


def test_a_zip_whose_list_is_damaged_is_named(tmp_path):
    path = as_zip(make_folder(tmp_path / "a", count=1), tmp_path / "a.zip", wrapped=False)
    body = bytearray(path.read_bytes())
    body[body.rindex(b"PK\x01\x02")] = 0
    path.write_bytes(body)
    with pytest.raises(DataError, match=r"a\.zip: damaged"):
        open_source(str(path))


def test_a_link_to_nowhere_and_a_pipe_are_unreadable_images(tmp_path):
    folder = make_folder(tmp_path, count=2)
    (folder / "red" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "red" / "pipe.jpg")
    source = open_source(str(folder))
    reasons = {source.entries[i].name: body.reason for i, body in source.read() if isinstance(body, Unreadable)}
    assert reasons == {"red/gone.jpg": "a link to nothing", "red/pipe.jpg": "not a regular file"}


def test_two_spellings_are_found_across_separators_and_splits(tmp_path):
    for name in ("train/hot dog", "train/pizza", "test/Hot_Dog"):
        (tmp_path / name).mkdir(parents=True)
        image((9, 9, 9), 0).save(tmp_path / name / "1.png")
    with pytest.raises(DataError, match="two spellings"):
        open_source(str(tmp_path))


def test_a_class_that_only_test_has_is_named(tmp_path):
    folder = make_folder(tmp_path, count=1, splits=("train", "test"))
    (folder / "test" / "yellow").mkdir()
    image((9, 9, 0), 0).save(folder / "test" / "yellow" / "1.png")
    with pytest.raises(DataError, match="'yellow' has no training images"):
        open_source(str(folder))


def test_test_without_train_and_strangers_beside_train_are_named(tmp_path):
    with pytest.raises(DataError, match="has test/ but no train/"):
        open_source(str(make_folder(tmp_path / "a", count=1, splits=("test",))))
    with pytest.raises(DataError, match="has extra/ beside train/"):
        open_source(str(make_folder(tmp_path / "b", count=1, splits=("train", "extra"))))


@pytest.mark.parametrize("body", [b"", b"hello", b"\xfd7zXZ\0" + bytes(40)])
def test_what_is_no_archive_is_named(tmp_path, body):
    path = tmp_path / "data.tar.xz"
    path.write_bytes(body)
    with pytest.raises(DataError, match=r"data\.tar\.xz") as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_is_named(tmp_path):
    target = as_tar(make_folder(tmp_path / "pets"), tmp_path / "pets.tar.gz", "gz", wrapped=False)
    target.write_bytes(target.read_bytes()[:3000])
    with pytest.raises(DataError, match="damaged"):
        open_source(str(target))


def test_links_inside_an_archive_are_not_followed(tmp_path):
    import io
    import tarfile

    secret = tmp_path / "secret.png"
    image((1, 1, 1), 0).save(secret)
    target = tmp_path / "evil.tar"
    with tarfile.open(target, "w") as archive:
        for label in COLOURS:
            body = io.BytesIO()
            image(COLOURS[label], 1).save(body, "PNG")
            entry = tarfile.TarInfo(f"{label}/1.png")
            entry.size = len(body.getvalue())
            archive.addfile(entry, io.BytesIO(body.getvalue()))
        link = tarfile.TarInfo("red/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        escape = tarfile.TarInfo("../red/out.png")
        archive.addfile(escape, io.BytesIO(b""))
    source = open_source(str(target))
    assert sorted(entry.name for entry in source.entries) == ["blue/1.png", "green/1.png", "red/1.png"]
    assert len(list(source.read())) == 3


@pytest.mark.parametrize(("data", "words"), [("digit", "did you mean digits"), ("no/such", "give one of digits")])
def test_an_unknown_data_set_is_named_with_the_choices(data, words):
    with pytest.raises(DataError, match=words):
        open_source(data)


def test_a_download_without_a_network_is_said_with_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DataError, match=r"cifar10: cannot be downloaded.*your own folder") as caught:
        open_source("cifar10", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_downloaded_data_sets_are_read_from_the_copy_that_is_there(tmp_path, monkeypatch):
    import numpy as np
    from torchvision import datasets

    class Stored:
        classes = ("0 - zero", "1 - one")

        def __init__(self, root, train, download):
            assert root == str(tmp_path)
            self.data = np.zeros((4 if train else 2, 28, 28), np.uint8)
            self.targets = [0, 1] * (2 if train else 1)

    monkeypatch.setattr(datasets, "MNIST", Stored)
    source = open_source("mnist", str(tmp_path))
    assert [e.split for e in source.entries] == ["train"] * 4 + ["test"] * 2
    assert source.labels == list(Stored.classes)
    assert not source.flips
    assert next(iter(source.read()))[1].mode == "RGB"


def test_digits_are_bundled():
    source = open_source("digits")
    assert len(source.entries) == 1797
    assert sum(entry.split == "test" for entry in source.entries) == 360
    assert not source.flips


def write_tar(target, members):
    """members: name to the bytes, or to the name of the member that a hard link shares them with."""
    import io
    import tarfile

    with tarfile.open(target, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.LNKTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return target


@pytest.mark.parametrize("kept", [128 << 20, 0], ids=["kept in memory", "streamed"])
def test_hard_linked_members_of_a_tar_are_images(tmp_path, monkeypatch, kept):
    monkeypatch.setattr("dataset.sources.archives.KEPT_BYTES", kept)
    members = {"blob": b"one", "a/1.jpg": "blob", "a/2.jpg": b"two", "b/3.jpg": "a/2.jpg", "b/4.jpg": "elsewhere"}
    source = open_source(str(write_tar(tmp_path / "linked.tar", members)))
    bodies = {source.entries[i].name: body for i, body in source.read()}
    missing = Unreadable("a hard link to what the archive does not hold")
    assert bodies == {"a/1.jpg": b"one", "a/2.jpg": b"two", "b/3.jpg": b"two", "b/4.jpg": missing}


@pytest.mark.parametrize("name", ["red", "."])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch, name):
    folder, real = make_folder(tmp_path / "pets", count=1), os.scandir
    (folder / ".trash").mkdir()

    def scandir(path):
        if os.path.realpath(path) in (os.path.realpath(folder / name), str(folder / ".trash")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root, whom no mode stops
    with pytest.raises(
        DataError, match=r"the folder cannot be listed \(Permission denied\); make it readable"
    ) as caught:
        open_source(str(folder))
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("method", ["read_bytes", "is_file"])  # the latter: its folder may not be entered
def test_a_file_that_cannot_be_opened_is_not_called_empty(tmp_path, monkeypatch, method):
    folder = make_folder(tmp_path, count=1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    source = open_source(str(folder))
    monkeypatch.setattr(Path, method, refuse)
    assert {body for _, body in source.read()} == {Unreadable("the file cannot be read (Permission denied)")}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=str)
def test_a_damaged_member_of_a_zip_is_an_unreadable_image(tmp_path, method):
    folder, target = make_folder(tmp_path / "pets", count=1, kind="bmp"), tmp_path / "pets.zip"
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.rglob("*.bmp")):
            archive.write(path, path.relative_to(folder).as_posix())
        start = archive.infolist()[1].header_offset
    body = bytearray(target.read_bytes())
    body[start + 60 : start + 90] = bytes(30)  # of the second member: the beginning of its compressed bytes
    target.write_bytes(body)
    bad = [body.reason for _, body in open_source(str(target)).read() if isinstance(body, Unreadable)]
    assert len(bad) == 1
    assert bad[0].startswith(("damaged in its archive (", "the file cannot be read ("))


def test_composed_and_decomposed_spellings_of_a_class_are_refused(tmp_path):
    for name in ("caf\u00e9", "cafe\u0301", "bar"):
        (tmp_path / name).mkdir()
        image((9, 9, 9), 0).save(tmp_path / name / "1.png")
    with pytest.raises(DataError, match="two spellings of a class") as caught:
        open_source(str(tmp_path))
    assert r"'cafe\u0301' and 'caf\xe9'" in str(caught.value)
