"""What is trained where no network is named."""

import pytest

from dataset.overview import Overview
from model import registry
from tests.folders import make_folder
from train import main
from training.options import make_options, recipes
from training.suggestion import RECIPE, choose, suggest

DATA = {"data": "photos", "out": "runs/x"}


def overview(width, height):
    size = (width, height)
    return Overview(300, 2, ("cat", 100), ("dog", 200), {"JPEG": 300}, 200, size, (size, size))


def test_photographs_begin_with_the_installed_weights():
    suggestion = suggest(overview(400, 300), DATA)
    assert suggestion.options == recipes()[RECIPE]
    assert "ImageNet weights" in suggestion.lines[-2]
    assert len(suggestion.lines) <= 4
    options = make_options(None, suggestion.options | DATA)
    assert options.arch == "timm/tf_efficientnet_lite0"


@pytest.mark.parametrize(("size", "given"), [((32, 32), {}), ((400, 64), {}), ((400, 300), {"size": 32})])
def test_small_images_are_trained_as_ever(size, given):
    suggestion = suggest(overview(*size), DATA | given)
    assert suggestion.options == {}
    assert suggestion.lines == overview(*size).lines()


def test_images_whose_headers_say_nothing_are_trained_as_ever():
    nothing = Overview(300, 2, ("cat", 100), ("dog", 200), {}, 0, None, None)
    assert suggest(nothing, DATA).options == {}


def test_without_installed_weights_a_line_says_what_they_would_be_worth(monkeypatch):
    monkeypatch.setattr(registry, "has_installed_weights", lambda arch: False)
    suggestion = suggest(overview(400, 300), DATA)
    assert suggestion.options == {}
    assert "--arch resnet18 --pretrained" in suggestion.lines[-1]


def test_what_is_given_stands_above_what_is_chosen():
    larger = suggest(overview(400, 300), DATA | {"size": 384})
    options = make_options(None, larger.options | DATA | {"size": 384})
    assert (options.size, options.resize, options.train_size) == (384, 384, 320)
    shifted = suggest(overview(400, 300), DATA | {"crop_padding": 8})
    assert make_options(None, shifted.options | DATA | {"crop_padding": 8}).crop_scale == 0


@pytest.mark.parametrize("given", [{"arch": "simplecnn"}, {"freeze": True, "pretrained": True}, {"data": "digits"}])
def test_whoever_names_a_network_or_a_known_data_set_gets_no_suggestion(given):
    options = make_options(None, DATA | given)
    assert choose(options, DATA | given) == (options, None)  # the folder, which is not there, was not opened


def test_the_command_says_what_it_found_before_it_trains(tmp_path, capsys):
    folder = make_folder(tmp_path / "colours", count=12)  # of 40×30 px
    assert main(["--data", str(folder), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "36 images in 3 classes, 12 each"
    assert second == "40×30 px, JPEG"
    assert any(line.startswith("simplecnn at 32 px") for line in rest)
