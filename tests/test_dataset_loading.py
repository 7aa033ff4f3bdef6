"""Labelled images become crops and targets; the files of a split are what a client would send."""

import numpy as np
from PIL import Image

from dataset.loading import load, read_split
from predictor.pillow_preprocessing import crop
from predictor.spec import PixelRule
from tests.folders import make_folder


def test_a_folder_becomes_crops_and_targets(tmp_path):
    folder = make_folder(tmp_path, count=10, kind="png")
    data = load(str(folder), rule=PixelRule.square(16, 20))
    assert len(data.train) + len(data.val) + len(data.test) == 30
    assert min(len(data.train), len(data.val), len(data.test)) > 0
    for split in (data.train, data.val, data.test):
        for i, name in enumerate(split.names):
            expected = crop(Image.open(folder / name), PixelRule.square(16, 20))
            np.testing.assert_array_equal(split.crops(slice(i, i + 1))[0].numpy(), expected)
            assert data.labels[split.targets[i]] == name.split("/")[0]


def test_the_test_files_of_a_run_are_what_a_client_would_send(tmp_path):
    folder = make_folder(tmp_path, count=10)
    data = load(str(folder), rule=PixelRule.square(16))
    sent = {name: (label, body) for name, label, body in read_split(str(folder), "test")}
    assert sorted(sent) == sorted(data.test.names)
    for name, (label, body) in sent.items():
        assert body == (folder / name).read_bytes()
        assert label == name.split("/")[0]


def test_progress_counts_every_image_once(tmp_path):
    folder, told = make_folder(tmp_path, count=20), []
    (folder / "red" / "broken.jpg").write_bytes(b"nothing")
    load(str(folder), rule=PixelRule.square(8), skip_bad=True, workers=1, progress=lambda *given: told.append(given))
    assert told[-1] == (61, 61)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {total for _, total in told} == {61}


def test_nothing_is_printed_but_said(tmp_path, capsys):
    """Red has an image in each split; the other classes, one image each, have none in val or test."""
    folder, said = make_folder(tmp_path / "pics", count=30), []
    for path in [*(folder / "green").iterdir(), *(folder / "blue").iterdir()]:
        if path.name != "0.jpg":
            path.unlink()
    known = {f"{label}/0.jpg": "train" for label in ("green", "blue")}
    load(str(folder), rule=PixelRule.square(8), known=known, say=said.append)
    assert [line.split(" classes", 1)[0] for line in said] == ["2 of 3", "2 of 3"]
    assert capsys.readouterr() == ("", "")
