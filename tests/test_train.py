import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dataset import splits
from model import checkpoint, load_run, registry
from predictor.files import sha256
from predictor.image_headers import KINDS
from predictor.spec import ModelSpec
from tests.conftest import PROJECT, Clock
from tests.folders import make_folder
from tests.kinds import HEIC
from tests.learning import make_plan
from train import main, train
from training.console import on_terminal
from training.early_stopping import is_out_of_patience
from training.failures import Diverged
from training.options import TrainOptions


def test_a_run_folder_holds_what_the_contract_names(run):
    assert {path.name for path in run.iterdir()} >= {
        "model.pt", "spec.json", "config.yaml", "metrics.json", "history.csv", "report", "last.ckpt", "samples",
    }  # fmt: skip
    spec = ModelSpec.load(run)
    assert spec.labels == tuple("0123456789")
    assert spec.weights_sha256 == sha256(run / "model.pt")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == spec.metrics["accuracy"] > 0.5  # of ten classes
    assert set(metrics["test"]["per_class"]) == set(spec.labels)
    assert {"top5", "ece", "macro"} <= set(metrics["test"])
    assert metrics["train"]["seconds"] > 0
    history = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in history] == list(range(1, 11))
    assert yaml.safe_load((run / "config.yaml").read_text())["data"] == "digits"
    for name in ("0-0.png", "7-0.png"):
        assert (run / "samples" / name).is_file()


@pytest.mark.skipif("HEIF" not in KINDS, reason="pip install pi-heif")
@pytest.mark.parametrize("crops", [[], ["--crop-scale", "0.5"]], ids=["squares", "frames"])
def test_the_photographs_of_phones_are_trained_on(crops, tmp_path, capsys):
    folder = make_folder(tmp_path / "colours", count=12)
    for number in range(12):
        (folder / "red" / f"{number}.jpg").unlink()
        (folder / "red" / f"IMG_{number}.HEIC").write_bytes(HEIC)
    command = ["--data", str(folder), "--epochs", "1", "--size", "32", *crops, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert "HEIC" in capsys.readouterr().out
    learnt = [name for name, split in splits.read(tmp_path / "run").items() if split == "train"]
    assert sum(name.endswith(".HEIC") for name in learnt) >= 6


def test_the_weights_are_a_state_dict_that_loads_without_running_code(run):
    state = torch.load(run / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    spec, network = load_run(run)
    assert not network.training
    assert network(torch.zeros(1, 3, spec.height, spec.width)).shape == (1, 10)


def test_the_last_checkpoint_holds_what_a_resume_needs(run):
    last = checkpoint.load(run / "last.ckpt")
    assert set(last) == {
        "version", "epoch", "seconds", "network", "ema", "optimizer", "scaler", "best", "history", "begun", "counts",
        "labels", "images",
    }  # fmt: skip
    assert last["epoch"] == 10


def test_the_report_shows_its_images(run):
    page = (run / "report" / "index.html").read_text()
    assert 'src="curves.png"' in page
    assert '<div class="matrix">' in page
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "http" not in page  # opens without a network


def test_weights_that_do_not_belong_to_the_spec_are_refused(run, tmp_path):
    (tmp_path / "spec.json").write_text((run / "spec.json").read_text())
    checkpoint.save({k: v + 1 for k, v in checkpoint.load(run / "model.pt").items()}, tmp_path / "model.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"not the file that spec\.json was written for"):
        load_run(tmp_path)


def test_the_seed_decides_the_weights(tmp_path):
    def weights(name, seed):
        train(TrainOptions(data="digits", out=str(tmp_path / name), epochs=1, seed=seed))
        return sha256(tmp_path / name / "model.pt")

    assert weights("a", 1) != weights("b", 2)  # test_config.py repeats a run


def test_a_folder_trains_with_every_option(tmp_path, capsys):
    folder, weights = make_folder(tmp_path / "colours", count=12), tmp_path / "weights.pt"
    checkpoint.save(registry.build("resnet18", 2, 32).state_dict(), weights)
    arguments = f"""--data {folder} --out {tmp_path / "run"} --arch resnet18 --size 32 --resize 36 --epochs 3
        --weights {weights} --freeze --no-cache-features --optimizer sgd --lr 0.1 --schedule step --step-size 2
        --gamma 0.5 --warmup 0
        --label-smoothing 0.1 --no-flip --jitter 0.1 --crop-padding 2 --batch-size 7 --patience 2 --device cpu --seed 3
        --val-fraction 0.2 --workers 3""".split()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "colours: 3 classes" in out
    assert "flip off, shift 2 px, jitter 0.1" in out
    spec = ModelSpec.load(tmp_path / "run")
    assert (spec.labels, spec.arch) == (("blue", "green", "red"), "resnet18")
    assert (spec.height, spec.width, spec.resize) == (32, 32, 36)


def test_training_starts_from_local_weights(tmp_path, run):
    """At a learning rate that changes nothing, they are as good as they were."""
    arguments = [
        "--data",
        "digits",
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "1",
        "--lr",
        "1e-9",
        "--weights",
        str(run / "model.pt"),
    ]
    assert main(arguments) == 0
    before, after = (json.loads((folder / "metrics.json").read_text())["val"] for folder in (run, tmp_path / "run"))
    assert after["accuracy"] == pytest.approx(before["accuracy"], abs=1.5 / before["images"])  # one near tie
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)


def test_minutes_end_the_run_in_time(tmp_path, monkeypatch):
    """By a clock on which each look takes a second; there is one before each step, and some after an epoch."""
    monkeypatch.setattr("training.schedule.time", Clock())
    metrics = train(TrainOptions(data="digits", out=str(tmp_path / "run"), minutes=1))
    assert 1 < metrics["train"]["epochs"] < 2  # the second is cut short: an epoch has 41 steps
    assert 60 <= metrics["train"]["seconds"] < 70


def test_patience_stops_early(tmp_path, capsys):
    with on_terminal():
        train(TrainOptions(data="digits", out=str(tmp_path / "run"), epochs=50, lr=1e-9, patience=2))
    assert "stopping early" in capsys.readouterr().out
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) < 10


@pytest.mark.parametrize(
    ("options", "accuracies", "over"),
    [
        ({}, [0.5, 0.5, 0.5], True),  # a lower loss is no gain
        ({}, [0.5, 0.6, 0.6], False),
        ({"freeze": True, "unfreeze_at": 2}, [0.5, 0.5, 0.5], False),
        ({"freeze": True, "unfreeze_at": 2}, [0.5, 0.5, 0.5, 0.5], True),
    ],
)
def test_patience_counts_from_the_last_gain_and_what_is_yet_to_come(options, accuracies, over):
    history = [{"val_accuracy": value} for value in accuracies]
    assert is_out_of_patience(history, make_plan(arch="fastnet", patience=2, **options)) is over


def test_a_run_without_time_for_a_step_says_so(tmp_path, capsys):
    assert main(["--data", "digits", "--minutes", "1e-9", "--out", str(tmp_path / "run")]) == 2
    assert "--minutes 1e-09: over before the first step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.pt").exists()


