"""The cut into train, val and test: what an image's side depends on, and what a run remembers of it."""

import json
import math
import shutil
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest

from dataset import splits
from dataset.loading import load, read_split
from dataset.sources import DataError, Entry, open_source
from dataset.splits import check_splits, cut_splits
from dataset.terminal import printed
from export.proof import images
from predictor.spec import PixelRule
from tests.folders import COLOURS, as_tar, as_zip, image, make_folder
from train import main


def flat(labels="ab", count=50):
    return [Entry(f"{label}/{i}", label, "") for label in labels for i in range(count)]


def sides(data, **options):
    source = open_source(str(data))
    cut = cut_splits(source.entries, 0.1, 0.1, **{"seed": 0, **options})
    return {entry.key: side for entry, side in zip(source.entries, cut, strict=True)}


def test_the_cuts_depend_on_seed_label_and_name_alone():
    entries = flat()
    cut = cut_splits(entries, 0.1, 0.2, seed=0)
    assert cut == cut_splits(entries, 0.1, 0.2, seed=0) != cut_splits(entries, 0.1, 0.2, seed=1)
    assert cut_splits(entries[::-1], 0.1, 0.2, seed=0) == cut[::-1]
    assert cut_splits(entries[:7], 0.1, 0.2, seed=0) == cut[:7]
    assert cut[:50] != cut[50:]


def test_the_shares_are_those_asked_for_within_chance():
    entries = flat(count=5000)
    counts = Counter(cut_splits(entries, 0.1, 0.2, seed=0))
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        deviation = math.sqrt(len(entries) * share * (1 - share))
        assert abs(counts[split] - share * len(entries)) < 4 * deviation


def test_a_larger_val_fraction_leaves_test_as_it_was():
    few, many = (cut_splits(flat(count=500), val, 0.1, seed=0) for val in (0.05, 0.4))
    assert [side == "test" for side in few] == [side == "test" for side in many]
    assert all(side == "val" for side, before in zip(many, few, strict=True) if before == "val")


def test_given_splits_are_kept_and_only_what_is_missing_is_cut():
    entries = [Entry(f"{s}/{label}/{i}", label, s) for s in ("train", "test") for label in "ab" for i in range(50)]
    cut = cut_splits(entries, 0.1, 0.1, seed=0)
    assert cut[100:] == ["test"] * 100
    assert set(cut[:100]) == {"train", "val"}
    assert cut_splits(entries[:100], 0.1, 0.1, seed=0) != cut[:100]  # now test is missing


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(DataError, match=r"--val-fraction 0\.5, --test-fraction 0\.5: nothing is left"):
        cut_splits(flat(), 0.5, 0.5, 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["train", "val", "test", "val"], "none of the 1 images of class 'b' falls into train"),
        (["train", "train", "test", "train"], "none of its 4 images falls into val; add images, or pass a larger"),
    ],
)
def test_a_class_or_a_split_without_images_is_an_error(given, words):
    entries = [Entry(f"{label}/{i}", label, "") for i, label in enumerate("aaab")]
    with pytest.raises(DataError, match=words):
        check_splits("pets", entries, given)


def test_a_class_that_a_split_does_not_measure_is_named():
    entries = [Entry(f"{label}/{i}", label, "") for i, label in enumerate("aaabbb")]
    (warning,) = check_splits("pets", entries, ["train", "val", "test", "train", "val", "train"])
    assert warning.startswith("1 of 2 classes have no test image, so test does not measure them: 'b'; add images")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of 60 images, and a run that was trained on it; sides as the run's record has them."""
    root = tmp_path_factory.mktemp("trained")
    folder = make_folder(root / "pics", count=20, kind="png")
    assert main(["--data", str(folder), "--epochs", "1", "--out", str(root / "run")]) == 0
    return folder, root / "run", splits.read(root / "run")


def add_one(folder):
    """One image more, which every other comes after."""
    image(COLOURS["red"], 999).save(folder / "red" / "00 new.png")
    return folder


def repack(kind, folder, tmp_path):
    if kind == "a trailing slash":
        return f"{folder}/"
    if kind == "a copy":
        return shutil.copytree(folder, tmp_path / "elsewhere")
    if kind == "an added image":
        return add_one(shutil.copytree(folder, tmp_path / "more"))
    name, _, wrapped = kind.partition(", ")
    make = as_zip if name == "zip" else lambda *given: as_tar(given[0], given[1], "gz", given[2])
    return make(folder, tmp_path / f"pics.{'zip' if name == 'zip' else 'tar.gz'}", bool(wrapped))


def test_training_sees_the_same_images_in_the_same_order_from_a_folder_and_an_archive(trained, tmp_path):
    folder, _, known = trained
    names = [
        load(str(data), rule=PixelRule.square(8)).train.names
        for data in (folder, as_zip(folder, tmp_path / "p.zip", True))
    ]
    assert names[0] == names[1] == sorted(key for key, side in known.items() if side == "train")


