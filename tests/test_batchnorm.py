"""BatchNorm's statistics where their running averages are too slow for a run."""

import pytest
import torch
from torch import nn

from dataset.loading import load
from model import registry
from model.tensor_preprocessing import normalise
from predictor.spec import PixelRule
from tests.learning import Training
from train import learn
from training import batchnorm
from training.batchnorm import estimate_statistics, slow_norms
from training.metrics import one_label_for_all, score

SCALE = torch.full((3,), 0.5), torch.full((3,), 0.25)


@pytest.fixture(scope="module")
def digits():
    return load("digits", rule=PixelRule.square(32))


class Slow(nn.Module):
    def __init__(self, momentum=0.01):
        super().__init__()
        layers = (nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(), nn.Dropout(0.5))
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 8 * 8, 10))

    def forward(self, images):
        return self.layers(images)


def make(data, network, **options):
    return Training(data, network, crop_padding=4, batch_size=128, **options)


@pytest.mark.parametrize(
    ("arch", "slow"),
    [
        ("mobilenet_v3_small", True),
        ("mnasnet0_5", True),
        ("efficientnet_b5", True),
        ("efficientnet_b0", False),
        ("resnet18", False),
        ("fastnet_small", False),
        ("simplecnn", False),
    ],
)
def test_only_networks_with_a_small_momentum_are_touched(arch, slow):
    with torch.device("meta"):
        network = registry._build(arch, 3, 64)
    assert bool(slow_norms(network)) == slow
    registry.freeze_backbone(network)
    assert slow_norms(network) == []  # frozen layers keep their statistics


def test_the_statistics_are_those_of_the_training_images(digits):
    network = Slow()
    estimate_statistics(network, slow_norms(network), digits.train, SCALE, batch=64)
    chosen = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))[: batchnorm.IMAGES]
    with torch.no_grad():
        seen = network.layers[0](normalise(digits.train.crops(chosen), *SCALE))
    norm = network.layers[1]
    assert torch.allclose(norm.running_mean, seen.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert torch.allclose(norm.running_var, seen.var(dim=(0, 2, 3)), rtol=0.1)  # the mean of the batches' variances
    assert (norm.momentum, norm.training) == (0.01, False)


def test_the_same_weights_give_the_same_statistics_and_no_random_number_is_drawn(digits):
    network = Slow()
    found = []
    for _ in range(2):
        before = torch.get_rng_state()
        estimate_statistics(network, ["layers.1"], digits.train, SCALE, batch=100)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(network.layers[1].running_var.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}], ids=str)
def test_a_network_is_evaluated_with_statistics_that_belong_to_its_weights(digits, options):
    """Their distance from those of all training images, before and after."""
    torch.manual_seed(0)
    training = make(digits, Slow(), **options)
    training.epoch()
    norm = training.learner.averaged.layers[1]
    with torch.no_grad():
        seen = training.learner.averaged.layers[0](normalise(digits.train.crops(slice(None)), *SCALE))
    lag = (norm.running_var - seen.var(dim=(0, 2, 3))).abs().sum()
    training.evaluate()
    assert (norm.running_var - seen.var(dim=(0, 2, 3))).abs().sum() < lag / 5


def test_a_network_that_is_quick_enough_keeps_its_statistics(digits):
    training = make(digits, Slow(momentum=0.1))
    training.epoch()
    before = training.network.layers[1].running_var.clone()
    training.evaluate()
    assert torch.equal(training.network.layers[1].running_var, before)


def test_a_bounded_number_of_images_is_looked_at(digits, monkeypatch):
    monkeypatch.setattr(batchnorm, "IMAGES", 100)
    network, seen = Slow(), []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    estimate_statistics(network, ["layers.1"], digits.train, SCALE, batch=33)
    assert seen == [33, 33, 33]  # a last image alone may have no variance


def test_a_network_that_gives_one_label_to_all_is_named(digits):
    targets = torch.tensor([0] * 40 + [1] * 60)
    stuck = torch.tensor([[0.0, 1.0]]).repeat(100, 1)
    assert one_label_for_all(score(stuck, targets, ["a", "b"])) == "b"
    assert one_label_for_all(score(stuck, torch.ones(100, dtype=torch.int64), ["a", "b"])) == ""  # as it is
    assert one_label_for_all(score(torch.eye(2)[targets], targets, ["a", "b"])) == ""


def test_a_run_says_that_its_network_gives_one_label_to_all(digits, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "training")
    training = make(digits, Slow(), epochs=2)
    monkeypatch.setattr("train.evaluate_val", lambda *_: torch.eye(10)[[3]].repeat(len(digits.val), 1))
    learn(training.learner, digits, training.plan, training.schedule, training.progress, tmp_path)
    assert len(training.progress.history) == 2
    assert caplog.text.count("the network gives '3' to nearly all val images") == 1
