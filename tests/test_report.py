"""What the report shows, and in whose fonts."""

import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dataset.loading import load
from predictor.spec import ModelSpec, PixelRule
from training.metrics import calibrated_score
from training.report import TILE, write_report

LABELS = ("猫", "🦊 fox", "$5_$", "a <b>")


def report(folder, labels, wrong=3, batch=None):
    """Of a classifier of the first digits that is wrong about some; files have names."""
    whole = load("digits", rule=PixelRule.square(16))

    def few(split, count):
        targets = torch.arange(count) % len(labels)
        names = [f"test/{i}-名前.png" for i in range(count)]
        return replace(split, rows=split.rows[:count], targets=targets, names=names)

    data = replace(
        whole, labels=list(labels), train=few(whole.train, 90), val=few(whole.val, 20), test=few(whole.test, 21)
    )
    logits = 4 * torch.eye(len(labels))[data.test.targets]
    logits[:wrong] = logits[:wrong].roll(1, dims=1)
    scores = calibrated_score(logits, data.test.targets, labels, 1.0)
    train = {"parameters": 1, "best_epoch": 2.5, "epochs": 2.5, "seconds": 1.0, "device": "cpu"}
    spec = ModelSpec(arch="simplecnn", labels=labels, height=16, width=16, resize=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    folder.mkdir()
    history = folder / "history.csv"
    rows = ["epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy"]
    history.write_text("\n".join([*rows, "1,0.1,1,0.5,1,0.5", "2,0.1,1,0.5,1,0.5", "2.5,0,1,0.5,1,0.5"]))
    metrics = {"test": scores, "val": scores, "train": train}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that its font lacks
        write_report(
            folder / "report",
            spec,
            metrics,
            history,
            data,
            logits,
            batch or (torch.zeros((0, 16, 16, 3), dtype=torch.uint8), []),
        )
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


def test_labels_that_no_font_of_the_plots_has_stand_in_the_page(tmp_path):
    page = report(tmp_path / "run", LABELS)
    for label in ("猫", "🦊 fox", "$5_$", "a &lt;b&gt;"):
        assert page.count(label) >= 4  # twice in the matrix, under mistakes or among the confused, in the table
    assert "a <b>" not in page


def test_a_mistake_has_its_image_its_labels_and_its_files_name(tmp_path):
    page = report(tmp_path / "run", LABELS)
    assert page.count("<figure>") == 3
    assert "test/1-名前.png" in page
    assert f"object-position: -{2 * TILE}px -0px" in page
    with Image.open(tmp_path / "run" / "report" / "mistakes.png") as sheet:
        assert sheet.size == (8 * TILE, TILE)
        assert len(sheet.crop((0, 0, TILE, TILE)).getcolors(TILE * TILE)) > 5  # a digit
        assert sheet.crop((3 * TILE, 0, 4 * TILE, TILE)).getcolors() == [(TILE * TILE, (255, 255, 255))]


def test_oblong_images_keep_their_shape_in_their_tiles(tmp_path):
    images = torch.full((1, 8, 16, 3), 180, dtype=torch.uint8)
    report(tmp_path / "run", LABELS, batch=(images, ["猫"]))
    with Image.open(tmp_path / "run" / "report" / "batch.png") as sheet:
        tile = sheet.crop((0, 0, TILE, TILE))
    assert sorted(tile.getcolors()) == [(TILE * TILE // 2, (180,) * 3), (TILE * TILE // 2, (255,) * 3)]
    assert (tile.getpixel((0, TILE // 2)), tile.getpixel((TILE // 2, 0))) == ((180,) * 3, (255,) * 3)


def test_no_mistakes(tmp_path):
    page = report(tmp_path / "run", LABELS, wrong=0)
    assert "<figure>" not in page
    assert (tmp_path / "run" / "report" / "mistakes.png").exists()


def test_the_counts_of_each_class_and_the_baseline_stand_there(tmp_path):
    page = report(tmp_path / "run", LABELS)
    assert "<td>23</td><td>5</td><td>6</td></tr>" in page  # of 90, 20 and 21, the first class
    assert "28.57%: all of them given the label of the largest class" in page
    assert "2.5 epochs" in page


@pytest.mark.parametrize(("count", "shown"), [(5, False), (6, True)])
def test_top5_stands_there_only_where_it_says_something(tmp_path, count, shown):
    assert ("top-5" in report(tmp_path / "run", tuple("abcdefgh"[:count]))) == shown


def test_very_many_classes_have_an_image_as_their_matrix(tmp_path):
    page = report(tmp_path / "run", tuple(f"class {i}" for i in range(41)))
    assert 'src="confusion.png"' in page
    assert 'class="matrix"' not in page


def test_the_first_batch_is_shown_with_its_labels(tmp_path):
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 16, 16, 3) * 20
    page = report(tmp_path / "run", LABELS, wrong=0, batch=(images, ["猫", "a <b>"] * 5))
    assert page.count("<figure>") == 10
    assert page.count("<figcaption>a &lt;b&gt;</figcaption>") == 5
    assert 'src="batch.png" alt="" style="object-position: -128px -128px"' in page  # the tenth
    with Image.open(tmp_path / "run" / "report" / "batch.png") as sheet:
        assert sheet.size == (8 * TILE, 2 * TILE)
        assert sheet.getpixel((TILE + 5, TILE + 5)) == (180, 180, 180)