def test_out_that_is_a_file_is_refused_before_the_data_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["--data", "nothing", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_of_nan_stops_the_run_with_its_place(tmp_path):
    with pytest.raises(Diverged, match=r"loss is (nan|inf) at step"):
        train(TrainOptions(data="digits", out=str(tmp_path / "run"), optimizer="sgd", lr=1e12, warmup=0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digit"], "did you mean digits"),
        (["--data", "digits", "--arch", "resnet19"], "did you mean resnet18"),
        (["--data", "digits", "--epochs", "0"], "--epochs 0"),
        (["--data", "digits", "--size", "12"], "at least 16 px"),
        (["--data", "digits", "--resize", "8"], "--resize 8: must be at least the short edge of --size 32"),
        (["--data", "digits", "--device", "cuda:99"], "--device cuda:99"),
        (["--data", "digits", "--weights", "none.pt"], "none.pt: no such file"),
        (["--data", "digits", "--pretrained"], "no published weights of simplecnn"),
        (["--data", "digits", "--crop-padding", "40"], "--crop-padding 40: must be below the short edge of --size 32"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, words):
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()  # nothing was written


def test_help_and_list_archs(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "--label-smoothing" in capsys.readouterr().out
    assert main(["--list-archs"]) == 0
    assert "mobilenet_v3_small" in capsys.readouterr().out.split()


@pytest.mark.anywhere
def test_sigterm_keeps_the_best_weights_and_writes_everything(tmp_path):
    """As Ctrl-C, which tests/test_run_folder.py has, and the first epoch; tests/test_resume.py has what comes after."""
    out = tmp_path / "run"
    command = [sys.executable, "train.py", "--data", "digits", "--epochs", "100000", "--out", str(out)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        wait_for(out / "last.ckpt", child)
        time.sleep(0.4)
        child.send_signal(signal.SIGTERM)
        stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 0, stderr
    assert "interrupted: the best weights so far are kept, and the state for --resume" in stderr
    assert "test: " in stdout
    spec, _ = load_run(out)
    assert spec.metrics["accuracy"] > 0
    assert (out / "report" / "index.html").exists()


def wait_for(path: Path, child: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
