"""Trained weights to start from: torchvision's, in files shaped as they are published, and those of other runs."""

import contextlib
import copy
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.regnet import BlockParams

from model import checkpoint, registry
from predictor.spec import ModelSpec, PixelRule
from tests.folders import make_folder
from train import main
from training.options import TrainOptions, make_options
from training.resolve import resolve_reading
from training.start import read_weights

PUBLISHED = [name for name in registry.names() if name not in registry.OWN]


def as_published(arch: str, network: nn.Module) -> OrderedDict[str, torch.Tensor]:
    """A state_dict as torchvision's older files are: for ImageNet's 1,000 classes, without the counters of BatchNorm,
    with the old names of densenet's layers.

    Args:
        network: ours, for some other number of classes.
    """
    state, old = network.state_dict(), r"(denselayer\d+\.(?:norm|conv))([12]\.)"
    named = {re.sub(old, r"\1.\2", name): value for name, value in state.items() if "num_batches_tracked" not in name}
    named |= {name: torch.rand(1000, *named[name].shape[1:]) for name in registry.head_names(network)}
    if arch in ("googlenet", "inception_v3"):  # they have more heads, which only ImageNet training has
        whole = torchvision.models.get_model(arch, aux_logits=True, init_weights=False).state_dict()
        named |= {n: value for n, value in whole.items() if n not in named and "num_batches_tracked" not in n}
    file = OrderedDict(named)
    file._metadata = OrderedDict({"": state._metadata[""]})  # where MNASNet's layout has its version
    return file


@contextlib.contextmanager
def without_memory(monkeypatch):
    """Networks are built on the meta device; regnets compute their widths with tensors, which must have values."""
    real = BlockParams.from_init_params.__func__

    def on_the_cpu(cls, *arguments, **options):
        with torch.device("cpu"):
            return real(cls, *arguments, **options)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_the_cpu))
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("arch", PUBLISHED)
def test_published_weights_fit_every_architecture_that_has_some(arch, monkeypatch, tmp_path):
    """By names and shapes, from torchvision itself and from its file."""
    size = registry.preset(arch).size
    with without_memory(monkeypatch):
        network = registry._build(arch, 1013, size)
        file = as_published(arch, network)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: copy.copy(file))
        head = registry.head_names(network)
        assert registry.load_pretrained(network, arch, registry.read_pretrained(arch)) == head
        monkeypatch.setattr(registry, "load_state_dict", lambda _: file)
        given = registry.read_pretrained(arch, tmp_path / "file.pth")
        assert registry.load_pretrained(network, arch, given) == head


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder where torchvision looks for files before it downloads them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def publish(arch, cache):
    torch.manual_seed(1)
    file = as_published(arch, registry.build(arch, 3, 224))
    path = cache / torchvision.models.get_model_weights(arch).DEFAULT.url.rsplit("/", 1)[1]
    torch.save(file, path)
    return file, path


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "mnasnet0_5", "squeezenet1_1"])
def test_published_files_give_the_network_their_values(arch, cache):
    file, path = publish(arch, cache)
    for given in (registry.read_pretrained(arch), registry.read_pretrained(arch, path)):
        torch.manual_seed(2)
        network = registry.build(arch, 5, 224)
        left = registry.load_pretrained(network, arch, given)
        state = network.state_dict()
        assert left == registry.head_names(network)
        same = [n for n, value in given.state.items() if n in state and n not in left and torch.equal(state[n], value)]
        assert len(same) >= len(file) - len(left)


