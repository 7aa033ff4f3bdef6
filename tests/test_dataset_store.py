"""The store of frames on disk: decoded once for all runs, whatever is killed, changed, full or cleared meanwhile."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset import loading, placement, store, store_list
from dataset.__main__ import main as dataset_command
from dataset.frames import MemoryBodies, make_frame
from dataset.loading import load
from dataset.placement import Wanted, bodies_for
from dataset.sources import DataError, open_source
from dataset.store import StoredBodies
from dataset.store_files import locked
from dataset.store_list import list_stores
from model import checkpoint
from predictor.image_headers import ImageError
from predictor.spec import PixelRule
from tests.conftest import PROJECT
from tests.folders import as_tar, as_zip, image, make_folder
from train import main

EDGE, TRAIN, IMAGES = 20, 18, 54  # px; training images of `folder`, and all of them


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", count=6, splits=("train", "val", "test"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of the frames that were made, one for each."""
    made = []

    def noted(body, edge, colour):
        frame = make_frame(body, edge, colour)
        made.append(frame.size)
        return frame

    monkeypatch.setattr(loading, "make_frame", noted)
    return made


@pytest.fixture
def cropped(monkeypatch):
    """The rules by which images were cropped, one for each."""
    made, real = [], loading.square
    monkeypatch.setattr(loading, "square", lambda image, rule: made.append(rule) or real(image, rule))
    return made


def read(data, where, say=lambda line: None, **options):
    """All frames of the training split as bytes, by name, and the data."""
    kept = {"edge": EDGE, "store": str(where), "workers": 2, "say": say}
    options = {"rule": PixelRule.square(16)} | kept | options
    got = load(str(data), **options)
    rows = zip(got.train.names, got.train.rows.tolist(), strict=True)
    return {name: got.train.frames.frame(row).tobytes() for name, row in rows}, got


def only_store(root):
    (found,) = list_stores(root)
    return root / found.name


def frames_in(root):
    """The records of frames, among those of crops, in a store of one part."""
    ((_, records),) = store.read_indices(only_store(root))
    return records[records["height"] >= EDGE]


def test_frames_in_a_store_are_those_in_memory(folder, root):
    expected, in_memory = read(folder, "memory")
    got, stored = read(folder, root)
    assert got == expected
    boxes = torch.tensor([[0.1, 0.2, 0.9, 0.8]]).repeat(TRAIN, 1)
    crops = [data.train.frames.crops(data.train.rows, boxes, (12, 12)) for data in (in_memory, stored)]
    assert torch.equal(*crops)


def test_a_second_start_decodes_no_training_image(folder, root, decoded, monkeypatch):
    expected, _ = read(folder, root)
    assert len(decoded) == TRAIN
    files, said = [], []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: files.append(path) or real(path))
    got, _ = read(folder, root, say=said.append)
    assert got == expected
    assert len(decoded) == TRAIN
    assert not [path for path in files if folder / "train" in path.parents]  # nor read
    assert said == [f"{IMAGES} images lie decoded in {only_store(root)}"]


@pytest.mark.parametrize("edge", [EDGE, None], ids=["with frames", "crops alone"])
def test_crops_in_a_store_are_those_in_memory_and_made_once(folder, root, cropped, edge):
    """But for the samples, whose files are wanted each time."""
    rule = PixelRule(height=12, width=16, resize=14, interpolation="bicubic")
    found = {}
    for start, where in enumerate(("memory", root, root)):
        cropped.clear()
        data = load(str(folder), rule=rule, edge=edge, store=str(where), say=lambda line: None)
        found[start] = [getattr(data, split).crops(slice(None)) for split in ("val", "test", "train")]
        assert len(cropped) == (IMAGES - (TRAIN if edge else 0) if start < 2 else len(data.samples))
    assert all(torch.equal(a, b) for start in (1, 2) for a, b in zip(found[0], found[start], strict=True))
    assert data.samples


