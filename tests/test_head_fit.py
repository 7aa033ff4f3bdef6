"""The head that is fitted before the first epoch, norms that are held, and a rate for each layer."""

import csv
import itertools
import json
from contextlib import nullcontext
from signal import SIGTERM

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from dataset.loading import load
from model import registry
from predictor.spec import PixelRule
from tests.folders import make_folder
from tests.learning import Training, make_plan
from train import main
from training import head_fit
from training.head_fit import PENALTIES, regressions
from training.optimizers import make_optimizer
from training.schedule import Schedule


@pytest.fixture(scope="module")
def clouds():
    """Features of three classes that overlap: float32 (300, 8), and their labels."""
    random = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 3
    centres = torch.randn(3, 8, generator=random)
    return centres[targets] + torch.randn(300, 8, generator=random), targets


def test_each_head_is_the_logistic_regression_of_its_penalty(clouds):
    features, targets = clouds
    scale = float(features.std())
    for penalty, head in zip(PENALTIES, regressions(features, targets, 3), strict=True):
        known = LogisticRegression(C=1 / (penalty * len(targets)), tol=1e-8, max_iter=1000)
        known.fit((features / scale).numpy(), targets.numpy())
        expected = known.predict_proba((features / scale).numpy())
        got = head(features).softmax(dim=1).detach().numpy()
        np.testing.assert_allclose(got, expected, atol=0.02)


def test_a_smaller_penalty_gives_larger_weights(clouds):
    norms = [float(head.weight.detach().norm()) for head in regressions(*clouds, 3)]
    assert norms == sorted(norms)


def test_weights_of_classes_count_as_that_many_images(clouds):
    features, targets = clouds
    twice = torch.tensor([1.0, 1.0, 2.0])
    rows = torch.cat([torch.arange(300), (targets == 2).nonzero().flatten()])
    for weighted, doubled in zip(
        regressions(features, targets, 3, twice), regressions(features[rows], targets[rows], 3), strict=True
    ):
        expected = doubled(features).softmax(dim=1).detach().numpy()
        np.testing.assert_allclose(weighted(features).softmax(dim=1).detach().numpy(), expected, atol=0.02)


def test_a_head_without_a_bias_stays_without(clouds):
    heads = list(regressions(*clouds, 3, bias=False))
    assert [head.bias for head in heads] == [None] * len(PENALTIES)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("colours") / "photos", count=20)