def test_the_command_for_own_images_works_with_a_published_file(cache, tmp_path, capsys):
    publish("resnet18", cache)
    folder = make_folder(tmp_path / "colours", count=12)
    command = ["--data", str(folder), "--arch", "resnet18", "--pretrained", "--freeze", "--epochs", "2", "--size", "32"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert "weights: torchvision's weights; from scratch: fc.weight, fc.bias" in capsys.readouterr().out


def test_a_damaged_file_of_published_weights_is_one_line(cache, tmp_path, capsys):
    path = publish("squeezenet1_1", cache)[1]
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["--data", "digits", "--arch", "squeezenet1_1", "--pretrained", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"--pretrained: {path}: damaged (" in error
    assert "delete it and try again" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("options", [["--pretrained"], ["--weights", "none.pt"], ["--weights", "other.pt"]], ids=str)
def test_weights_that_cannot_be_had_are_said_before_an_image_is_read(options, cache, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("no network")

    def reads(*_, **__):
        raise AssertionError("the data was read first")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setattr("training.start.load", reads)
    monkeypatch.chdir(tmp_path)
    checkpoint.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    assert main(["--data", "digits", "--arch", "resnet18", "--size", "32", *options, "--out", "run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_head_alone_does_not_learn_from_random_features(tmp_path, capsys):
    assert main(["--data", "digits", "--freeze", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "random features; pass --pretrained or --weights FILE, or leave --freeze out" in error
    assert error.count("\n") == 1


def test_weights_bring_the_mean_and_std_of_the_spec_beside_them(tmp_path):
    """Googlenet's published weights want 0.5, those that were trained here from scratch ImageNet's."""
    state = registry.build("googlenet", 10, 64).state_dict()
    checkpoint.save(state, tmp_path / "model.pt")
    assert registry.read_pretrained("googlenet", tmp_path / "model.pt").mean == (0.5, 0.5, 0.5)
    spec = {"arch": "googlenet", "labels": ("a", "b"), "height": 64, "width": 64, "resize": 64}
    spec |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    ModelSpec(**spec, weights_sha256=registry.sha256(tmp_path / "model.pt")).save(tmp_path / "spec.json")
    found = registry.read_pretrained("googlenet", tmp_path / "model.pt")
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ModelSpec(**spec, weights_sha256="0" * 64).save(tmp_path / "spec.json")  # of other weights
    assert registry.read_pretrained("googlenet", tmp_path / "model.pt").mean == (0.5, 0.5, 0.5)


RULE = PixelRule(height=48, width=48, resize=48, interpolation="lanczos", fit="pad", fill=(9, 8, 7), colour="as-stored")


def trained_here(folder, rule=RULE, arch="simplecnn"):
    """Weights with the spec that a training here writes."""
    checkpoint.save(registry.build(arch, 3, rule.height).state_dict(), folder / "model.pt")
    spec = {"arch": arch, "labels": ("a", "b", "c"), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), **vars(rule)}
    ModelSpec(**spec, weights_sha256=registry.sha256(folder / "model.pt")).save(folder / "spec.json")
    return str(folder / "model.pt")


def test_weights_bring_the_pixel_rule_of_the_spec_beside_them(tmp_path):
    """The whole of it, up to the new run's spec, of a network that depends on the size."""
    weights, folder = trained_here(tmp_path), make_folder(tmp_path / "colours", count=12)
    command = ["--data", str(folder), "--arch", "simplecnn", "--weights", weights, "--epochs", "1"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    spec = ModelSpec.load(tmp_path / "run")
    assert (spec.rule, spec.mean, spec.std) == (RULE, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    again = make_options(str(tmp_path / "run" / "config.yaml"), {"weights": None, "out": "other"})
    reading = resolve_reading(again)  # what was taken from the weights is recorded
    assert (reading.rule, reading.mean, reading.std) == (RULE, spec.mean, spec.std)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": 64}, {"height": 64, "width": 64, "resize": 72}),
        ({"resize": 60}, {"resize": 60}),
        ({"fit": "pad"}, {"fit": "pad", "resize": 48}),
        ({"fit": "pad", "fill": "1,2,3"}, {"fit": "pad", "resize": 48, "fill": (1, 2, 3)}),
        ({"interpolation": "bilinear"}, {"interpolation": "bilinear"}),
        ({"colour": "srgb"}, {"colour": "srgb"}),
    ],
    ids=str,
)
def test_options_stand_above_the_rule_of_the_weights(given, expected, tmp_path):
    rule = replace(RULE, fit="crop", resize=54)
    options = TrainOptions(
        data="digits", out="x", arch="resnet18", weights=trained_here(tmp_path, rule, "resnet18"), **given
    )
    assert resolve_reading(options, read_weights(options)).rule == replace(rule, **expected)


@pytest.mark.parametrize("recipe", ["photos", "quick"])
def test_a_recipes_size_stands_below_that_of_weights_that_were_trained_here(recipe, tmp_path):
    weights = trained_here(tmp_path, arch="fastnet_small")
    options = make_options(None, {"data": "digits", "out": "x", "weights": weights}, recipe)
    assert resolve_reading(options, read_weights(options)).rule == RULE


@pytest.mark.parametrize("recipe", [None, "photos"])
def test_weights_of_oblong_images_bring_that_shape(recipe, tmp_path):
    rule = replace(RULE, width=64)
    weights = trained_here(tmp_path, rule, "fastnet_small")
    options = make_options(None, {"data": "digits", "out": "x", "arch": "fastnet_small", "weights": weights}, recipe)
    assert resolve_reading(options, read_weights(options)).rule == rule


def test_a_run_keeps_the_mean_and_std_of_the_weights_that_it_began_with(run, tmp_path):
    weights = tmp_path / "first" / "model.pt"
    weights.parent.mkdir()
    weights.write_bytes((run / "model.pt").read_bytes())
    values = ModelSpec.load(run)
    changed = ModelSpec(**{**values.__dict__, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    changed.save(weights.parent / "spec.json")
    assert main(["--data", "digits", "--epochs", "1", "--weights", str(weights), "--out", str(tmp_path / "run")]) == 0
    assert ModelSpec.load(tmp_path / "run").mean == (0.1, 0.2, 0.3)


def test_a_network_whose_layout_has_a_version_is_restored_from_plain_tensors(tmp_path):
    """MNASNet refuses a plain dict, which training keeps its best weights as."""
    first, second = (registry.build("mnasnet0_5", 3, 32) for _ in range(2))
    checkpoint.save(first.state_dict(), tmp_path / "model.pt")
    checkpoint.load_into(second, checkpoint.load_state_dict(tmp_path / "model.pt"))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