def test_crops_follow_the_rule_and_the_image_while_frames_stay(folder, root, decoded, cropped):
    read(folder, root)
    cropped.clear()
    image((9, 9, 9), 1, (64, 20)).save(folder / "test" / "red" / "3.jpg")
    samples = len(read(folder, root)[1].samples)
    assert len(cropped) == samples + 1
    rule = PixelRule.square(12)
    _, data = read(folder, root, rule=rule)
    expected = read(folder, "memory", rule=rule)[1]
    assert cropped.count(rule) == 2 * (IMAGES - TRAIN)
    assert torch.equal(data.test.crops(slice(None)), expected.test.crops(slice(None)))
    assert len(decoded) == 2 * TRAIN  # once for the store, and once in memory


def test_processes_of_one_training_share_a_store_even_if_each_had_the_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    frames, _ = place(folder, "auto", monkeypatch, memory=100 * RAW, disk=100 * RAW, processes=2)
    assert isinstance(frames, StoredBodies)
    alone, _ = place(folder, "auto", monkeypatch, memory=100 * RAW, disk=100 * RAW)
    assert isinstance(alone, MemoryBodies)


def test_only_an_image_that_has_changed_is_decoded_anew(folder, root, decoded):
    before, _ = read(folder, root)
    decoded.clear()
    image((9, 9, 9), 1, (64, 20)).save(folder / "train" / "red" / "3.jpg")
    image((200, 40, 40), 7).save(folder / "train" / "red" / "new.jpg")
    (folder / "train" / "blue" / "0.jpg").unlink()
    after, _ = read(folder, root)
    assert sorted(decoded) == [(27, 20), (64, 20)]
    assert {name for name in before if before[name] != after.get(name)} == {"train/red/3.jpg", "train/blue/0.jpg"}
    assert after == read(folder, "memory")[0]


def test_of_a_table_only_an_image_that_has_changed_is_decoded_anew(folder, root, decoded):
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.jpg"))]
    rows = [f"{path},{path.split('/')[1]},{path.split('/')[0]}" for path in paths]
    table = folder / "labels.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    read(table, root)
    assert len(decoded) == TRAIN
    decoded.clear()
    image((9, 9, 9), 1, (64, 20)).save(folder / "train" / "red" / "3.jpg")
    read(table, root)
    assert decoded == [(64, 20)]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_changed_member_of_an_archive_is_decoded_anew(folder, root, tmp_path, decoded, kind):
    def pack(archive):
        return as_zip(folder, archive, wrapped=True) if kind == "zip" else as_tar(folder, archive, "gz", wrapped=True)

    archive = pack(tmp_path / f"images.{kind}")
    read(archive, root)
    decoded.clear()
    image((9, 9, 9), 1, (64, 20)).save(folder / "train" / "red" / "3.jpg")
    pack(archive)
    read(archive, root)
    assert decoded == [(64, 20)]


def test_frames_of_another_size_or_colour_rule_are_another_store(folder, root):
    read(folder, root)
    read(folder, root, edge=24, store=str(root))
    read(folder, root, rule=replace(PixelRule.square(16), colour="as-stored"))
    assert len(list_stores(root)) == 3


BUILD = """
import sys, time
from dataset import loading, store
from dataset.loading import load
from predictor.spec import PixelRule

store.CHUNK_BYTES, made, make = 1, 0, loading.make_frame

def slowly(body, edge, colour):
    global made
    made += 1
    if made > 5:
        print("five", flush=True)
        time.sleep(600)
    return make(body, edge, colour)

loading.make_frame = slowly
load(sys.argv[1], rule=PixelRule.square(16), edge=20, store=sys.argv[2], workers=1, say=lambda line: None)
"""


