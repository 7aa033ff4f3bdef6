"""`torchrun` with two real processes (gloo) against one process: the same curves, and each image counted once."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from launcher import Ports
from model import checkpoint, load_run, registry
from tests.conftest import PROJECT
from train import main
from training import distributed
from training.distributed import cut
from training.resolve import pick_device

RECIPE = ["--data", "digits", "--epochs", "2", "--batch-size", "60", "--optimizer", "sgd", "--flip", "--jitter", "0.1"]
RECIPE += ["--mixup", "0.2", "--cutmix", "1"]
ODD = ["--split-seed", "1"]  # 161 val images, 80 and 81 of them
ONE_STEP = [*RECIPE, "--epochs", "1", "--batch-size", "1293", "--warmup", "0"]  # all training images: 646 and 647


def torchrun(script, *arguments, cwd=PROJECT):
    """With two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    command = [*launcher, script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Options of a training of the head alone, and from the second epoch on of everything."""
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "weights.pt"
    checkpoint.save(registry.build("fastnet_small", 10, 32).state_dict(), weights)
    options = ["--data", "digits", "--arch", "fastnet_small", "--optimizer", "sgd", "--freeze", "--unfreeze-at", "2"]
    options += ["--batch-size", "60", "--epochs", "3", "--flip", "--crop-padding", "2", "--val-fraction", "0.5"]
    return [*options, "--weights", str(weights)]


def head_first(frozen):
    """The options of `frozen`, but the head is fitted first, then everything learns for an epoch; with patience."""
    kept = [*frozen[:4], *frozen[frozen.index("--batch-size") :]]
    return [*kept, "--head-first", "--patience", "1", "--epochs", "1"]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, frozen):
    """A folder with the runs of two processes, and `NAME.RANK.out` with what each said."""
    folder = tmp_path_factory.mktemp("by-two")
    recipes = {"two": [*RECIPE, *ODD, "--accumulate", "3", "--json"], "one-step": ONE_STEP, "frozen": frozen}
    recipes["head-first"] = head_first(frozen)
    ports = vars(Ports.free()).values()
    trainings = {
        name: {"arguments": [*recipe, "--out", str(folder / name)], "port": port}
        for (name, recipe), port in zip(recipes.items(), ports, strict=False)
    }
    done = torchrun(PROJECT / "tests" / "torchrun_trainings.py", json.dumps(trainings), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main([*RECIPE, *ODD, "--out", str(out)]) == 0
    return out


def test_two_processes_learn_what_one_does(one, by_two):
    """Small differences grow where a ReLU or a maximum is on the edge, hence the tolerances."""
    out, said = by_two / "two", [(by_two / f"two.{rank}.out").read_text() for rank in (0, 1)]
    assert [text.count("epoch   1") for text in said] == [1, 0]  # only the first process speaks
    assert {path.name for path in out.iterdir()} == {path.name for path in one.iterdir()}  # and leaves nothing behind
    expected, got = (checkpoint.load(run / "last.ckpt") for run in (one, out))
    for a, b in zip(expected["history"], got["history"], strict=True):
        assert b["lr"] == a["lr"]
        for name in ("train_loss", "val_loss"):
            assert b[name] == pytest.approx(a[name], rel=1e-2), name
        for name in ("train_accuracy", "val_accuracy"):
            assert b[name] == pytest.approx(a[name], abs=0.05), name
    summary = json.loads(said[0].splitlines()[-1])
    assert (summary["val"]["images"], summary["test"]["images"]) == (161, 360)  # each one once
    assert yaml.safe_load((out / "config.yaml").read_text())["batch_size"] == 60  # of both together
    load_run(out)


def test_a_step_of_two_processes_is_that_of_one(by_two, tmp_path):
    for name, options in (("whole", []), ("parts", ["--accumulate", "4"])):
        assert main([*ONE_STEP, *options, "--out", str(tmp_path / name)]) == 0
        expected, got = (checkpoint.load(run / "last.ckpt") for run in (tmp_path / name, by_two / "one-step"))
        for key, weight in expected["network"].items():
            assert (weight - got["network"][key]).norm() <= 1e-5 * weight.norm()
        gradients = [
            torch.cat([state["momentum_buffer"].flatten() for state in last["optimizer"]["state"].values()])
            for last in (expected, got)
        ]  # after one step they are that
        # The mean of the means of 647 and 648 images would be some 1e-4 off, rounding is 1e-6.
        assert (gradients[0] - gradients[1]).norm() <= 5e-5 * gradients[0].norm()
        (a,), (b,) = expected["history"], got["history"]
        for name in ("train_loss", "val_loss"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
        for name, images in (("train_accuracy", 1295), ("val_accuracy", 142)):
            assert b[name] == pytest.approx(a[name], abs=1.5 / images), name  # one on the edge


def test_a_run_goes_on_in_another_number_of_processes(by_two, tmp_path, capsys):
    shutil.copytree(by_two / "one-step", tmp_path / "run")
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert "epoch   2" in capsys.readouterr().out


def test_two_processes_train_a_head_as_one_does(by_two, frozen, tmp_path):
    assert main([*frozen, "--out", str(tmp_path / "one")]) == 0
    expected, got = (checkpoint.load(run / "last.ckpt")["history"] for run in (tmp_path / "one", by_two / "frozen"))
    for a, b in zip(expected, got, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-2)


def test_two_processes_fit_the_head_that_one_does_and_agree_on_it(by_two, frozen, tmp_path):
    assert main([*head_first(frozen), "--out", str(tmp_path / "one")]) == 0
    expected, got = (checkpoint.load(run / "last.ckpt") for run in (tmp_path / "one", by_two / "head-first"))
    assert [row["epoch"] for row in got["history"]] == [0, 1]
    for name in ("train_loss", "val_loss"):
        assert got["history"][0][name] == pytest.approx(expected["history"][0][name], rel=1e-2)


@pytest.mark.anywhere
def test_a_mistake_names_itself_in_one_line_of_each_process(tmp_path):
    done = torchrun("train.py", "--data", "digits", "--batch-size", "3", "--out", tmp_path / "run")
    assert done.returncode != 0
    line = "train.py: --batch-size 3: must be at least 4, 2 images for each of 2 processes × 1 --accumulate"
    assert line in done.stderr.splitlines()
    assert not (tmp_path / "run").exists()


def test_a_batch_too_small_for_its_parts(tmp_path, capsys):
    assert main(["--data", "digits", "--batch-size", "5", "--accumulate", "3", "--out", str(tmp_path / "run")]) == 2
    assert "--batch-size 5: must be at least 6" in capsys.readouterr().err


def test_more_processes_than_gpus_are_a_mistake(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match="4 processes for 2 GPUs; pass --nproc-per-node 2, or --device cpu"):
            pick_device(device)


def test_parts_cover_everything_once():
    for count in (0, 1, 5, 64, 97):
        for parts in (1, 2, 3, 8):
            cuts = [cut(count, part, parts) for part in range(parts)]
            assert [i for c in cuts for i in range(count)[c]] == list(range(count))
            lengths = [c.stop - c.start for c in cuts]
            assert max(lengths) - min(lengths) <= 1


def test_one_process_is_alone():
    assert (distributed.world(), distributed.rank()) == (1, 0)
    assert distributed.from_first(0.1, True) == distributed.largest(0.1, True) == [0.1, True]
    assert distributed.gather("x") == ["x"]
