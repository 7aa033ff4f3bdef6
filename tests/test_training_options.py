import math
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from predictor.files import sha256
from tests.conftest import PROJECT
from tests.learning import make_plan
from train import main
from training.command_line import parse
from training.evaluation import evaluate_run
from training.options import (
    TrainOptions,
    flag,
    make_options,
    option_names,
    read_config,
    resumed_options,
    scoring,
    shown_on_card,
)
from training.resolve import Plan, recorded, resolve_reading


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data: digits\nout: runs/a\nepochs: 20\nlr: 3e-4\nbatch-size: 16\nfreeze: true\nminutes: null\n")
    config = make_options(str(file), {"epochs": 5, "freeze": False})
    assert (config.data, config.out, config.epochs, config.lr, config.batch_size) == ("digits", "runs/a", 5, 3e-4, 16)
    assert (config.freeze, config.minutes, config.optimizer) == (False, None, "adamw")


def test_a_runs_config_repeats_the_run(tmp_path, capsys):
    options = ["--data", "digits", "--epochs", "1", "--seed", "5", "--lr", "0.002", "--no-flip", "--jitter", "0.1"]
    assert main([*options, "--out", str(tmp_path / "a")]) == 0
    assert main(["--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    assert sha256(tmp_path / "a" / "model.pt") == sha256(tmp_path / "b" / "model.pt")
    a, b = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in "ab")
    assert a | {"out": b["out"]} == b
    assert (a["size"], a["batch_size"], a["lr"]) == (32, 32, 0.002)  # what was chosen stands there, not null


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "'epoch' is no option; did you mean epochs?"),
        ("zzz: 3", "'zzz' is no option; the names are those of the flags"),
        ("epochs: ten", "'epochs' is 'ten'; it must be a whole number"),
        ("epochs: 1.5", "'epochs' is 1.5; it must be a whole number"),
        ("epochs: true", "'epochs' is True; it must be a whole number"),
        ("accumulate: null", "'accumulate' is None; it must be a whole number"),
        ("size: 1.5", "'size' is 1.5; it must be a whole number or HEIGHTxWIDTH"),
        ("size: 160-224", "--size 160-224: must be N, or HEIGHTxWIDTH such as 160x224, px"),
        ("lr: fast", "'lr' is 'fast'; it must be a number"),
        ("freeze: 1", "'freeze' is 1; it must be true or false"),
        ("arch: 18", "'arch' is 18; it must be a text"),
        ("epochs: 0", "--epochs 0: must be from 1"),
        ("- epochs", "holds a list, not options"),
        ("a: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, capsys, text, words):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text + "\n")
    assert main(["--config", str(file), "--data", "digits", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_and_out_are_needed(capsys):
    assert main(["--epochs", "2"]) == 2
    assert "--data and --out: needed" in capsys.readouterr().err


def test_every_option_survives_the_file(tmp_path):
    config = make_options(None, {"data": "digits", "out": "x", "minutes": 2.5, "weights": "w.pt"})
    config.save(tmp_path / "config.yaml")
    assert make_options(None, read_config(tmp_path / "config.yaml")) == config


def test_an_option_that_is_no_more_is_passed_over_where_it_was_not_used(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 3\nlow_res: 0.0\n")
    assert read_config(file) == {"epochs": 3}
    file.write_text("low_res: 0.6\n")
    with pytest.raises(ValueError, match="'low_res' is no option"):
        read_config(file)


def test_the_card_shows_the_recipe_and_what_was_switched_on_and_no_paths():
    shown = shown_on_card(vars(make_options(None, {"data": "/secret", "out": "x", "mixup": 0.2})))
    assert (shown["mixup"], shown["schedule"], shown["optimizer"]) == (0.2, "cosine", "adamw")
    assert not {"cutmix", "step_size", "gamma", "data", "out", "download_dir", "device"} & set(shown)


def test_the_card_shows_the_step_schedule_with_its_numbers():
    for schedule, named in (("step", {"step_size": 7, "gamma": 0.3}), ("cosine", {})):
        options = make_options(None, {"data": "digits", "out": "x", "schedule": schedule, "step_size": 7})
        shown = shown_on_card(vars(options))
        assert {name: shown[name] for name in ("step_size", "gamma") if name in shown} == named


def test_every_option_has_a_place_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(flag(name) in said for name in option_names())


def test_nothing_in_a_plan_is_optional_and_every_option_is_decided_or_used_before():
    kinds = get_type_hints(Plan)
    assert not [name for name, kind in kinds.items() if type(None) in get_args(kind)]
    before = {"data", "out", "download_dir", "val_fraction", "test_fraction", "split_seed", "skip_bad", "workers"}
    assert set(option_names()) - set(kinds) == before | {
        *("store", "pretrained", "weights", "minutes", "checkpoint_minutes"),
        *("size", "resize", "fit", "interpolation", "fill", "colour"),  # rule
    }


def test_what_an_option_left_open_is_decided_in_one_place():
    default = re.compile(r"(?<!not \()\b(?:options|config)\.\w+ or |cpu_count")
    files = [PROJECT / "train.py", *(PROJECT / "training").glob("*.py"), *(PROJECT / "dataset").rglob("*.py")]
    assert [file.name for file in files if default.search(file.read_text())] == ["resolve.py"]


def test_scoring_takes_the_options_that_say_which_images_and_where_and_no_others():
    images = {"data", "download_dir", "val_fraction", "test_fraction", "split_seed", "skip_bad"}
    assert set(scoring()) == images | {"out", "workers", "device"}
    for name in set(option_names()) - set(scoring()):
        with pytest.raises(ValueError, match=f"trains nothing; leave {flag(name)} out"):
            evaluate_run(Path("runs/none"), None, {name: None}, torch.device("cpu"))


def test_scoring_reads_with_as_many_threads_as_training(run, monkeypatch):
    told = []
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("training.evaluation.decode_all", lambda *_, workers, **__: told.append(workers) or {})
    for given in ([], ["--workers", "5"]):
        assert main(["--evaluate", str(run), *given]) == 0
    assert told == [3, 5]


@pytest.mark.parametrize(
    ("name", "value", "numbers"),
    [
        ("fill", "1,2", "whole numbers from 0 to 255"),
        ("fill", "1,2,256", "whole numbers from 0 to 255"),
        ("fill", "0.5,1,2", "whole numbers from 0 to 255"),
        ("mean", "a,b,c", "numbers from 0 to 1"),
        ("mean", "0,0,nan", "numbers from 0 to 1"),
        ("std", "0,1,1", "numbers from 0.001 to 1"),
    ],
)
def test_what_is_not_three_numbers_in_their_range_is_one_line(name, value, numbers):
    with pytest.raises(ValueError, match=f"^--{name} {value}: must be R,G,B, three {numbers}$"):
        make_plan(fit="pad", **{name: value})


def test_pixels_are_padded_and_normalised_as_asked():
    asked = {"fit": "pad", "fill": "124,116,104", "colour": "as-stored", "mean": "0.5,0.25,0.1", "std": "0.3,0.2,0.1"}
    plan = make_plan(**asked)
    assert (plan.rule.fill, plan.rule.colour) == ((124, 116, 104), "as-stored")
    assert (plan.mean, plan.std) == ((0.5, 0.25, 0.1), (0.3, 0.2, 0.1))
    kept = recorded(TrainOptions(data="digits", out="x"), plan)
    assert {name: getattr(kept, name) for name in asked} == asked
    with pytest.raises(ValueError, match=r"--fill 1,2,3: .*pass --fit pad too"):
        make_plan(fill="1,2,3")


@pytest.mark.parametrize(("typed", "height", "width"), [("32", 32, 32), ("24x40", 24, 40), ("24x24", 24, 24)])
def test_a_size_is_a_side_or_height_and_width_and_is_recorded_as_it_is_typed(typed, height, width, tmp_path):
    _, given = parse(["--data", "digits", "--out", "x", "--size", typed], None)
    plan = make_plan(**given)
    assert (plan.rule.height, plan.rule.width, plan.train_size) == (height, width, plan.size)
    assert (plan.rule.resize, plan.crop_padding) == (min(height, width), min(height, width) // 8)
    kept = recorded(TrainOptions(**given), plan)
    assert kept.size == (height if height == width else typed)
    kept.save(tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml")["size"] == kept.size
    assert resolve_reading(resumed_options(tmp_path, None, {})).rule == plan.rule
    assert f"simplecnn at {kept.size} px" == f"{plan.arch} at {plan.size} px"


@pytest.mark.parametrize("name", ["size", "train_size"])
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        *((text, "must be N, or HEIGHTxWIDTH such as 160x224, px") for text in ("a", "160x", "x160", "1x2x3", "-8")),
        *((text, "must be from 1 to 4096") for text in (0, "0x32", "32x0", "32x4097")),
    ],
)
def test_what_is_no_size_is_one_line(name, typed, words):
    with pytest.raises(ValueError, match=f"^{flag(name)} {typed}: {words}$"):
        make_plan(crop_scale=0.5, **{name: typed})


def test_the_lengths_of_an_oblong_network_belong_to_its_short_edge():
    plan = make_plan(arch="resnet18", size="160x224", fit="crop")
    assert (plan.rule.resize, plan.crop_padding) == (round(160 * 256 / 224), 20)
    assert make_plan(arch="resnet18", size="160x224", fit="pad").rule.resize == 160
    assert make_plan(images=10_000, size="32x128").batch_size == 32  # not below 128 px
    for given in ({"resize": 159}, {"crop_padding": 160}):
        with pytest.raises(ValueError, match="the short edge of --size 160x224"):
            make_plan(arch="resnet18", size="160x224", **given)


def test_a_plan_is_what_the_options_left_open():
    plan = make_plan(images=9_999, flips=True, arch="resnet18")
    assert (plan.size, plan.rule.resize, plan.crop_padding, plan.flip, plan.batch_size) == (
        (224, 224),
        256,
        28,
        True,
        32,
    )
    assert (plan.lr, plan.epochs, plan.seconds, plan.amp) == (3e-3, 10, math.inf, torch.float32)
    many = make_plan(images=10_000, size=32, arch="resnet18", weights="w.pt", optimizer="sgd", minutes=2.0)
    assert (many.batch_size, many.rule.resize, many.epochs, many.seconds) == (64, 37, math.inf, 120)
    assert many.lr == pytest.approx(0.005)  # for trained weights that learn on
    assert make_plan(images=10_000, size=128, arch="resnet18").batch_size == 32
    asked = make_plan(flip=False, lr=0.5, batch_size=7, crop_padding=0, epochs=3, amp="bf16")
    assert (asked.flip, asked.lr, asked.batch_size, asked.crop_padding, asked.epochs) == (False, 0.5, 7, 0, 3)
    assert asked.amp is torch.bfloat16