def test_a_kill_while_a_store_is_built_costs_what_was_under_way(folder, root, decoded):
    command = [sys.executable, "-c", BUILD, str(folder), str(root)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as building:
        try:
            assert building.stdout.readline() == "five\n"
        finally:
            os.kill(building.pid, signal.SIGKILL)
    assert len(frames_in(root)) == 5
    got, _ = read(folder, root)
    assert len(decoded) == TRAIN - 5
    assert got == read(folder, "memory")[0]


@pytest.mark.parametrize("tail", [b"x" * 7, b"\0" * store.RECORD.itemsize, b"y" * 1000])
def test_what_a_kill_left_unfinished_is_dropped(folder, root, decoded, tail):
    expected, _ = read(folder, root)
    for name in ("part-0.bin", "part-0.idx"):
        with (only_store(root) / name).open("ab") as file:
            file.write(tail)
    assert read(folder, root)[0] == expected
    image((200, 40, 40), 7).save(folder / "train" / "red" / "new.jpg")
    after, _ = read(folder, root)  # which adds to the store
    assert len(decoded) == TRAIN + 1
    assert len(after) == TRAIN + 1
    assert read(folder, root)[0] == after
    assert len(decoded) == TRAIN + 1


def test_frames_whose_file_is_cut_short_are_made_anew(folder, root, decoded):
    expected, _ = read(folder, root)
    last = frames_in(root)[-1]
    os.truncate(only_store(root) / "part-0.bin", last["offset"] + last["length"] - 1)
    assert read(folder, root)[0] == expected
    assert len(decoded) == TRAIN + 1


def test_a_large_store_is_in_several_parts(folder, root, decoded, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 1)
    monkeypatch.setattr(store, "PART_BYTES", 5000)
    expected, _ = read(folder, root)
    assert len(list(only_store(root).glob("part-*.bin"))) > 2
    assert read(folder, root)[0] == expected
    assert len(decoded) == TRAIN


def test_a_full_disk_is_one_line_and_leaves_a_usable_store(folder, root, decoded, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 5000)
    written, append = [], store._append

    def full(path, bodies):
        written.append(path)
        if len(written) > 4:
            with path.open("ab") as file:
                file.write(bodies[0][:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(path, bodies)

    monkeypatch.setattr(store, "_append", full)
    with pytest.raises(DataError, match="the disk is full; make room and start again") as error:
        read(folder, root)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(store, "_append", append)
    assert list_stores(root)[0].images > 0  # which, the threads decide
    kept = len(frames_in(root))
    decoded.clear()
    assert read(folder, root)[0] == read(folder, "memory")[0]
    assert len(decoded) == TRAIN - kept + TRAIN  # those of the second reading are in memory


def test_who_finds_a_store_under_construction_waits_and_says_so(folder, root, decoded):
    expected, _ = read(folder, root)
    image((200, 40, 40), 7).save(folder / "train" / "red" / "new.jpg")
    release, held = threading.Event(), threading.Event()

    def hold():
        with locked(only_store(root)):
            held.set()
            release.wait(60)

    holder, said = threading.Thread(target=hold), []
    holder.start()
    assert held.wait(60)

    def say(line):
        said.append(line)
        if "waiting" in line:
            release.set()

    got, _ = read(folder, root, say=say)
    holder.join()
    assert [line for line in said if "waiting" in line] == [
        f"another process adds to {only_store(root)}: waiting until it is done"
    ]
    assert len(got) == len(expected) + 1


def test_two_that_build_at_once_decode_each_image_once(folder, root, decoded, cropped):
    found = {}
    both = [threading.Thread(target=lambda i=i: found.setdefault(i, read(folder, root)[0])) for i in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert found[0] == found[1]
    assert len(decoded) == TRAIN
    samples = len(read(folder, "memory")[1].samples)
    assert len(cropped) - (IMAGES - TRAIN) == (IMAGES - TRAIN) + samples  # of one of the two, and in memory


def place(folder, where, monkeypatch, memory, disk, processes=1):
    """What `bodies_for` chooses with so many bytes free, and says."""
    monkeypatch.setattr(placement, "free_memory", lambda processes: memory // processes)
    monkeypatch.setattr(placement, "free_disk", lambda folder: disk)
    said = []
    source = open_source(str(folder))
    wanted = Wanted(range(len(source.entries)), (), EDGE, PixelRule.square(16))
    return bodies_for(str(folder), source, wanted, where, processes=processes, say=said.append), said


RAW = IMAGES * 3 * EDGE * round(EDGE * 4 / 3)  # bytes that are reckoned for all images of `folder` as frames


def test_memory_is_taken_if_half_of_it_is_enough_else_the_users_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bodies, said = place(folder, "auto", monkeypatch, memory=2 * RAW, disk=0)
    assert (type(bodies), bodies.encoding, said) == (MemoryBodies, "raw", [])
    bodies, said = place(folder, "auto", monkeypatch, memory=2 * RAW, disk=2 * RAW, processes=2)
    assert (type(bodies), bodies.encoding) == (StoredBodies, "raw")
    assert bodies.folder.parent == tmp_path / "cache" / "classify-and-serve" / "store"
    assert said[0].startswith(f"0 images lie decoded in {bodies.folder}; 54 are added as pixels, about")
    assert "GB of the 0.0 GB that are free" in said[0]
    assert not bodies.folder.exists()  # it is said before it is written


def test_a_small_disk_gets_jpeg_and_a_smaller_one_an_error(folder, root, monkeypatch):
    bodies, _ = place(folder, str(root), monkeypatch, memory=0, disk=RAW)
    assert bodies.encoding == "jpeg"
    with pytest.raises(DataError, match=r"has room for 0.0 GB, and 54 images take about 0.0 GB"):
        place(folder, str(root), monkeypatch, memory=0, disk=RAW // 5)


def test_memory_alone_gets_jpeg_where_pixels_would_fill_it(folder, monkeypatch):
    bodies, said = place(folder, "memory", monkeypatch, memory=RAW, disk=0)
    assert (type(bodies), bodies.encoding) == (MemoryBodies, "jpeg")
    assert "the training images are kept in memory as JPEG" in said[0]
    with pytest.raises(DataError, match=r"over half of the free memory .*; pass --store DIR"):
        place(folder, "memory", monkeypatch, memory=RAW // 4, disk=0)


def test_a_store_of_jpeg_files_is_found_again_with_more_room(folder, root, monkeypatch, decoded):
    monkeypatch.setattr(placement, "free_disk", lambda folder: RAW // 2)
    first, _ = read(folder, root)
    monkeypatch.setattr(placement, "free_disk", lambda folder: 100 * RAW)
    second, data = read(folder, root)
    assert first == second
    assert data.train.frames._bodies.encoding == "jpeg"
    assert len(decoded) == TRAIN


def test_a_data_set_without_files_stays_in_memory(root, monkeypatch):
    with pytest.raises(DataError, match=r"--store .*: is for folders, archives and tables"):
        load("digits", rule=PixelRule.square(8), edge=10, store=str(root))
    monkeypatch.setattr(placement, "free_memory", lambda processes: 1000)
    for where in ("auto", "memory"):
        with pytest.raises(DataError, match=r"over half of the free memory .*; save the images as a folder") as error:
            load("digits", rule=PixelRule.square(8), edge=10, store=where)
        assert "--store DIR" not in str(error.value)  # which says that it is for folders
    monkeypatch.setattr(placement, "free_memory", lambda processes: 2 * 1200 * 3 * 10 * 13)
    data = load("digits", rule=PixelRule.square(8), edge=10, say=lambda line: None)
    assert data.train.frames._bodies.encoding == "jpeg"


@pytest.fixture
def locks(monkeypatch):
    """The folders that were locked."""
    taken, real = [], store.locked
    monkeypatch.setattr(store, "locked", lambda folder, *rest: taken.append(folder) or real(folder, *rest))
    return taken


def test_an_unreadable_image_is_left_out_each_time_and_nobody_waits_for_it_again(folder, root, decoded, locks):
    (folder / "train" / "red" / "0.jpg").write_bytes(b"nothing")
    said = []
    for _ in range(3):
        got, data = read(folder, root, skip_bad=True, say=said.append)
        assert len(got) == TRAIN - 1
        assert [line.partition(":")[0] for line in data.skipped] == ["train/red/0.jpg"]
    with pytest.raises(DataError, match="1 of 54 images cannot be read"):
        read(folder, root)
    assert len(decoded) == TRAIN - 1
    assert len(locks) == 1
    assert said[1] == said[2] == f"{IMAGES - 1} images lie decoded in {only_store(root)}"
    assert list_stores(root)[0].images == IMAGES - 1


@pytest.mark.parametrize("edge", [EDGE, None], ids=["with frames", "crops alone"])
def test_an_unreadable_test_image_is_left_out_each_time(folder, root, locks, edge):
    (folder / "test" / "red" / "0.jpg").write_bytes(b"nothing")
    found = []
    for where in (root, root, "memory"):
        data = load(
            str(folder), rule=PixelRule.square(16), edge=edge, store=str(where), skip_bad=True, say=lambda line: None
        )
        found.append({name: getattr(data, name).crops(slice(None)) for name in ("train", "val", "test")})
        assert [line.partition(":")[0] for line in data.skipped] == ["test/red/0.jpg"]
        assert len(data.test) == TRAIN - 1
    assert all(torch.equal(found[i][name], found[2][name]) for i in (0, 1) for name in found[2])
    assert len(locks) == 1


def test_a_cache_that_cannot_be_written_is_said_and_images_stay_in_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr(placement.os, "access", lambda *_: False)
        bodies, said = place(folder, "auto", monkeypatch, memory=RAW, disk=100 * RAW)
        assert (type(bodies), bodies.encoding) == (MemoryBodies, "jpeg")
        assert said[0].startswith(f"no store: {tmp_path / 'cache'}")
        assert "cannot be written; give another --store DIR" in said[0]
        with pytest.raises(DataError, match="cannot be written; give another --store DIR"):
            place(folder, str(tmp_path / "store"), monkeypatch, memory=RAW, disk=100 * RAW)
    bodies, said = place(folder, "auto", monkeypatch, memory=RAW, disk=0)
    assert isinstance(bodies, MemoryBodies)
    assert "has room for 0.0 GB" in said[0]


def test_a_user_without_a_home_has_no_store(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(DataError, match=r"no home; set HOME or XDG_CACHE_HOME, or give --store DIR"):
        store.default_root()


def test_room_is_reckoned_for_what_is_missing(folder, root, monkeypatch):
    """Crops are smaller than frames: where only these are missing, little is."""
    read(folder, root)
    crops = 3 * 16 * 16 * (IMAGES - TRAIN)
    monkeypatch.setattr(placement, "free_disk", lambda folder: crops * 6 // 5)
    said = []
    read(folder, root, rule=replace(PixelRule.square(16), interpolation="bicubic"), say=said.append)
    assert f"{IMAGES - TRAIN} are added as pixels" in said[0]


def test_an_image_that_becomes_readable_is_added(folder, root, decoded, locks, monkeypatch):
    """As a HEIC file does when pi-heif is installed: the file itself is as it was."""
    with monkeypatch.context() as patched:
        patched.setattr(loading, "make_frame", lambda *_: (_ for _ in ()).throw(ImageError("truncated", "cut")))
        with pytest.raises(DataError, match="18 of 54 images cannot be read"):
            read(folder, root)
    for _ in range(2):
        assert read(folder, root)[0] == read(folder, "memory")[0]
    assert len(decoded) == 3 * TRAIN  # twice in memory
    assert len(locks) == 2


def test_the_lock_is_given_back_before_other_images_are_decoded_if_nothing_is_missing(folder, root, monkeypatch):
    """Another process has filled the store while this one waited for the lock."""
    expected, _ = read(folder, root)
    kept, looks, real = store.read_indices, [], loading.decode_each

    def late(place):
        looks.append(place)
        return kept(place) if len(looks) > 1 else iter(())  # as this process finds the store at first

    def decode_each(*given, **options):
        with (only_store(root) / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error, if it is held
        return real(*given, **options)

    monkeypatch.setattr(store, "read_indices", late)
    monkeypatch.setattr(loading, "decode_each", decode_each)
    assert read(folder, root)[0] == expected
    assert len(looks) > 2


def test_stores_are_listed_and_cleared(folder, root, capsys):
    read(folder, root)
    read(folder, root, edge=24, store=str(root))
    names = [found.name for found in list_stores(root)]
    assert dataset_command(["store", "--store", str(root)]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}  {IMAGES} images  0.00 GB  last used 20" in said for name in names)
    assert str(folder) in said
    assert "images that have changed or were removed count too" in said
    assert dataset_command(["store", "--store", str(root), "--clear", "other"]) == 2
    assert f"has no store other; there are: {', '.join(names)}" in capsys.readouterr().err
    assert dataset_command(["store", "--store", str(root), "--clear", names[0]]) == 0
    assert [found.name for found in list_stores(root)] == names[1:]
    assert dataset_command(["store", "--store", str(root), "--clear", "all"]) == 0
    assert dataset_command(["store", "--store", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{root}: no stores"


def test_clearing_removes_stores_and_nothing_else(folder, root, capsys):
    """Neither other folders with a file store.json, nor what lies in a store and is no part of it."""
    read(folder, root)
    found = only_store(root)
    others = {"project": '{"version": 2, "data": "sales"}', "pictures-20px-raw-0123abcd": '{"name": "a web shop"}'}
    for name, about in others.items():
        (root / name).mkdir(mode=0o700)
        (root / name / "store.json").write_text(about)
        (root / name / "precious").write_text("all")
    (found / "notes.txt").write_text("mine")
    assert dataset_command(["store", "--store", str(root), "--clear", "all"]) == 2
    assert f"{found}: holds notes.txt, which is no part of a store; move it out" in capsys.readouterr().err
    assert read(folder, root)[0] == read(folder, "memory")[0]
    (found / "notes.txt").unlink()
    assert dataset_command(["store", "--store", str(root), "--clear", "all"]) == 0
    assert not found.exists()
    assert dataset_command(["store", "--store", str(root), "--clear", "pictures-20px-raw-0123abcd"]) == 2
    assert {path.parent.name for path in root.glob("*/precious")} == others.keys()


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b'{"version": "2", "data": 3}', b"[" * 60_000, b"null"])
def test_a_damaged_store_is_listed_and_cleared_by_its_name(folder, root, capsys, body):
    read(folder, root)
    found = only_store(root)
    (found / "store.json").write_bytes(body)
    assert dataset_command(["store", "--store", str(root)]) == 0
    assert f"{found.name}  {IMAGES} images" in (out := capsys.readouterr().out)
    assert "store.json is damaged: clear it by its name" in out
    store_list.clear(root, "all")
    assert found.exists()
    store_list.clear(root, found.name)
    assert list(root.iterdir()) == []


def test_a_list_steers_no_terminal(folder, root, capsys):
    read(folder, root)
    (only_store(root) / "store.json").write_text(json.dumps({"version": 2, "data": "\x1b[2J\nimages"}))
    (only_store(root) / "part-x.idx").write_text("")
    assert dataset_command(["store", "--store", str(root)]) == 0
    assert dataset_command(["store", "--store", str(root), "--clear", "\x1b[2J"]) == 2
    said = "".join(capsys.readouterr())
    assert r"\x1b[2J\nimages" in said
    assert r"has no store \x1b[2J;" in said
    assert "\x1b" not in said


def test_a_store_of_an_older_version_is_said_to_be_one_and_cleared(folder, root, capsys):
    read(folder, root)
    (only_store(root) / "store.json").write_text('{"version": 1, "data": "images"}')
    assert dataset_command(["store", "--store", str(root)]) == 0
    assert "images (of another version of this program: not read)" in capsys.readouterr().out
    store_list.clear(root, "all")
    assert list_stores(root) == []


def test_what_is_open_survives_a_clearing(folder, root):
    expected, data = read(folder, root)
    store_list.clear(root, "all")
    assert data.train.frames.frame(0).tobytes() in expected.values()


def test_a_run_that_starts_while_a_store_is_cleared_decodes_anew(folder, root, decoded, monkeypatch):
    """Between its look at what the store holds and the opening of the frames."""
    expected, _ = read(folder, root)
    kept = store.read_indices

    def cleared(place):
        found = list(kept(place))
        monkeypatch.setattr(store, "read_indices", kept)
        store_list.clear(root, "all")
        return iter(found)

    monkeypatch.setattr(store, "read_indices", cleared)
    assert read(folder, root)[0] == expected
    assert len(decoded) == 2 * TRAIN


def test_a_clearing_that_was_killed_leaves_no_half_of_a_store(folder, root, decoded, monkeypatch):
    expected, _ = read(folder, root)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store_list, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            store_list.clear(root, "all")
    assert list_stores(root) == []
    assert read(folder, root)[0] == expected
    assert len(decoded) == 2 * TRAIN
    store_list.clear(root, "all")
    assert list(root.iterdir()) == []


def test_who_waits_for_a_store_that_is_cleared_makes_it_anew(folder, root):
    read(folder, root)
    place, got = only_store(root), []
    waiting, done = threading.Event(), threading.Event()

    def wait():
        with locked(place, lambda line: waiting.set()):
            got.append((place / "lock").exists())
            done.wait(60)

    waiter = threading.Thread(target=wait)
    try:
        with locked(place):
            waiter.start()
            assert waiting.wait(60)
            place.rename(root / "elsewhere")  # as a clearing does first
    finally:
        done.set()
        waiter.join()
    assert got == [True]


def test_frames_that_are_gone_after_all_are_an_error_and_not_black(folder, root, monkeypatch):
    append = store._append
    monkeypatch.setattr(store, "_append", lambda path, bodies: append(path, bodies if path.suffix == ".bin" else []))
    with pytest.raises(DataError, match="54 images are gone from their store") as error:
        read(folder, root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lock", "part-0.bin", "part-0.idx"])
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_no_link_in_a_store_is_followed(folder, root, tmp_path, name, link):
    """Another's file would be cut to nothing, or added to."""
    read(folder, root)
    image((200, 40, 40), 7).save(folder / "train" / "red" / "new.jpg")  # the store must be added to
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(range(256)) * 1000)
    (only_store(root) / name).unlink()
    link(victim, only_store(root) / name)
    with pytest.raises(DataError, match="is a link, or not this user's own file; remove it, or give another"):
        read(folder, root)
    assert victim.read_bytes() == bytes(range(256)) * 1000


def test_a_pipe_in_a_store_holds_nobody(folder, root):
    read(folder, root)
    (only_store(root) / "part-0.idx").unlink()
    os.mkfifo(only_store(root) / "part-0.idx")
    with pytest.raises(DataError, match="is a link, or not this user's own file"):
        read(folder, root)


def test_a_store_that_others_can_change_is_refused(folder, root, tmp_path, monkeypatch):
    read(folder, root)
    found = only_store(root)
    assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(found.stat().st_mode) == 0o700
    assert {stat.S_IMODE((found / name).stat().st_mode) for name in ("lock", "part-0.bin", "part-0.idx")} == {0o600}
    found.chmod(0o770)
    with pytest.raises(DataError, match="can be written by other users, so images are not kept there; give another"):
        read(folder, root)
    found.chmod(0o700)
    root.chmod(0o777)
    with pytest.raises(DataError, match="can be replaced by all users, who can write"):
        read(folder, root)
    root.chmod(0o1777)  # as /tmp is
    read(folder, root)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: found.stat().st_uid + 1)
        with pytest.raises(DataError, match="belongs to another user"):
            read(folder, root)
        assert list_stores(root) == []
    found.rename(tmp_path / "elsewhere")
    found.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is no folder of its own"):
        read(folder, root)
    store_list.clear(root, "all")
    assert (tmp_path / "elsewhere" / "part-0.bin").exists()


def test_a_folder_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written.*; give another --store DIR"):
        read(folder, tmp_path / "file" / "store")


def test_a_run_from_the_store_ends_with_the_bits_of_one_in_memory(folder, root, tmp_path):
    options = ["--data", str(folder), "--size", "32", "--epochs", "2", "--batch-size", "6", "--crop-scale", "0.35"]
    for name, where in (("memory", "memory"), ("built", str(root)), ("found", str(root))):
        assert main([*options, "--store", where, "--out", str(tmp_path / name)]) == 0
    weights = [checkpoint.load_state_dict(tmp_path / name / "model.pt") for name in ("memory", "built", "found")]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)


def test_a_zip_keeps_its_name_in_the_store(folder, root, tmp_path):
    read(as_zip(folder, tmp_path / "some pictures.zip", wrapped=False), root)
    assert only_store(root).name.startswith("some-pictures-20px-raw-")
    assert zipfile.is_zipfile(tmp_path / "some pictures.zip")
