"""The exported graphs in every runtime of this machine, and what is said of those that are not here."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.graphs import exported_program, torchscript
from export.graphs import onnx as onnx_files
from export.proof import images, parity, runtimes
from export.proof.runtimes import INSTALLED, RUNTIMES, Crashed, Missing
from model import Classifier, load_run, registry
from predictor.spec import ModelSpec

OF_PYTHON = ("OpenVINO", "OpenCV DNN", "tract")
OTHER_LANGUAGES = ("ONNX Runtime Node", "ONNX Runtime browser")
COMPILED = ("LibTorch C++",)  # in test_client_cpp.py, which builds it
NEEDS_A_GPU = ("TorchScript CUDA", "ONNX Runtime CUDA", "TensorRT")


def test_every_runtime_has_its_place():
    assert {*INSTALLED, *OF_PYTHON, *OTHER_LANGUAGES, *COMPILED, *NEEDS_A_GPU} == set(RUNTIMES)


@pytest.fixture(scope="module")
def verified(verify):
    """The rows of all these runtimes, made at once, which is quicker."""
    return verify(*OF_PYTHON, *OTHER_LANGUAGES, *NEEDS_A_GPU)


@pytest.mark.parametrize("name", [*OF_PYTHON, *OTHER_LANGUAGES, *NEEDS_A_GPU])
def test_a_runtime_gives_pytorchs_answers_in_every_graph(verified, name):
    rows = [row for row in verified if row.runtime == name]
    assert [row.graph for row in rows] == ["network", "crops", "pixels"]
    if rows[0].skipped and "cannot run" not in rows[0].skipped:
        pytest.skip(f"{name} is not here: {rows[0].skipped}")
    for row in rows:
        assert row.passed, row
        assert row.images == 24
        assert row.version
        assert row.milliseconds > 0


def test_the_recipes_network_has_pytorchs_answers_in_every_runtime_of_python(tmp_path):
    """Its GELU is one operator in ONNX Runtime; where OpenCV takes it for one, it crashes."""
    torch.manual_seed(0)
    network = registry.build("fastnet_small", 3, 32)
    network(torch.randn(64, 3, 32, 32))  # BatchNorm has statistics
    labels = ("a", "b", "c")
    spec = ModelSpec(
        arch="fastnet_small", labels=labels, height=32, width=32, resize=32, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    classifier = Classifier(network, spec).eval()
    traced = exported_program.trace(classifier)
    torchscript.save(classifier, spec, tmp_path / "net.pt")
    exported_program.save(traced, spec, tmp_path, "net")
    onnx_files.save(traced, spec, tmp_path, "net")
    names = (*INSTALLED, *OF_PYTHON)
    rows = parity.verify(classifier, spec, images.photographs(8), tmp_path, "net", names)
    assert [row.runtime for row in rows if row.runtime in names and row.passed] == [*names] * 3, rows
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that this file is for this machine
    onnxruntime.InferenceSession(tmp_path / "net.onnx", options)
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("Gelu") == 7
    assert "Erf" not in operators


def test_a_runtime_that_is_not_installed_is_skipped_with_what_installs_it_and_never_passed(verify, monkeypatch):
    def absent(*_):
        raise Missing("pip install openvino")

    monkeypatch.setitem(RUNTIMES, "OpenVINO", absent)
    rows = verify("OpenVINO")
    assert not any(row.passed or row.failed for row in rows)
    assert parity.table(rows).count("skipped: pip install openvino") == 3


def test_a_graph_that_a_runtime_cannot_run_is_said_in_its_own_words(verify, monkeypatch):
    def unable(folder, name, graph, batches):
        raise RuntimeError("no operator Foo")

    monkeypatch.setitem(RUNTIMES, "tract", unable)
    assert verify("tract")[0].skipped == "it cannot run this graph (no operator Foo)"
    monkeypatch.setitem(RUNTIMES, "ONNX Runtime", unable)  # what the project itself needs is not passed over
    with pytest.raises(parity.ParityError, match="ONNX Runtime cannot run the network graph: no operator Foo"):
        verify("ONNX Runtime")


def test_a_wrong_answer_of_another_runtime_fails(verify, monkeypatch):
    right = RUNTIMES["tract"]

    def wrong(folder, name, graph, batches):
        answers = right(folder, name, graph, batches)
        answers.outputs[-1][0, 0] += 0.1
        return answers

    monkeypatch.setitem(RUNTIMES, "tract", wrong)
    assert [row.failed for row in verify("tract")] == [True, True, True]


@pytest.mark.parametrize(("code", "error"), [(3, Missing), (4, RuntimeError), (139, Crashed)])
def test_another_program_says_by_its_exit_code_why_it_did_not_answer(code, error):
    program = f"import sys; print('a note', file=sys.stderr); print('npm ci', file=sys.stderr); sys.exit({code})"
    with pytest.raises(error, match=r"npm ci$"):
        runtimes._external([sys.executable, "-c", program], [np.zeros((1, 3, 2, 2), np.float32)])


def test_a_program_that_crashes_is_a_failure_and_not_skipped(verify, monkeypatch):
    def crashes(folder, name, graph, batches):
        return runtimes._external([sys.executable, "-c", "import os; os.abort()"], batches)

    monkeypatch.setitem(RUNTIMES, "LibTorch C++", crashes)
    rows = verify("LibTorch C++")
    assert all(row.failed for row in rows)
    assert "FAILED on all images: python ended with -6" in parity.table(rows)


def test_another_program_gets_the_batches_in_order_and_gives_its_answers_back():
    program = """
