import json

import pytest
from PIL import Image

import train
from predictor.spec import ModelSpec
from tests.folders import make_folder
from tests.learning import make_plan
from training.options import make_options, recipes
from training.schedule import lr_factor


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_set_of_the_ordinary_flags(name):
    config = make_options(None, {"data": "digits", "out": "x"}, name)
    assert all(getattr(config, option) == value for option, value in recipes()[name].items())


def test_flags_override_a_file_and_a_file_overrides_the_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("label_smoothing: 0.1\nlr: 0.3\n")
    config = make_options(str(tmp_path / "mine.yaml"), {"data": "digits", "out": "x", "lr": 0.5}, "fast")
    assert (config.lr, config.label_smoothing, config.optimizer) == (0.5, 0.1, "muon")


def test_an_unknown_recipe_is_named_with_those_that_there_are(tmp_path, capsys):
    assert train.main(["--data", "digits", "--out", str(tmp_path / "run"), "--recipe", "slow"]) == 2
    error = capsys.readouterr().err
    assert "--recipe slow" in error
    assert "there are fast, quick" in error
    assert train.main(["--list-recipes"]) == 0
    assert "fast:" in capsys.readouterr().out


def test_the_quick_recipe_learns_and_can_be_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--data", "digits", "--out", str(out), "--recipe", "quick", "--no-flip", "--val-fraction", "0.4"]
    assert train.main([*arguments, "--epochs", "4", "--batch-size", "32"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.5  # of ten classes
    assert ModelSpec.load(out / "spec.json").arch == "fastnet_small"
    assert train.main(["--resume", str(out), "--epochs", "5"]) == 0
    assert "going on after epoch 4" in capsys.readouterr().out


def test_the_recipe_for_photographs_cuts_random_crops_out_of_whole_images(tmp_path, capsys):
    """Oblong ones, larger than the network's size."""
    data, out = make_folder(tmp_path / "data", count=8), tmp_path / "run"
    for path in data.rglob("*.jpg"):
        Image.open(path).resize((150, 100)).save(path)
    arguments = ["--data", str(data), "--out", str(out), "--recipe", "photos", "--epochs", "1", "--batch-size", "8"]
    assert train.main(arguments) == 0
    assert "random crops of 0.35 to 1 of the area at 64 px" in capsys.readouterr().out
    spec = ModelSpec.load(out / "spec.json")
    assert (spec.arch, spec.height, spec.width) == ("fastnet_small", 64, 64)


def test_the_linear_schedule_ends_at_zero():
    plan = make_plan(schedule="linear", warmup=0.2)
    assert [lr_factor(plan, progress, 0) for progress in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1, 0.5, 0])
