"""A frozen backbone: what its head sees is computed once, and the backbone can learn later."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import resume as kills
from dataset.loading import load
from model import checkpoint, registry
from predictor.spec import PixelRule
from tests.folders import make_folder
from tests.learning import Training, first
from train import main
from training import console, freezing, run_folder
from training.freezing import compute_features, headless
from training.learner import Features
from training.optimizers import BACKBONE_RATE
from training.selection import Best, is_better

SCALE = torch.full((3,), 0.5), torch.full((3,), 0.25)


@pytest.fixture(scope="module")
def digits():
    data = load("digits", rule=PixelRule.square(32), val_fraction=0.5)
    return replace(data, train=first(data.train, 360), val=first(data.val, 180))


def make(data, arch="fastnet_small", **options):
    defaults = {"crop_padding": 0, "batch_size": 64, "optimizer": "sgd", "flip": True, "freeze": True}
    return Training(data, arch=arch, **defaults | options)


def tensors(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def close(got, expected):
    """Equal but for rounding: the tolerance of export/proof/parity.py."""
    return (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def changed(network, before):
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "ema": 0.9, "label_smoothing": 0.1}], ids=str)
def test_a_head_learns_from_features_what_it_learns_from_images(digits, options):
    """The same order and the same mirror images, so the same steps; only the backbone runs once instead of thrice."""
    cached, anew = make(digits, **options), make(digits, cache_features=False, **options)
    start = tensors(cached.network)
    for _ in range(3):
        rows = [training.epoch() for training in (cached, anew)]
        assert rows[0].loss == pytest.approx(rows[1].loss, rel=1e-3)
        assert rows[0].accuracy == pytest.approx(rows[1].accuracy, abs=2.5 / len(digits.train))  # some on the edge
        assert rows[0].steps == rows[1].steps
    assert isinstance(cached.learner.features, Features)
    assert anew.learner.features is None
    assert changed(cached.network, start) == {"classifier.weight"}
    assert close(cached.network.classifier.weight, anew.network.classifier.weight)
    assert close(cached.evaluate(), anew.evaluate())


def test_the_backbone_sees_each_image_once(digits):
    training, seen = make(digits), []
    training.network.stem.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for _ in range(3):
        training.epoch()
        training.evaluate()
    assert sum(seen) == 2 * len(digits.train) + len(digits.val) + 2 * 2  # twice two images for a look at the layers


@pytest.mark.parametrize("flip", [False, True])
def test_features_are_those_of_the_images(digits, flip):
    network = registry.build("simplecnn", 10, 32)
    found = compute_features(network, digits, SCALE, flip)
    assert (found.train.shape, found.val.shape) == ((1 + flip, len(digits.train), 84), (len(digits.val), 84))
    crops = digits.train.crops(torch.tensor([3, 300])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for view, images in zip(found.train, (crops, crops.flip(3)), strict=False):
            logits = network((images - 0.5) / 0.25)
            assert close(network.classifier[-1](view[[3, 300]]), logits)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "vit_b_16", "densenet121", "googlenet", "swin_t"])
def test_the_last_layer_of_torchvisions_networks_is_the_head(arch):
    network = registry.build(arch, 10, 64 if arch == "googlenet" else 32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = network(images)
        with headless(network):
            seen = network(images)
        assert close(network.get_submodule(registry.head_name(network))(seen), logits)


def test_a_network_whose_head_is_no_linear_layer_trains_all_the_same(digits, caplog):
    caplog.set_level("INFO", "training")
    training = make(digits, "squeezenet1_0")
    training.data = replace(digits, train=first(digits.train, 130))
    start = tensors(training.network)
    training.epoch()
    assert training.learner.features is None
    assert "sees all images in each epoch: its head is more than a linear layer" in caplog.text
    assert changed(training.network, start) == {"classifier.1.weight", "classifier.1.bias"}


def test_features_that_do_not_fit_are_not_kept(digits, monkeypatch, caplog):
    caplog.set_level("INFO", "training")
    monkeypatch.setattr(freezing, "free_memory", lambda processes: 100_000)
    training = make(digits)
    training.epoch()
    assert training.learner.features is None
    assert "they would take 0.0 GB, over half of the free memory" in caplog.text


def test_the_first_process_decides_for_all_whether_features_fit(digits, monkeypatch):
    """Each would wait for ever for the others, if some computed features and some did not."""
    monkeypatch.setattr(freezing.distributed, "from_first", lambda *_: [100_000.0])  # another machine's
    assert compute_features(make(digits).network, digits, SCALE, True).startswith("they would take")


def test_the_backbone_learns_from_the_epoch_on_that_was_named(digits, caplog):
    caplog.set_level("INFO", "training")
    training = make(digits, unfreeze_at=2, crop_padding=4, momentum=0.0, weight_decay=0.0)
    start = tensors(training.network)
    for epoch in range(3):
        training.epoch()
        assert bool(training.learner.features) == (epoch < 2)
        assert ("blocks.1.conv2.weight" in changed(training.network, start)) == (epoch == 2)
        assert ("blocks.1.norm2.running_mean" in changed(training.network, start)) == (epoch == 2)
    assert changed(training.network, start) == set(start)
    rates = {group["lr"] for group in training.learner.optimizer.param_groups}
    assert max(rates) == pytest.approx(min(rates) / BACKBONE_RATE)
    assert "the backbone learns too from here, at 0.1 times the learning rate" in caplog.text


def random_weights(path):
    torch.manual_seed(0)
    checkpoint.save(registry.build("fastnet_small", 10, 32).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def thawing(tmp_path_factory):
    """TrainOptions of a run whose backbone learns from its second half on."""
    folder, weights = make_folder(tmp_path_factory.mktemp("colours"), count=40), tmp_path_factory.mktemp("weights")
    given = ["--weights", random_weights(weights / "model.pt")]
    return ["--data", str(folder), "--arch", "fastnet_small", *given, "--freeze", "--unfreeze-at", "2", "--epochs", "4"]


@pytest.fixture(scope="module")
def thawed(thawing, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "thawed"
    assert main([*thawing, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_that_ends_before_or_after_the_thaw_goes_on_with_the_same_bits(
    thawing, thawed, tmp_path, monkeypatch, epoch
):
    real = run_folder.write_history

    def killed(history, out):
        real(history, out)
        if len(history) == epoch:
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run_folder, "write_history", killed)
        main([*thawing, "--out", str(tmp_path / "killed")])
    assert main(["--resume", str(tmp_path / "killed")]) == 0
    assert kills.differences(thawed, tmp_path / "killed") == []


@pytest.mark.parametrize(
    ("options", "total"), [(["--freeze", "--flip"], 2 * 1293 + 144), (["--head-first"], 1293 + 144)], ids=str
)
def test_the_features_say_how_far_they_are(tmp_path, capsys, monkeypatch, options, total):
    """They may take minutes, before the first epoch says anything."""
    monkeypatch.setattr(console, "SECONDS_A_LINE", 0)
    weights = ["--arch", "fastnet_small", "--weights", random_weights(tmp_path / "model.pt")]
    assert main(["--data", "digits", *weights, *options, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said[: said.index("\nepoch ")].splitlines() if line.startswith("features: ")]
    form = rf"features: ([\d,]+) of {total:,} images, [\d,.]+ images/s, \d\d:\d\d left"
    seen = [int(re.fullmatch(form, line)[1].replace(",", "")) for line in lines]
    assert len(seen) > 3
    assert seen == sorted(set(seen))
    assert seen[-1] == total


def test_transfer_from_a_run_of_other_classes(tmp_path, capsys):
    """The command of the README, with weights of ours: a head for other classes, trained on few images."""
    data = ["--data", "digits", "--arch", "fastnet_small", "--val-fraction", "0.5"]
    assert main([*data, "--epochs", "2", "--out", str(tmp_path / "digits")]) == 0
    weights = tmp_path / "digits" / "model.pt"
    folder = make_folder(tmp_path / "colours", count=100)
    capsys.readouterr()
    options = ["--arch", "fastnet_small", "--weights", str(weights), "--freeze", "--lr", "0.1", "--epochs", "40"]
    assert main(["--data", str(folder), *options, "--out", str(tmp_path / "colours-run")]) == 0
    said = capsys.readouterr().out
    assert "features of the images and mirror images computed in" in said
    assert "shift 0 px" in said
    before, after = checkpoint.load_state_dict(weights), checkpoint.load_state_dict(tmp_path / "colours-run/model.pt")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"classifier.weight"}
    metrics = json.loads((tmp_path / "colours-run" / "metrics.json").read_text())
    assert metrics["test"]["images"] >= 20  # about a tenth of 300
    assert metrics["test"]["accuracy"] > 0.5  # of three classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze", "--jitter", "0.1"], "--jitter 0.1: --freeze computes the features of each image once"),
        (["--freeze", "--rotate", "10"], "--rotate 10.0: --freeze computes the features of each image once"),
        (["--freeze", "--trivial"], "--trivial: --freeze computes the features of each image once"),
        (["--freeze", "--erase", "0.2"], "--erase 0.2: --freeze computes the features of each image once"),
        (["--freeze", "--crop-padding", "2"], "or pass --no-cache-features, which is slower"),
        (["--unfreeze-at", "3"], "--unfreeze-at 3: there is nothing to end without --freeze; pass both"),
        (["--freeze", "--unfreeze-at", "3", "--optimizer", "muon"], "pass --optimizer sgd or adamw"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other(arguments, message, tmp_path, capsys):
    assert main(["--data", "digits", "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_augmentation_with_a_frozen_backbone_is_possible(digits):
    training = make(digits, "simplecnn", cache_features=False, jitter=0.2, crop_padding=4, mixup=0.2)
    start = tensors(training.network)
    training.epoch()
    assert changed(training.network, start) == {"classifier.4.weight", "classifier.4.bias"}
    assert isinstance(training.network.features, nn.Sequential)  # the network's own


@pytest.mark.parametrize(
    ("accuracy", "loss", "better"), [(0.9, 9.0, True), (0.8, 0.4, True), (0.8, 0.5, False), (0.7, 0.1, False)]
)
def test_of_two_epochs_that_are_equally_right_the_surer_one_is_kept(accuracy, loss, better):
    """On the few images that transfer learning validates on they often are."""
    best = Best(1, 0.8, 0.5)
    assert is_better({"accuracy": accuracy, "loss": loss, "macro": {"f1": 0.0}}, best, "accuracy") == better
