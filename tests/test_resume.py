import copy
import json
import random
import shutil
import signal

import pytest
import torch
import yaml
from torch import nn

from benchmarks import resume as kills
from dataset.loading import load
from model import checkpoint
from predictor.spec import PixelRule
from tests.conftest import Clock
from tests.folders import make_folder
from tests.learning import Training, before_step
from train import main, train
from training.options import TrainOptions, make_options, resumed_options

EPOCHS = 6
RECIPE = ["--data", "digits", "--epochs", str(EPOCHS), *kills.RECIPE[4:]]
OFTEN = ["--checkpoint-minutes", "0.001"]  # some times in each epoch


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of three epochs with everything on."""
    out = tmp_path_factory.mktemp("runs") / "short"
    assert main([*RECIPE, "--epochs", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.timeout(900)  # up to 13 processes, if the first kills come too late
def test_a_run_that_was_killed_twice_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    """The kills are real ones, at random moments after the data is read; earlier ones, if the first comes too late."""
    without_report = "import sys, train; train.write_report = lambda *_: None; sys.exit(train.main())"
    monkeypatch.setattr(kills, "PROGRAM", ["-c", without_report])
    whole, seed = tmp_path / "whole", random.randrange(1000)
    assert kills.train([*RECIPE, "--out", str(whole)])
    latest = json.loads((whole / "metrics.json").read_text())["train"]["seconds"]
    for attempt in range(4):
        killed, moments = tmp_path / f"killed-{attempt}", random.Random(seed)
        killed_after = kills.kill_and_resume(killed, [*RECIPE, *OFTEN], 2, moments, latest / 2**attempt)
        assert kills.differences(whole, killed) == [], (seed, killed_after)
        assert len((killed / "history.csv").read_text().splitlines()) == 1 + EPOCHS
        if killed_after and killed_after[0] < EPOCHS:
            break
    else:
        pytest.fail("every run was over before it was killed")


def test_the_comparison_finds_a_single_bit(short, copied):
    assert kills.differences(short, copied) == []
    last = checkpoint.load(copied / "last.ckpt")
    next(iter(last["network"].values())).view(torch.int32).view(-1)[0] ^= 1
    checkpoint.save(last, copied / "last.ckpt")
    assert kills.differences(short, copied) == [f"last.ckpt/network/{next(iter(last['network']))}"]


class Restless(nn.Module):
    """A network with dropout and BatchNorm: random states and statistics that a resumption must not lose."""

    def __init__(self):
        super().__init__()
        layers = (nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
        self.layers = nn.Sequential(*layers, nn.Linear(8 * 8 * 8, 10))

    def forward(self, images):
        return self.layers(images)


@pytest.fixture(scope="module")
def digits():
    return load("digits", rule=PixelRule.square(32))


def make(data, **options):
    torch.manual_seed(0)
    return Training(data, Restless(), crop_padding=4, batch_size=128, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9, "mixup": 0.2},
        {"optimizer": "sgd", "cutmix": 1.0},
        {"optimizer": "muon", "ema": 0.9, "label_smoothing": 0.2},
        {"rotate": 20.0, "trivial": True, "erase": 0.3, "balance": "loss", "select": "macro-f1"},
        {"balance": "sampler", "select": "loss"},
        {"channels_last": True, "hold_norms": True, "freeze_first": 0.3, "layer_decay": 0.1, "weights": "w.pt"},
        {"amp": "bf16"},
        {"amp": "fp16"},
    ],
    ids=str,
)
def test_a_training_that_is_restored_within_an_epoch_goes_on_bit_for_bit(digits, tmp_path, options):
    def save(begun):
        if len(begun.rates) == 5:  # of 11 steps
            checkpoint.save(first.state(begun), tmp_path / "last.ckpt")

    first = make(digits, checkpoint_minutes=1e-9, **options)
    first.epoch()
    first.epoch(on_save=save)
    second = make(digits, **options)
    torch.rand(7)  # whatever has happened to the random numbers meanwhile
    second.restore(tmp_path / "last.ckpt")
    before = copy.deepcopy(second.state(second.progress.begun))
    second.epoch()
    assert kills._compare("state", second.state(), first.state()) == []
    assert kills._compare("state", before, first.state()) != []  # the other steps did change something


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def test_a_run_that_was_ended_within_each_epoch_ends_as_if_it_had_not_been(short, tmp_path, capsys):
    """Before the sixth of 21 steps: by SIGTERM in the first and second epoch, by a kill in the third."""
    out = tmp_path / "run"
    with before_step(5, sigterm):
        assert main([*RECIPE, "--epochs", "3", "--out", str(out)]) == 143
    assert f"there are no weights to keep; --resume {out} goes on" in capsys.readouterr().err
    assert not (out / "metrics.json").exists()
    with before_step(21, sigterm):
        assert main(["--resume", str(out)]) == 0
    said = capsys.readouterr()
    assert "going on after epoch 0 and 5 steps of the next" in said.out
    assert "interrupted: the best weights so far are kept, and the state for --resume" in said.err
    assert json.loads((out / "metrics.json").read_text())["train"]["epochs"] == 1
    with before_step(21, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        main(["--resume", str(out), "--checkpoint-minutes", "1e-9"])
    assert main(["--resume", str(out), "--checkpoint-minutes", "0"]) == 0
    assert "going on after epoch 2 and 4 steps of the next" in capsys.readouterr().out  # the kill came before the save
    assert kills.differences(short, out) == []


def test_a_finished_run_is_left_as_it_is(short, copied, capsys):
    assert main(["--resume", str(copied)]) == 0
    assert "going on after epoch 3" in capsys.readouterr().out
    assert kills.differences(short, copied) == []


def test_epochs_may_be_raised_and_data_may_have_moved(copied, capsys):
    assert main(["--resume", str(copied), "--epochs", "4", "--data", "digits"]) == 0
    assert "epoch   4" in capsys.readouterr().out
    assert len((copied / "history.csv").read_text().splitlines()) == 5
    assert yaml.safe_load((copied / "config.yaml").read_text())["epochs"] == 4


def test_a_kill_between_the_two_files_of_an_epoch_does_no_harm(short, copied):
    history = (copied / "history.csv").read_text().splitlines(keepends=True)
    (copied / "history.csv").write_text("".join(history[:-1]))
    assert main(["--resume", str(copied)]) == 0
    assert kills.differences(short, copied) == []


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(short, copied):
    for name in ("last.ckpt", "history.csv", "model.pt", "spec.json", "metrics.json"):
        (copied / name).unlink()
    assert main(["--resume", str(copied)]) == 0
    assert kills.differences(short, copied) == []


def test_a_new_run_in_an_old_folder_leaves_nothing_of_the_old_one_behind(copied, monkeypatch):
    monkeypatch.setattr("train.learn", lambda *_: (_ for _ in ()).throw(ValueError("killed")))
    assert main(["--data", "nothing", "--out", str(copied), "--overwrite"]) == 2
    assert (copied / "model.pt").exists()  # it had not begun
    assert main(["--data", "digits", "--out", str(copied), "--overwrite"]) == 2
    left = {path.name for path in copied.iterdir() if path.is_file()}
    assert left == {"config.yaml", "splits.json.gz", "samples.json"}  # the last: which samples may be removed


def test_a_minutes_run_has_the_time_that_it_had_left(tmp_path, monkeypatch):
    """By a clock on which each look takes a second; there is one before each of the 41 steps of an epoch, at least."""
    out = tmp_path / "run"
    monkeypatch.setattr("training.schedule.time", Clock())
    train(TrainOptions(data="digits", out=str(out), minutes=1))
    last = checkpoint.load(out / "last.ckpt")
    checkpoint.save(last | {"seconds": 40.0}, out / "last.ckpt")  # of 60 s
    again = train(resumed_options(out, None, {}), resume=True)
    assert 60 <= again["train"]["seconds"] < 70  # and not as long as anew
    assert again["train"]["epochs"] > last["history"][-1]["epoch"]


def test_other_classes_are_named_one_by_one(tmp_path, capsys):
    colours = make_folder(tmp_path / "colours", count=12)
    assert main(["--data", str(colours), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    (colours / "red").rename(colours / "crimson")
    assert main(["--resume", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "the run has 'red', which the data has not; the data has 'crimson', which the run has not" in error
    assert error.count("\n") == 1


def test_other_images_of_the_same_classes_are_mentioned(tmp_path, capsys):
    colours = make_folder(tmp_path / "colours", count=12)
    assert main(["--data", str(colours), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    next((colours / "red").iterdir()).unlink()
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert "are not those that the run began with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (None, ["--lr", "0.1"], "leave --lr out"),
        (None, ["--out", "elsewhere"], "leave --out out"),
        (None, ["--config", "a.yaml"], "leave --config out"),
        (None, ["--recipe", "fast"], "leave --recipe out"),
        (lambda run: (run / "config.yaml").unlink(), [], "has no config.yaml"),
        (
            lambda run: (run / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:9000]),
            [],
            "last.ckpt: damaged",
        ),
        (lambda run: checkpoint.save({"epoch": 3}, run / "last.ckpt"), [], "by another version of train.py"),
    ],
)
def test_what_cannot_be_resumed_is_one_line_and_changes_nothing(copied, capsys, change, arguments, words):
    if change:
        change(copied)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert main(["--resume", str(copied), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_epochs_take_the_place_of_minutes(tmp_path):
    make_options(None, {"data": "digits", "out": "x", "minutes": 3.0}).save(tmp_path / "config.yaml")
    assert resumed_options(tmp_path, None, {}).minutes == 3.0
    changed = resumed_options(tmp_path, None, {"epochs": 7})
    assert (changed.minutes, changed.epochs, changed.out) == (None, 7, str(tmp_path))
    changed.save(tmp_path / "config.yaml")
    changed = resumed_options(tmp_path, None, {"minutes": 4.0})
    assert (changed.minutes, changed.epochs) == (4.0, None)
    both = resumed_options(tmp_path, None, {"minutes": 4.0, "epochs": 9})
    assert (both.minutes, both.epochs) == (4.0, 9)
