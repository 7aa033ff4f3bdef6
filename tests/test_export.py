import errno
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from dataset.terminal import printed
from export import progress
from export.__main__ import main
from export.graphs import exported_program, torchscript
from export.graphs import onnx as onnx_files
from export.package import archive, checksums
from export.pipeline import export_run, name_of
from export.proof import images, parity, runtimes
from export.proof.runtimes import INSTALLED
from launcher import archives_of
from model import Classifier, checkpoint, load_run, registry
from predictor.files import sha256
from predictor.pillow_preprocessing import crop
from predictor.spec import ModelSpec, PixelRule
from tests.conftest import PROJECT, label_of, replace_in_archive
from tests.kinds import gradient, save


@pytest.fixture(scope="module")
def spec(run):
    return ModelSpec.load(run)


def test_the_export_folder_holds_what_the_contract_names(exported):
    assert {path.name for path in exported.iterdir()} == {
        "digits.pt", "digits.onnx", "digits.crops.onnx", "digits.pixels.onnx", "digits.pt2", "digits.crops.pt2",
        "digits.pixels.pt2", "digits.mar", "parity.json", "index_to_name.json", "MODEL_CARD.md", "SHA256SUMS",
        "golden.json", "model-config.yaml", "manifest.json", "archive",
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
    paths = list(exported.glob("*.onnx"))
    assert len(paths) == 3
    for path in paths:
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
    module, found = exported_program.load(exported / file)
    assert found == spec
    if file == "digits.pt2":
        assert module(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    else:
        size = (32, 32) if "crops" in file else (47, 91)
        pixels = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8)
        assert module(pixels).sum().item() == pytest.approx(3)
    assert str(PROJECT).encode() not in (exported / file).read_bytes()  # no stack traces of this machine


def test_a_foreign_program_needs_the_onnx_file_alone(exported, run, spec):
    """As one would use it without PyTorch: labels from the metadata, any image, any size."""
    session = onnxruntime.InferenceSession(exported / "digits.pixels.onnx", providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["spec"])
    image = Image.open(run / "samples" / "7-0.png").convert("RGB").resize((61, 55))
    (probabilities,) = session.run(["probabilities"], {"images": np.asarray(image)[None]})
    assert card["labels"][probabilities[0].argmax()] == label_of(run, save(image, "PNG"))


def test_the_parity_report_has_a_passing_row_for_every_runtime_and_graph(exported):
    rows = json.loads((exported / "parity.json").read_text())["rows"]
    assert {(row["graph"], row["runtime"]) for row in rows} == {
        *((graph, runtime) for graph in ("network", "crops", "pixels") for runtime in INSTALLED),
        ("pixels", "Pillow + crops"),
        ("resize", "Pillow"),
    }
    assert all(row["passed"] and row["images"] >= 64 for row in rows)
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
    rows = parity.verify(classifier, spec, images.of_samples(run / "samples")[::8], folder, "digits")
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


@pytest.fixture
def copied(run, exported, tmp_path):
    """A run of its own that was exported."""
    shutil.copytree(run, tmp_path / "digits", ignore=shutil.ignore_patterns("last.ckpt", "report"))
    return tmp_path / "digits"


@pytest.fixture
def copy(copied, exported, spec, monkeypatch):
    """The same, to be exported again with the graph files that it has: tracing takes seconds. All else is done anew."""
    files = {"pt": [""], "pt2": ["", ".crops", ".pixels"], "onnx": ["", ".crops", ".pixels"]}

    def write(kind, of, folder, name):
        assert of == spec
        for graph in files[kind]:
            shutil.copy(exported / f"digits{graph}.{kind}", folder / f"{name}{graph}.{kind}")

    monkeypatch.setattr(torchscript, "save", lambda _, of, path: write("pt", of, path.parent, path.stem))
    monkeypatch.setattr(exported_program, "trace", lambda _: None)
    monkeypatch.setattr(exported_program, "save", lambda _, *rest: write("pt2", *rest))
    monkeypatch.setattr(onnx_files, "save", lambda _, *rest: write("onnx", *rest))
    return copied


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_outside_the_tolerance_export_fails_names_the_image_and_leaves_the_earlier_export(
    run, copy, monkeypatch, capsys
):
    before = content(copy / "export")
    monkeypatch.setattr(runtimes, "INSTALLED", ("ONNX Runtime",))  # which is quicker
    with monkeypatch.context() as patch:
        patch.setattr(parity, "CROP_TOLERANCE", 0.0)
        patch.setattr(parity, "LOGIT_TOLERANCE", 0.0)
        for _ in range(2):  # again over what failed before
            assert main([str(copy)]) == 1
            out = capsys.readouterr().out
            assert "FAILED on " in out
            assert f"no archive was made, and {copy / 'export'} is as it was" in out
            assert content(copy / "export") == before
    report = json.loads((copy / "export.failed" / "parity.json").read_text())
    failed = [row for row in report["rows"] if not row["passed"]]
    assert failed
    assert failed[0]["worst"] in {name for name, _ in images.of_samples(run / "samples")}
    assert not list((copy / "export.failed").glob("*.mar"))
    assert not list(copy.glob(".export-*"))
    (copy / "export.failed" / "notes.txt").write_text("mine")
    assert main([str(copy)]) == 0
    assert [path.name for path in (copy / "export.failed").iterdir()] == ["notes.txt"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.anywhere
@pytest.mark.parametrize(
    ("module", "function", "error", "code"),
    [
        (torchscript, "save", FULL, 2),
        (parity, "verify", KeyboardInterrupt(), 130),
        (archive, "build", RuntimeError("torch-model-archiver failed: No space left on device"), 2),
        (checksums, "write_sums", FULL, 2),
        (checksums, "sha256", KeyboardInterrupt(), 130),
    ],
)
def test_whatever_stops_an_export_the_earlier_one_stays_whole(copy, monkeypatch, capsys, module, function, error, code):
    before = content(copy)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(module, function, fails)
    monkeypatch.setattr(runtimes, "INSTALLED", ("ONNX Runtime",))
    assert main([str(copy)]) == code
    said = capsys.readouterr().err
    assert said.startswith("export: ")
    assert said.count("\n") == 1
    assert (f"stopped; {copy / 'export'} is as it was" in said) == (code == 130)
    assert content(copy) == before


@pytest.mark.anywhere
def test_ctrl_c_ends_a_check_in_one_line(exported, monkeypatch, capsys):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checksums, "sha256", stops)
    assert main(["--check", str(exported)]) == 130
    assert capsys.readouterr().err == "export: stopped; nothing was changed\n"


@pytest.mark.anywhere
def test_a_disk_that_takes_no_more_leaves_the_earlier_export(copied, capsys):
    """A real refusal by the system: of every write beyond 100 kB of a file."""
    resource = pytest.importorskip("resource")
    before = content(copied)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = main([str(copied)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 2, said
    assert content(copied) == before


@pytest.mark.anywhere
def test_each_step_is_told_as_it_is_done(copy, capsys, monkeypatch):
    monkeypatch.setattr(archive, "build", lambda *_: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception):
        main([str(copy)])
    lines = capsys.readouterr().out.splitlines()
    steps = [re.sub(r", [\d.]+ s$|: [\d.]+ s$", "", line) for line in lines[: lines.index("")]]
    graphs = [f"{graph} in {runtime}: ok" for graph in ("network", "crops", "pixels") for runtime in INSTALLED]
    assert steps == ["TorchScript", "torch.export", "ONNX", *graphs]


@pytest.mark.anywhere
def test_a_step_is_logged_and_the_command_prints_it(capsys):
    with progress.step("ONNX"):
        pass
    assert capsys.readouterr() == ("", "")
    with printed("export"), progress.step("ONNX"):
        pass
    assert re.fullmatch(r"ONNX: \d\.\d s\n", capsys.readouterr().out)


@pytest.mark.anywhere
def test_on_a_terminal_a_step_is_named_while_it_is_being_done(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    with progress.step("ONNX"):
        assert "ONNX …" in capsys.readouterr().err
    assert capsys.readouterr().err.isspace()  # it is wiped off


@pytest.mark.anywhere
def test_a_run_that_was_renamed_is_exported_under_its_new_name_alone(copy, monkeypatch, capsys):
    """And its new name is none that TorchServe takes."""
    monkeypatch.setattr(runtimes, "INSTALLED", ("ONNX Runtime",))  # which is quicker
    moved = copy.with_name("Zwei Kätzchen")
    copy.rename(moved)
    (moved / "export" / "notes.txt").write_text("mine")
    kept = moved / "export" / "digits-1.0.mar"  # by a rollout
    replace_in_archive(moved / "export" / "digits.mar", kept, {"spec.json": "{}"})  # of another training
    assert main([str(moved), "--backend", "onnx"]) == 0
    assert f"next: python serve.py '{moved}'" in capsys.readouterr().out
    names = {path.name for path in (moved / "export").iterdir()}
    assert {"notes.txt", "digits-1.0.mar", "Zwei-Katzchen.mar", "Zwei-Katzchen.pt"} <= names
    assert {name for name in names if name.startswith("digits")} == {"digits-1.0.mar"}
    assert archives_of(moved / "export") == [moved / "export" / "Zwei-Katzchen.mar"]  # is what serve.py starts
    (moved / "export" / "digits-1.0.mar").unlink()
    assert main(["--check", str(moved / "export")]) == 1  # it was there
    assert main([str(moved), "--backend", "onnx"]) == 0
    capsys.readouterr()
    assert main(["--check", str(moved / "export")]) == 0
    assert "no export wrote, though the sums cover: notes.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "name"), [("digits", "digits"), ("a b", "a-b"), ("a,b", "a-b"), ("Ü1", "U1"), ("_x_", "x"), ("x_", "x_")]
)
def test_a_model_is_named_after_its_folder_as_far_as_urls_go(folder, name, tmp_path):
    assert name_of(tmp_path / folder) == name


def test_a_name_of_which_nothing_is_left_is_asked_for(tmp_path):
    with pytest.raises(
        ValueError, match=r"日本: TorchServe's URLs take none of these letters; name the model, e.g. --name"
    ):
        name_of(tmp_path / "日本")


@pytest.mark.parametrize("link", ["export", "export/digits.mar", "export/more", "export.failed"])
def test_nothing_is_written_or_removed_through_a_link(copy, tmp_path, link, capsys, monkeypatch):
    behind = tmp_path / "behind"
    if (copy / link).is_dir() or (copy / link).is_file():
        (copy / link).rename(behind)
    else:
        behind.mkdir()
        (behind / "digits.pt").write_text("of another")
    (copy / link).symlink_to(behind)
    before = content(tmp_path)
    if link == "export.failed":
        monkeypatch.setattr(runtimes, "INSTALLED", ("ONNX Runtime",))
        monkeypatch.setattr(parity, "LOGIT_TOLERANCE", 0.0)
        monkeypatch.setattr(parity, "CROP_TOLERANCE", 0.0)
    assert main([str(copy)]) == 2
    said = capsys.readouterr().err
    assert f"{copy / link}: is a link" in said
    assert said.count("\n") == 1
    assert content(tmp_path) == before


def test_ties_are_counted_and_not_held_against_a_runtime():
    reference = torch.tensor([[0.501, 0.499], [0.9, 0.1]])
    got = torch.tensor([[0.499, 0.501], [0.9, 0.1]])
    row = parity.compare("pixels", "x", "1", reference, got, 5e-3, ["a", "b"])
    assert row.passed
    assert (row.ties, row.top1_agreement, row.worst) == (("a",), 1.0, "a")
    assert not parity.compare("pixels", "x", "1", reference, got, 1e-4, ["a", "b"]).passed
    assert not parity.compare("pixels", "x", "1", reference, torch.full((2, 2), torch.nan), 1.0, ["a", "b"]).passed


def test_another_architecture_exports_and_agrees(tmp_path):
    """`benchmarks.architectures` has a dozen more."""
    torch.manual_seed(0)
    arch = "mobilenet_v3_small"
    size = 64
    network = registry.build(arch, 3, size).eval()
    out = tmp_path / "net"
    (out / "samples").mkdir(parents=True)
    for i, (width, height) in enumerate([(40, 30), (31, 77), (300, 200)]):
        gradient(width, height).save(out / "samples" / f"{i}.png")
    checkpoint.save(network.state_dict(), out / "model.pt")
    weights = sha256(out / "model.pt")
    spec = ModelSpec(
        arch=arch, labels=("a", "b", "c"), height=size, width=size, resize=size + 8, mean=(0.4,) * 3, std=(0.2,) * 3,
        temperature=1.7, weights_sha256=weights,
    )  # fmt: skip
    spec.save(out / "spec.json")
    assert not [row for row in export_run(out) if not row.passed]
    assert (out / "export" / "net.mar").exists()


def test_the_pixel_graph_applies_the_temperature_and_the_specs_pixel_rule(run, spec):
    _, network = load_run(run)
    warm = ModelSpec(**{**vars(spec), "temperature": 2.0, "resize": 40})
    image = gradient(50, 45)
    pixels = torch.from_numpy(crop(image, PixelRule.square(32, 40)).copy())[None]
    planes = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(
        3, 1, 1
    )
    with torch.inference_mode():
        expected = (network(planes) / 2).softmax(dim=1)
        got = Classifier(network, warm).eval()(torch.from_numpy(np.asarray(image).copy())[None])
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


@pytest.mark.anywhere
def test_nothing_of_ours_reports_to_onnx_runtimes_maker(tmp_path):
    """It writes `.ses` into the temporary folder as soon as it is imported with its telemetry on."""
    import os

    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "import export.proof.parity"], cwd=PROJECT, env=environment, check=True)
    assert not (tmp_path / ".ses").exists()