@pytest.fixture(scope="module")
def weights(colours, tmp_path_factory):
    """A state_dict of resnet18 that has learned nothing yet."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(registry.build("resnet18", 3, 32).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def data(colours):
    return load(str(colours), rule=PixelRule.square(32))


def train(colours, weights, out, *options):
    arguments = ["--data", colours, "--arch", "resnet18", "--size", "32", "--weights", weights, "--out", out, *options]
    return main([str(argument) for argument in arguments])


def rows_of(out):
    with (out / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_fitted_head_is_kept_where_no_epoch_beats_it(colours, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("train.is_better", lambda *_: False)
    assert train(colours, weights, tmp_path / "run", "--head-first", "--hold-norms", "--epochs", "1") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train"]["best_epoch"] == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["0", "1"]
    assert float(rows_of(tmp_path / "run")[0]["val_accuracy"]) == pytest.approx(metrics["val"]["accuracy"])
    kept, given = (torch.load(file, weights_only=True) for file in (tmp_path / "run" / "model.pt", weights))
    assert all(torch.equal(kept[name], given[name]) for name in given if not name.startswith("fc."))
    assert not torch.equal(kept["fc.weight"], given["fc.weight"])


def test_the_head_is_a_result_where_there_is_no_time_for_more(colours, weights, tmp_path):
    options = ("--head-first", "--hold-norms", "--minutes", "0.0001")
    assert train(colours, weights, tmp_path / "run", *options) == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["0"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["epochs"] == 0
    assert main(["--resume", str(tmp_path / "run"), "--minutes", "0.01"]) == 0


def test_a_resumed_run_does_not_fit_the_head_again(colours, weights, tmp_path, monkeypatch):
    options = ("--head-first", "--hold-norms")
    assert train(colours, weights, tmp_path / "run", *options, "--epochs", "1") == 0
    monkeypatch.setattr("train.fit_head", lambda *_: pytest.fail("fitted again"))
    assert main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["0", "1", "2"]


def test_a_run_without_a_fitted_head_gets_none_within_its_first_epoch(colours, weights, tmp_path, monkeypatch):
    """There was no memory for the features at first, and there is when the run goes on: the epoch has begun."""
    monkeypatch.setattr(head_fit, "compute_features", lambda *_, **__: "they would take 9 GB")
    looks = itertools.count()
    monkeypatch.setattr("train.interruptible", lambda _: nullcontext(lambda: SIGTERM if next(looks) >= 2 else 0))
    options = ("--head-first", "--hold-norms", "--batch-size", "8", "--epochs", "1")
    assert train(colours, weights, tmp_path / "run", *options) == 128 + SIGTERM
    monkeypatch.undo()
    monkeypatch.setattr("train.fit_head", lambda *_: pytest.fail("fitted within an epoch"))
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["1"]


def test_the_time_that_the_head_takes_is_no_part_of_the_warmup():
    plan = make_plan(minutes=2.0, warmup=0.5, schedule="constant", lr=1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule(optimizer, plan, lambda: 0)
    schedule.head_seconds = 60.0
    for seconds, rate in ((60, 1e-3), (75, 0.5), (90, 1.0), (119, 1.0)):
        schedule.go_on_from(seconds)
        assert schedule.before_step(0, 0.0)
        assert schedule.lr == pytest.approx(rate, abs=0.02)


def test_a_network_whose_features_cannot_be_kept_begins_with_its_own_head(
    colours, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(head_fit, "compute_features", lambda *_, **__: "they would take 9 GB")
    assert train(colours, weights, tmp_path / "run", "--head-first", "--epochs", "1") == 0
    assert "no head is fitted before the first epoch: they would take 9 GB" in capsys.readouterr().out
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["1"]


@pytest.mark.parametrize("option", ["--head-first", "--hold-norms"])
def test_without_trained_weights_there_is_nothing_to_keep(option, colours, tmp_path, capsys):
    assert main(["--data", str(colours), "--arch", "resnet18", option, "--out", str(tmp_path / "run")]) == 2
    assert f"{option}: without trained weights" in capsys.readouterr().err


def test_held_norms_keep_the_statistics_of_the_weights_and_learn_the_rest(data):
    for hold in (True, False):
        training = Training(data, arch="resnet18", size=32, hold_norms=hold)
        before = {name: value.clone() for name, value in training.network.state_dict().items()}
        training.epoch()
        changed = {
            name for name, value in training.network.state_dict().items() if not torch.equal(value, before[name])
        }
        assert ("bn1.running_mean" in changed) == (not hold)
        assert {"bn1.weight", "conv1.weight"} <= changed


def test_the_first_layers_keep_their_weights_and_the_others_learn(data):
    training = Training(data, arch="resnet18", size=32, freeze_first=0.5)
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    training.epoch()
    changed = {name for name, value in training.network.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if name.startswith(("conv1", "bn1", "layer1"))]  # statistics included
    assert {"layer3.0.conv1.weight", "layer4.1.conv2.weight", "fc.weight"} <= changed


def test_layers_are_counted_by_block_and_the_head_is_the_last():
    numbers = registry.layer_numbers(registry.build("resnet18", 3, 32))
    assert numbers["conv1.weight"] == 0
    assert numbers["layer1.0.conv1.weight"] == numbers["layer1.1.bn2.bias"] < numbers["layer2.0.conv1.weight"]
    assert numbers["fc.weight"] == numbers["fc.bias"] == max(numbers.values())
    assert sorted(set(numbers.values())) == list(range(max(numbers.values()) + 1))


def test_a_block_whose_name_ends_in_a_letter_is_one_layer():
    numbers = registry.layer_numbers(registry.build("googlenet", 3, 64))
    blocks = {name.partition(".")[0] for name in numbers}
    assert len(blocks) == len(set(numbers.values())) == 3 + 9 + 1  # convolutions, inception3a to 5b, fc
    assert all(len({n for name, n in numbers.items() if name.startswith(f"{block}.")}) == 1 for block in blocks)


def test_each_layer_has_a_rate_between_the_first_ones_and_the_heads(data):
    training = Training(data, arch="resnet18", size=32, optimizer="adamw", lr=1e-2, layer_decay=0.01)
    network = training.network
    rates = {
        id(p): group["lr"] for group in make_optimizer(network, training.plan).param_groups for p in group["params"]
    }
    assert len(rates) == len(list(network.parameters()))
    assert rates[id(network.fc.weight)] == pytest.approx(1e-2)
    assert rates[id(network.conv1.weight)] == pytest.approx(1e-4)
    in_order = [rates[id(layer[0].conv1.weight)] for layer in (network.layer1, network.layer2, network.layer3)]
    assert in_order == sorted(in_order)
    decays = {
        id(p): g["weight_decay"] for g in make_optimizer(network, training.plan).param_groups for p in g["params"]
    }
    assert all((decays[id(p)] > 0) == (p.ndim > 1) for p in nn.Module.parameters(network))
