import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from export import onnx as onnx_files
from export import parity, pictures, programs, torchscript
from export.__main__ import export_run, main
from export.runtimes import INSTALLED
from model import Classifier, architectures, checkpoint, load_run
from model.files import sha256
from model.pictures import crop
from model.spec import ModelSpec
from tests.conftest import PROJECT, label_of
from tests.kinds import gradient, save


@pytest.fixture(scope="module")
def spec(run):
    return ModelSpec.load(run)


def test_the_export_folder_holds_what_the_contract_names(exported):
    assert {path.name for path in exported.iterdir()} == {
        "digits.pt", "digits.onnx", "digits.crops.onnx", "digits.pixels.onnx", "digits.pt2", "digits.crops.pt2",
        "digits.pixels.pt2", "digits.mar", "parity.json", "index_to_name.json", "MODEL_CARD.md", "SHA256SUMS",
        "golden.json", "model-config.yaml",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "inputs", "outputs"),
    [
        ("digits.onnx", ("input", 1, ["batch", 3, 32, 32]), ("logits", ["batch", 10])),
        ("digits.crops.onnx", ("images", 2, ["batch", 32, 32, 3]), ("probabilities", ["batch", 10])),
        ("digits.pixels.onnx", ("images", 2, ["batch", "height", "width", 3]), ("probabilities", ["batch", 10])),
    ],
)
def test_each_onnx_file_has_the_contracts_names_types_and_open_dimensions(exported, spec, file, inputs, outputs):
    model = onnx.load(exported / file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    (entry,), (result,) = model.graph.input, model.graph.output
    shape = [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
    assert (entry.name, entry.type.tensor_type.elem_type, shape) == inputs
    assert (result.name, [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim]) == outputs
    assert result.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert onnx_files.read_spec(exported / file) == spec
    assert str(PROJECT).encode() not in (exported / file).read_bytes()  # no stack traces of this machine
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_no_onnx_file_relies_on_the_runtimes_own_resize(exported):
    for path in exported.glob("*.onnx"):
        assert "Resize" not in {node.op_type for node in onnx.load(path).graph.node}


def test_the_torchscript_file_holds_the_three_graphs_and_the_spec(exported, spec):
    module, found = torchscript.load(exported / "digits.pt")
    assert found == spec
    planes = torch.randn(3, 3, 32, 32)
    crops = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert module.network(planes).shape == module.classify_crops(crops).shape == (3, 10)
    assert module(torch.randint(0, 256, (2, 47, 91, 3), dtype=torch.uint8)).sum().item() == pytest.approx(2)


@pytest.mark.parametrize("file", ["digits.pt2", "digits.crops.pt2", "digits.pixels.pt2"])
def test_each_torch_export_file_holds_its_graph_and_the_spec(exported, spec, file):
    module, found = programs.load(exported / file)
    assert found == spec
    if file == "digits.pt2":
        assert module(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    else:
        size = (32, 32) if "crops" in file else (47, 91)
        pixels = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8)
        assert module(pixels).sum().item() == pytest.approx(3)
    assert str(PROJECT).encode() not in (exported / file).read_bytes()  # no stack traces of this machine


def test_a_foreign_program_needs_the_onnx_file_alone(exported, run, spec):
    """As one would use it without PyTorch: labels from the metadata, any picture, any size."""
    session = onnxruntime.InferenceSession(exported / "digits.pixels.onnx", providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["spec"])
    picture = Image.open(run / "samples" / "7-0.png").convert("RGB").resize((61, 55))
    (probabilities,) = session.run(["probabilities"], {"images": np.asarray(picture)[None]})
    assert card["labels"][probabilities[0].argmax()] == label_of(run, save(picture, "PNG"))


def test_the_parity_report_has_a_passing_row_for_every_runtime_and_graph(exported):
    rows = json.loads((exported / "parity.json").read_text())["rows"]
    assert {(row["graph"], row["runtime"]) for row in rows} == {
        *((graph, runtime) for graph in ("network", "crops", "pixels") for runtime in INSTALLED),
        ("pixels", "Pillow + crops"),
        ("resize", "Pillow"),
    }
    assert all(row["passed"] and row["pictures"] >= 64 for row in rows)
    assert next(row for row in rows if row["graph"] == "resize")["max_difference"] == 0


@pytest.mark.parametrize("changed", ["network", "crops", "pixels", "script"])
def test_one_changed_weight_in_any_artifact_fails_parity(exported, run, spec, tmp_path, changed):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    _, network = load_run(run)
    classifier = Classifier(network, spec).eval()
    if changed == "script":
        _, other = load_run(run)
        with torch.no_grad():
            next(other.parameters())[0, 0, 0, 0] += 1
        torchscript.save(Classifier(other, spec).eval(), spec, folder / "digits.pt")
    else:
        path = (
            folder / {"network": "digits.onnx", "crops": "digits.crops.onnx", "pixels": "digits.pixels.onnx"}[changed]
        )
        model = onnx.load(path)
        tensor = next(t for t in model.graph.initializer if list(t.dims) == [6, 3, 5, 5])
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[0, 0, 0, 0] += 1
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(model, path)
    rows = parity.verify(classifier, spec, pictures.of_samples(run / "samples")[::8], folder, "digits")
    failed = {(row.graph, row.runtime) for row in rows if not row.passed}
    if changed == "script":
        graphs = ("network", "crops", "pixels")
        assert failed == {*((graph, "TorchScript") for graph in graphs), ("pixels", "Pillow + crops")}
    else:
        assert failed == {(changed, "ONNX Runtime")}
    assert "FAILED on " in parity.table(rows)


def test_an_artifact_with_another_spec_is_refused(exported, run, spec, tmp_path):
    shutil.copytree(exported, tmp_path / "export")
    model = onnx.load(tmp_path / "export" / "digits.onnx")
    text = model.metadata_props[0].value.replace('"7"', '"seven"')
    onnx.helper.set_model_props(model, {"spec": text})
    onnx.save(model, tmp_path / "export" / "digits.onnx")
    _, network = load_run(run)
    with pytest.raises(parity.ParityError, match=r"digits\.onnx: carries another spec"):
        parity.verify(Classifier(network, spec), spec, [("a", gradient())], tmp_path / "export", "digits")


def test_outside_the_tolerance_export_fails_names_the_picture_and_leaves_no_archive(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "digits"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("last.ckpt"))
    (copy / "export").mkdir(exist_ok=True)
    (copy / "export" / "digits.mar").write_bytes(b"of an earlier export")
    monkeypatch.setattr(parity, "CROP_TOLERANCE", 0.0)
    monkeypatch.setattr(parity, "LOGIT_TOLERANCE", 0.0)
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out
    assert "FAILED on " in out
    assert "no archive was made" in out
    assert not (copy / "export" / "digits.mar").exists()
    report = json.loads((copy / "export" / "parity.json").read_text())
    failed = [row for row in report["rows"] if not row["passed"]]
    assert failed
    assert failed[0]["worst"] in {name for name, _ in pictures.of_samples(run / "samples")}
    assert not list(copy.glob(".export-*"))


def test_ties_are_counted_and_not_held_against_a_runtime():
    reference = torch.tensor([[0.501, 0.499], [0.9, 0.1]])
    got = torch.tensor([[0.499, 0.501], [0.9, 0.1]])
    row = parity.compare("pixels", "x", "1", reference, got, 5e-3, ["a", "b"])
    assert row.passed
    assert (row.ties, row.top1_agreement, row.worst) == (("a",), 1.0, "a")
    assert not parity.compare("pixels", "x", "1", reference, got, 1e-4, ["a", "b"]).passed
    assert not parity.compare("pixels", "x", "1", reference, torch.full((2, 2), torch.nan), 1.0, ["a", "b"]).passed


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_other_architectures_export_and_agree(tmp_path, arch, capsys):
    torch.manual_seed(0)
    size = 64
    network = architectures.build(arch, 3, size).eval()
    out = tmp_path / "net"
    (out / "samples").mkdir(parents=True)
    for i, (width, height) in enumerate([(40, 30), (31, 77), (300, 200)]):
        gradient(width, height).save(out / "samples" / f"{i}.png")
    checkpoint.save(network.state_dict(), out / "model.pt")
    weights = sha256(out / "model.pt")
    spec = ModelSpec(
        arch=arch, labels=("a", "b", "c"), size=size, resize=size + 8, mean=(0.4,) * 3, std=(0.2,) * 3,
        temperature=1.7, weights_sha256=weights,
    )  # fmt: skip
    spec.save(out / "spec.json")
    assert all(row.passed for row in export_run(out)), capsys.readouterr().out
    assert (out / "export" / "net.mar").exists()


def test_the_pixel_graph_applies_the_temperature_and_the_specs_pixel_rule(run, spec):
    _, network = load_run(run)
    warm = ModelSpec(**{**vars(spec), "temperature": 2.0, "resize": 40})
    picture = gradient(50, 45)
    pixels = torch.from_numpy(crop(picture, 32, 40).copy())[None]
    planes = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(
        3, 1, 1
    )
    with torch.inference_mode():
        expected = (network(planes) / 2).softmax(dim=1)
        got = Classifier(network, warm).eval()(torch.from_numpy(np.asarray(picture).copy())[None])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/such"], "no such file"),
        (["RUN", "--name", "a b"], "--name a b"),
        (["RUN", "--name", "../x"], "--name ../x"),
        (["RUN", "--version", "v2"], "--version v2: must be a number"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run, capsys, arguments, words):
    assert main([str(run) if a == "RUN" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_nothing_of_ours_reports_to_onnx_runtimes_maker(tmp_path):
    """It writes `.ses` into the temporary folder as soon as it is imported with its telemetry on."""
    import os

    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import export.parity"], cwd=PROJECT, env=environment, check=True)
    assert not (tmp_path / ".ses").exists()