import json, sys, numpy, pathlib
inputs, outputs = map(pathlib.Path, sys.argv[1:])
for path in sorted(inputs.iterdir()):
    numpy.save(outputs / path.name, numpy.load(path).astype("f4").sum(axis=(1, 2))[:, :2])
print(json.dumps({"version": "7", "seconds": 0.5}))
"""
    batches = [np.full((n, 2, 2, 3), n, np.uint8) for n in (1, 3, 12)]
    answers = runtimes._external([sys.executable, "-c", program], batches)
    assert [output.shape for output in answers.outputs] == [(1, 2), (3, 2), (12, 2)]
    assert [output[0, 0] for output in answers.outputs] == [4, 12, 48]
    assert (answers.seconds, answers.version) == (0.5, "7")


def test_photographs_are_the_same_each_time_in_all_kinds_of_sizes():
    first, again = images.photographs(128), images.photographs(128)
    assert [(name, image.tobytes()) for name, image in first] == [(n, p.tobytes()) for n, p in again]
    sizes = {image.size for _, image in first}
    assert {(9, 9), (640, 427)} <= sizes
    assert len(sizes) > 100
    assert sum(w > h for w, h in sizes) > 20
    assert sum(w < h for w, h in sizes) > 20


def test_all_means_at_least_a_thousand_images_of_the_test_split_or_photographs(run, monkeypatch):
    names = [name for name, _ in images.of_test_split(run)]
    assert len(names) == len(set(names)) == 1000
    assert sum(name.startswith("test/") for name in names) == 360
    monkeypatch.setattr(images, "MANY", 100)
    assert sum(name.startswith("test/") for name, _ in images.of_test_split(run)) == 100


def test_a_sample_is_drawn_evenly_in_one_pass_and_depends_on_its_seed():
    drawn = [images.sample(iter(range(100)), 10, seed) for seed in range(300)]
    assert all(sorted(items) == items and len(set(items)) == 10 for items in drawn)
    assert drawn[0] == images.sample(range(100), 10, 0) != drawn[1]
    counts = np.bincount(np.concatenate(drawn), minlength=100)  # 30 each, of a binomial with deviation 5.2
    assert counts.min() > 5
    assert counts.max() < 60
    assert images.sample(range(3), 10) == [0, 1, 2]


def test_the_report_keeps_the_rows_that_were_skipped(run, tmp_path):
    row = parity.Row("network", "OpenVINO", skipped="pip install openvino")
    parity.write_json([row], load_run(run)[0], tmp_path / "parity.json")
    (row,) = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert row["passed"] is False
    assert row["skipped"] == "pip install openvino"