KINDS = ["a trailing slash", "a copy", "an added image", "zip", "zip, wrapped", "tar", "tar, wrapped"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_archive_or_addition_moves_an_image(trained, tmp_path, kind):
    folder, _, known = trained
    moved = sides(repack(kind, folder, tmp_path))
    assert {key: side for key, side in moved.items() if key in known} == known
    assert len(moved) - len(known) == (kind == "an added image")


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_out_what_the_run_was_trained_on_and_says_so(trained, tmp_path, capsys, kind):
    folder, run, known = trained
    counts, data = Counter(known.values()), repack(kind, folder, tmp_path)
    capsys.readouterr()
    assert main(["--evaluate", str(run), "--data", str(data), "--json"]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    new = kind == "an added image"
    assert summary["images"] == counts["test"] + new
    assert summary["left_out"] == {"train": counts["train"], "val": counts["val"]}
    assert summary["split"] == ("unseen" if new else "test")
    words = f"left out by name: {counts['train']} training images and {counts['val']} validation images of the run"
    assert f"{words}; scored: {counts['test']} test and {int(new)} new ones" in out


def test_other_data_is_scored_as_a_whole_and_that_is_said(trained, tmp_path, capsys):
    other = make_folder(tmp_path / "other", count=3, kind="webp")
    assert main(["--evaluate", str(trained[1]), "--data", str(other)]) == 0
    out = capsys.readouterr().out
    assert "none of the 9 images has the name of one that the run has seen: all count as new" in out
    assert "of 9 images" in out


def test_split_all_scores_the_training_images_too_and_says_so(trained, capsys):
    folder, run, known = trained
    assert main(["--evaluate", str(run), "--data", str(folder), "--split", "all"]) == 0
    out = capsys.readouterr().out
    assert f"among those scored: {Counter(known.values())['train']} training images" in out
    assert "of 60 images" in out


def test_data_of_training_images_alone_is_refused_with_the_way_out(trained, tmp_path, capsys):
    folder, run, known = trained
    shutil.copytree(folder, tmp_path / "pics")
    for key, side in known.items():
        if side != "train":
            (tmp_path / "pics" / key).unlink()
    assert main(["--evaluate", str(run), "--data", str(tmp_path / "pics")]) == 2
    assert "no images to score in this split; pass --split" in capsys.readouterr().err


def test_a_run_without_a_record_says_what_it_does_not_know(trained, tmp_path, capsys):
    folder, run, _ = trained
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / splits.FILE).unlink()
    assert main(["--evaluate", str(tmp_path / "run"), "--data", str(folder)]) == 0
    assert "has no splits.json.gz, which says what it was trained on: images" in capsys.readouterr().out
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "has no splits.json.gz, which says what it was trained on; start a new run" in capsys.readouterr().err
    (tmp_path / "run" / splits.FILE).write_bytes(b"nothing")
    assert main(["--evaluate", str(tmp_path / "run"), "--data", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_record_goes_before_the_cut_in_export_and_resume(trained, tmp_path, capsys):
    """The record of a run whose cut was another one, as of an image that has been given a side by an earlier rule."""
    folder, run, known = trained
    shutil.copytree(run, tmp_path / "run")
    few = dict.fromkeys([key for key, side in known.items() if side == "train"][::2], "test")
    turned = {key: "train" if side == "test" else side for key, side in known.items()} | few
    splits.write(tmp_path / "run", {split: [k for k, own in turned.items() if own == split] for split in splits.SPLITS})
    capsys.readouterr()
    with printed("export"):
        tested = {name for name, _, _ in images.read(tmp_path / "run", "test", str(folder))}
    assert tested == {key for key, side in turned.items() if side == "test"}
    counts = Counter(turned.values())
    words = f"pics: left out by name: {counts['train']} training images and {counts['val']} validation images"
    assert words in capsys.readouterr().out
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    trained_on = json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["images"]
    assert trained_on == counts["train"]
    assert splits.read(tmp_path / "run") == turned


def test_an_image_that_has_gone_stays_one_that_was_trained_on(trained, tmp_path):
    folder, run, known = trained
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "pics")
    gone = next(key for key, side in known.items() if side == "train")
    (tmp_path / "pics" / gone).unlink()
    add_one(tmp_path / "pics")
    assert main(["--resume", str(tmp_path / "run"), "--data", str(tmp_path / "pics"), "--epochs", "2"]) == 0
    record = splits.read(tmp_path / "run")
    assert record == known | {"red/00 new.png": record["red/00 new.png"]}


def test_composed_and_decomposed_names_are_one_image(tmp_path):
    keys = []
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "café")
        make_folder(tmp_path / form, count=1)
        (tmp_path / form / "red").rename(tmp_path / form / name)
        (tmp_path / form / name / "0.jpg").rename(tmp_path / form / name / f"{name}.jpg")
        source = open_source(str(tmp_path / form))
        assert "café" in source.labels
        keys.append([entry.key for entry in source.entries])
        assert len([body for _, body in source.read() if isinstance(body, bytes)]) == 3
    assert keys[0] == keys[1]


def test_the_record_keeps_names_that_are_no_text(tmp_path):
    odd = ["a/\udcff\n.jpg", "b/日本.jpg"]
    splits.write(tmp_path, {"train": odd, "val": [], "test": []})
    assert splits.read(tmp_path) == dict.fromkeys(odd, "train")
    entry = Entry("x", "a", "", key=odd[0])
    assert cut_splits([entry], 0.1, 0.1, 0) == cut_splits([replace(entry)], 0.1, 0.1, 0)


def test_the_built_in_data_sets_are_cut_by_name_too():
    source = open_source("digits")
    assert len({entry.key for entry in source.entries}) == 1797
    sent = sorted(name for name, _, _ in read_split("digits", "val"))
    cut = cut_splits(source.entries, 0.1, 0.1, 0)
    assert sent == sorted(entry.name for entry, side in zip(source.entries, cut, strict=True) if side == "val")
