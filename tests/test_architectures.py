import pytest
import torch

from model import checkpoint, registry

SMALL = [
    "simplecnn",
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "mnasnet0_5",
    "regnet_x_400mf",
]


def test_every_torchvision_classifier_is_there_by_its_own_name():
    import torchvision

    assert set(torchvision.models.list_models(module=torchvision.models)) < set(registry.names())
    assert {"simplecnn", "resnet18", "vgg16", "densenet121", "mobilenet_v3_small", "vit_b_16"} <= set(registry.names())


LABELS = 1013  # as no other layer has of anything


@pytest.mark.parametrize("arch", [name for name in registry.names() if not name.startswith("regnet")])
def test_every_architecture_gets_a_head_for_the_labels(arch):
    """On the meta device, without memory: regnets cannot be built there, two of them are among SMALL."""
    size = registry.preset(arch).size
    with torch.device("meta"):
        network = registry._build(arch, LABELS, size).eval()
        assert network(torch.empty(2, 3, size, size)).shape == (2, LABELS)
    assert set(registry.head_names(network)) == {
        name for name, value in network.named_parameters() if LABELS in value.shape
    }


@pytest.mark.parametrize("arch", SMALL)
def test_every_parameter_gets_a_gradient_and_nothing_is_nan(arch):
    torch.manual_seed(0)
    network = registry.build(arch, 5, 64)
    logits = network(torch.randn(4, 3, 64, 64))
    assert logits.shape == (4, 5)
    logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("arch", "size", "words"),
    [
        ("resnet19", 32, "did you mean resnet18"),
        ("alexnet", 32, "--size 224 is its own"),
        ("inception_v3", 32, "--size 299 is its own"),
        ("simplecnn", 12, "at least 16 px"),
        ("vit_b_16", 33, "--size 224"),
    ],
)
def test_an_impossible_choice_is_named_with_the_way_out(arch, size, words):
    with pytest.raises(ValueError, match=words) as caught:
        registry.build(arch, 3, size)
    assert "\n" not in str(caught.value)


def test_freezing_leaves_the_head_and_keeps_the_statistics_of_the_backbone():
    network = registry.build("resnet18", 3, 64)
    registry.freeze_backbone(network)
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trainable == ["fc.weight", "fc.bias"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    registry.train_mode(network)
    network(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_without_freezing_the_statistics_move():
    network = registry.build("resnet18", 3, 64)
    before = network.state_dict()["bn1.running_mean"].clone()
    registry.train_mode(network)
    network(torch.randn(4, 3, 64, 64))
    assert not torch.equal(network.state_dict()["bn1.running_mean"], before)


def pretrained(weights):
    return registry.read_pretrained("resnet18", weights)


def test_local_weights_fill_all_but_the_head(tmp_path):
    trained = registry.build("resnet18", 10, 64)
    checkpoint.save(trained.state_dict(), tmp_path / "weights.pt")
    network = registry.build("resnet18", 3, 64)
    left = registry.load_pretrained(network, "resnet18", pretrained(tmp_path / "weights.pt"))
    assert left == ["fc.weight", "fc.bias"]
    assert torch.equal(network.state_dict()["conv1.weight"], trained.state_dict()["conv1.weight"])


def test_weights_of_another_architecture_are_refused(tmp_path):
    checkpoint.save(registry.build("simplecnn", 10, 32).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not weights of resnet18"):
        registry.load_pretrained(registry.build("resnet18", 3, 64), "resnet18", pretrained(tmp_path / "weights.pt"))


def test_published_weights_that_cannot_be_had_are_said_with_the_way_out(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match="--weights FILE"):
        registry.read_pretrained("resnet18")
    with pytest.raises(ValueError, match="no published weights"):
        registry.read_pretrained("simplecnn")
