"""int8 and fp16 files: what they hold, and that they are kept only where they earn it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.graphs import onnx as onnx_files
from export.graphs import quantization
from export.pipeline import Export, Options
from export.proof import accuracy_gate, split_crops
from export.proof.accuracy_gate import Paired, Rules
from model import Classifier, load_run
from model.tensor_preprocessing import normalise

SMALLER = ("digits.int8.onnx", "digits.crops.int8.onnx", "digits.fp16.onnx", "digits.crops.fp16.onnx")
ANY_SPEED = {"int8": 0.0, "fp16": 0.0}  # a network as small as this one is not made faster


@pytest.fixture(scope="module")
def loaded(run):
    spec, network = load_run(run)
    return spec, Classifier(network, spec).eval()


@pytest.fixture(scope="module")
def calibration(run, loaded):
    return split_crops.calibration_crops(run, loaded[0], count=128)


@pytest.fixture(scope="module")
def made(exported, loaded, calibration, tmp_path_factory):
    """A folder with the four files, not judged."""
    folder = tmp_path_factory.mktemp("made")
    spec, classifier = loaded
    quantization.make_int8(spec, exported / "digits.onnx", calibration, folder, "digits")
    quantization.make_fp16(classifier.network, spec, folder, "digits")
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the export's ONNX files, with smaller files of an earlier export."""
    for path in exported.glob("*.onnx"):
        shutil.copy(path, tmp_path)
    for file in SMALLER:
        (tmp_path / file).write_bytes(b"of an earlier export")
    return tmp_path


@pytest.fixture
def use_made(made, monkeypatch):
    """`Export.reduce` takes copies of the files that are made already: exporting takes seconds."""

    def copy(file):
        def make(*arguments):
            (folder,) = (one for one in arguments if isinstance(one, Path) and one.is_dir())
            for name in SMALLER:
                if file in name:
                    shutil.copy(made / name, folder / name)

        return make

    monkeypatch.setattr(quantization, "make_int8", copy("int8"))
    monkeypatch.setattr(quantization, "make_fp16", copy("fp16"))


@pytest.fixture
def exact(monkeypatch):
    """The gate gets the predictions that the files say: without VNNI int8 loses images, and may rightly be dropped."""
    monkeypatch.setattr(accuracy_gate.sessions, "open_session", lambda path, *_: open_exactly(path))


# A processor that this one emulates, and on it the tests marked `int8`; empty for this one. See `make test-portable`.
EMULATOR = shlex.split(os.environ.get("INT8_EMULATOR", ""))


def ask(path, batch):
    """The first output. The processor's integer kernels may saturate: without VNNI they add pairs in 16 bits."""
    return _run_emulated(path, batch) if EMULATOR else _answer(open_session(path), batch)


def ask_exactly(path, batch):
    """What an int8 file says, in float: no integer kernel takes part, so that every processor gives the same."""
    return _answer(open_exactly(path), batch)


def open_exactly(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return open_session(path, options)


def open_session(path, options=None):
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _answer(session, batch):
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def _run_emulated(path, batch):
    code = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})[0])
"""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npy", Path(folder) / "outputs.npy"
        np.save(inputs, batch)
        command = [*EMULATOR, sys.executable, "-c", code, str(path), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr
        return np.load(outputs)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize(
    ("middle", "input", "output"),
    [
        ("", ("input", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32]), ("logits", ["batch", 10])),
        (".crops", ("images", onnx.TensorProto.UINT8, ["batch", 32, 32, 3]), ("probabilities", ["batch", 10])),
    ],
)
def test_the_files_keep_the_contract_of_the_fp32_ones(made, loaded, precision, middle, input, output):
    path = made / f"digits{middle}.{precision}.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (entry,), (result,) = model.graph.input, model.graph.output
    shape = [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
    assert (entry.name, entry.type.tensor_type.elem_type, shape) == input
    assert (result.name, [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim]) == output
    assert result.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert onnx_files.read_spec(path) == loaded[0]


def test_int8_rounds_activations_to_uint8_and_weights_to_int8_for_each_channel(made):
    graph = onnx.load(made / "digits.crops.int8.onnx").graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {values[node.input[2]].data_type for node in rounded} == {onnx.TensorProto.UINT8}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 5
    for layer in layers:
        activation, weight = makers[layer.input[0]], makers[layer.input[1]]
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert makers[activation.input[0]].op_type in ("QuantizeLinear", "MaxPool", "Reshape")
        assert values[weight.input[0]].data_type == onnx.TensorProto.INT8
        assert list(values[weight.input[1]].dims) == list(values[weight.input[0]].dims)[:1]  # a scale for each output


def test_int8_leaves_the_logits_the_normalisation_and_the_softmax_in_float(made):
    graph = onnx.load(made / "digits.crops.int8.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    assert makers["logits"].op_type == "Gemm"
    softmax = makers["probabilities"]
    assert (softmax.op_type, makers[softmax.input[0]].op_type) == ("Softmax", "Div")
    assert {node.op_type for node in graph.node if node.name.startswith("crops.")} == {
        "Cast", "Mul", "Sub", "Transpose", "Div", "Softmax",
    }  # fmt: skip
    logits = ask(made / "digits.int8.onnx", torch.randn(40, 3, 32, 32).numpy())
    assert len(np.unique(logits)) > 256  # as many as rounded ones could be


def test_every_precision_has_the_same_normalisation_and_softmax_around_it(made, exported):
    def around(path):
        graph = onnx.load(path).graph
        values = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
        nodes = [node for node in graph.node if node.name.startswith("crops.")]
        return [(node.op_type, [values.get(name, name) for name in node.input], list(node.output)) for node in nodes]

    expected = around(exported / "digits.crops.onnx")
    assert [kind for kind, *_ in expected] == ["Cast", "Mul", "Sub", "Transpose", "Div", "Softmax"]
    assert around(made / "digits.crops.int8.onnx") == around(made / "digits.crops.fp16.onnx") == expected


def test_int8_says_how_it_was_calibrated(made, calibration):
    for file in ("digits.int8.onnx", "digits.crops.int8.onnx"):
        properties = {entry.key: entry.value for entry in onnx.load(made / file).metadata_props}
        note = json.loads(properties["quantisation"])
        assert note.pop("versions")["onnxruntime"] == onnxruntime.__version__
        assert note == {
            "format": "QDQ", "activations": "uint8", "weights": "int8, per channel", "calibration": "MinMax",
            "images": len(calibration), "seed": split_crops.SEED,
        }  # fmt: skip


def test_fp16_holds_its_weights_in_half_precision(made):
    for file in ("digits.fp16.onnx", "digits.crops.fp16.onnx"):  # "crops." is around the network, in float
        tensors = onnx.load(made / file).graph.initializer
        weights = [t for t in tensors if len(t.dims) in (2, 4) and not t.name.startswith("crops.")]
        assert len(weights) == 5
        assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    assert (made / "digits.fp16.onnx").stat().st_size < 200_000  # 62,006 weights of 2 bytes, and the spec


@pytest.mark.int8
@pytest.mark.parametrize(("precision", "temperature"), [("int8", 1.0), ("int8", 1.7), ("fp16", 1.0)])
def test_the_crop_graph_is_the_network_with_its_preprocessing_and_softmax_around_it(
    made, loaded, calibration, precision, temperature, tmp_path
):
    spec, classifier = loaded
    path = made / f"digits.crops.{precision}.onnx"
    if temperature != 1:
        network = onnx.load(made / "digits.int8.onnx")
        path = tmp_path / "warm.onnx"
        onnx.save(onnx_files.crop_graph(network, replace(spec, temperature=temperature)), path)
    crops = torch.from_numpy(calibration[:9])
    logits = ask(made / f"digits.{precision}.onnx", normalise(crops, classifier.mean, classifier.std).numpy())
    expected = (torch.from_numpy(logits) / temperature).softmax(dim=1)
    torch.testing.assert_close(torch.from_numpy(ask(path, crops.numpy())), expected, atol=1e-5, rtol=0)


@pytest.mark.int8
@pytest.mark.parametrize("file", ["digits.crops.int8.onnx", "digits.crops.fp16.onnx"])
def test_an_image_gets_the_same_answer_in_any_batch(made, calibration, file):
    together = ask(made / file, calibration[:7])
    in_parts = np.concatenate(
        [ask(made / file, part) for part in (calibration[:1], calibration[1:3], calibration[3:7])]
    )
    np.testing.assert_allclose(together, in_parts, rtol=0, atol=2e-3 if "fp16" in file else 1e-4)


def test_the_answers_stay_close_to_fp32(made, exported, calibration):
    expected = ask_exactly(exported / "digits.crops.onnx", calibration)
    for file, tolerance in (("digits.crops.int8.onnx", 0.2), ("digits.crops.fp16.onnx", 0.01)):
        got = ask_exactly(made / file, calibration)
        assert np.abs(got - expected).max() < tolerance
        assert agreement(got, expected) > 0.95


@pytest.mark.int8
def test_a_processors_integer_kernels_give_nearly_the_answers_that_the_file_says(made, calibration):
    """Where they saturate, some images get another label: on an emulated Haswell 8 of 128."""
    expected = ask_exactly(made / "digits.crops.int8.onnx", calibration)
    got = ask(made / "digits.crops.int8.onnx", calibration)
    assert np.median(np.abs(got - expected).max(axis=1)) < 0.02
    assert agreement(got, expected) > 0.8


@pytest.mark.int8
@pytest.mark.skipif(not EMULATOR, reason="make test-portable emulates a processor that saturates")
def test_the_emulated_processor_saturates(tmp_path):
    """64 products of 255 and 127, added in pairs of at most 2^15 - 1."""
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["input", "weight"], ["output"])],
        "products",
        [helper.make_tensor_value_info("input", kinds.UINT8, ["batch", 64])],
        [helper.make_tensor_value_info("output", kinds.INT32, ["batch", 16])],
        [onnx.numpy_helper.from_array(np.full((64, 16), 127, np.int8), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "products.onnx")
    assert (ask(tmp_path / "products.onnx", np.full((4, 64), 255, np.uint8)) == 32 * (2**15 - 1)).all()


def agreement(got, expected):
    """The share of images with the same best label."""
    return (got.argmax(axis=1) == expected.argmax(axis=1)).mean()


def test_the_same_seed_chooses_the_same_images_and_makes_the_same_file(made, run, loaded, exported, tmp_path):
    spec, _ = loaded
    again = split_crops.calibration_crops(run, spec, count=128)
    other = split_crops.calibration_crops(run, spec, count=128, seed=1)
    assert again.shape == other.shape == (128, 32, 32, 3)
    assert not np.array_equal(again, other)
    quantization.make_int8(spec, exported / "digits.onnx", again, tmp_path, "digits")
    for file in ("digits.int8.onnx", "digits.crops.int8.onnx"):
        assert (tmp_path / file).read_bytes() == (made / file).read_bytes()


def test_what_earns_it_is_kept_and_reported(run, folder, loaded, made, use_made, exact):
    spec, classifier = loaded
    export = Export(run, folder, "digits", spec, classifier, Options(int8=True, fp16=True))
    rows = export.reduce(Rules(max_loss=5, min_speedup=ANY_SPEED))  # rounding loses no image here, and may lose a few
    assert [(row.precision, row.kept, row.images) for row in rows] == [("int8", True, 360), ("fp16", True, 360)]
    measured = spec.metrics["accuracy"]  # by train.py
    assert rows[0].accuracy_fp32 == pytest.approx(measured, abs=1.5 / 360)  # one near tie
    assert (rows[0].calibration_images, rows[0].seed) == (128, split_crops.SEED)
    assert rows[0].speedup > 0
    for file in SMALLER:
        assert (folder / file).read_bytes() == (made / file).read_bytes()
    assert not list(folder.glob(".reduced-*"))
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["threads"] == 1
    words = ("digits.crops.int8.onnx", f"{rows[0].accuracy:.2%}", "kept")
    assert all(word in accuracy_gate.table(rows) for word in words)


def test_what_is_not_faster_is_not_written_and_an_older_file_goes(run, folder, loaded, use_made, exact, monkeypatch):
    monkeypatch.setattr(accuracy_gate, "has_vnni", lambda: True)
    monkeypatch.setattr(accuracy_gate, "milliseconds", lambda files, *_: {"fp32": 24.0, "int8": 10.0})
    (row,) = Export(run, folder, "digits", *loaded, Options(int8=True)).reduce(Rules(max_loss=5))
    assert (row.kept, row.reason, row.speedup) == (False, "×2.40 as fast as fp32, less than ×2.5", 2.4)
    assert not (folder / "digits.int8.onnx").exists()
    assert not (folder / "digits.crops.int8.onnx").exists()
    assert (folder / "digits.crops.onnx").exists()
    assert "NOT kept: ×2.40" in accuracy_gate.table([row])


def test_what_loses_too_much_accuracy_is_not_written(run, folder, loaded, monkeypatch):
    """Calibrated on black images alone, every activation of a real one is cut off."""
    black = np.zeros((16, 32, 32, 3), np.uint8)
    monkeypatch.setattr(split_crops, "calibration_crops", lambda *_: black)
    (row,) = Export(run, folder, "digits", *loaded, Options(int8=True)).reduce(Rules(min_speedup=ANY_SPEED))
    assert not row.kept
    assert row.loss_points > 0.5
    assert row.reason.startswith(f"loses {row.loss_points:.2f} points of accuracy (95% interval ")
    assert not (folder / "digits.int8.onnx").exists()
    assert not (folder / "digits.crops.int8.onnx").exists()


@pytest.mark.parametrize(
    ("count", "lost", "won", "kept"),
    [
        (372, 2, 0, True),  # 0.54 points, but two images
        (372, 3, 0, False),  # 0.81 points, and more than two
        (372, 9, 7, True),  # 0.54 points of many that differ: two images again
        (372, 20, 17, False),  # 0.81 points, more than two
        (5000, 25, 1, False),  # 0.48 points, and no chance
        (5000, 25, 14, True),  # 0.22 points, as chance gives them
        (5000, 0, 30, True),  # it gained
    ],
)
def test_a_loss_counts_if_it_is_shown_or_if_it_is_large_and_more_than_two_images(count, lost, won, kept):
    fault = Paired(count, lost, won).fault(accuracy_gate.MAX_LOSS)
    assert bool(fault) != kept, fault
    assert kept or "95% interval" in fault


@pytest.mark.parametrize(
    ("lost", "won", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (10, 2, 0.038574), (3, 3, 1.0)],
)
def test_the_paired_test_is_mcnemars_exact_one(lost, won, p_value):
    """Two-sided binomial tests with p = 1/2, as a statistics table gives them."""
    assert accuracy_gate.mcnemar(lost, won) == accuracy_gate.mcnemar(won, lost) == pytest.approx(p_value, abs=1e-6)


def test_of_many_images_the_paired_test_goes_on_where_the_exact_one_ended():
    assert accuracy_gate.mcnemar(540, 460) == pytest.approx(accuracy_gate.mcnemar(541, 460), rel=0.1)
    assert accuracy_gate.mcnemar(60_000, 50_000) < 1e-100
    assert accuracy_gate.mcnemar(60_000, 60_000) == 1


def test_the_interval_is_of_the_paired_difference():
    """Agresti and Min 2005, Section 2.2: half an image is added to each of the four cells."""
    low, high = accuracy_gate.paired_interval(20, 10, 1000)
    assert (low, high) == pytest.approx((-0.00088, 0.02084), abs=1e-4)
    assert accuracy_gate.paired_interval(10, 20, 1000) == pytest.approx((-high, -low))


def test_the_two_files_are_compared_image_by_image(exported, tmp_path, loaded):
    """The targets make fp32 correct on all of 200 images, and the other file wrong on 1, 2 or 3."""
    crops = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    best = ask(exported / "digits.crops.onnx", crops).argmax(axis=1)
    for lost, kept in ((1, True), (2, True), (3, False)):
        path = lose(exported / "digits.crops.onnx", crops[:lost], tmp_path / f"{lost}.onnx")
        (row,) = accuracy_gate.judge(
            exported / "digits.crops.onnx", {"fp16": path}, [(crops[:90], best[:90]), (crops[90:], best[90:])]
        )
        assert (row.images, row.lost, row.won, row.loss_points, row.kept) == (200, lost, 0, 0.5 * lost, kept)
        assert row.interval[0] < row.loss_points < row.interval[1]
        assert f"{row.interval[0]:+.2f} to {row.interval[1]:+.2f}" in accuracy_gate.table([row])


@pytest.mark.parametrize(("keep", "kept"), [("always", True), ("never", False)])
@pytest.mark.parametrize("lost", [1, 9])
def test_a_flag_overrules_the_judgement_either_way(exported, tmp_path, keep, kept, lost):
    crops = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    best = ask(exported / "digits.crops.onnx", crops).argmax(axis=1)
    path = lose(exported / "digits.crops.onnx", crops[:lost], tmp_path / "x.onnx")
    (row,) = accuracy_gate.judge(exported / "digits.crops.onnx", {"fp16": path}, [(crops, best)], Rules(keep=keep))
    assert row.kept == kept
    assert row.reason.startswith(f"--keep-reduced {keep}")
    assert ("loses 9.00 points" in row.reason) == (lost == 9)


def lose(source, images, path):
    """A crop graph that answers the class of least probability for `images` and is correct on all others."""
    model = onnx.load(source)
    graph, make = model.graph, onnx.helper.make_node
    sums = images.astype(np.int64).reshape(len(images), -1).sum(axis=1)
    assert len(set(sums)) == len(images)
    constants = {"sums": sums, "axes": [1, 2, 3], "last": [1], "two": np.float32(2), "one": np.float32(1)}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), f"test.{k}") for k, v in constants.items())
    softmax = next(node for node in graph.node if "probabilities" in node.output)
    softmax.output[0] = "test.correct"
    graph.node.extend(
        [
            make("Cast", ["images"], ["test.int"], to=onnx.TensorProto.INT64),
            make("ReduceSum", ["test.int", "test.axes"], ["test.sum"], keepdims=0),
            make("Unsqueeze", ["test.sum", "test.last"], ["test.column"]),
            make("Equal", ["test.column", "test.sums"], ["test.hits"]),
            make("Cast", ["test.hits"], ["test.floats"], to=onnx.TensorProto.FLOAT),
            make("ReduceMax", ["test.floats", "test.last"], ["test.hit"]),
            make("Mul", ["test.hit", "test.two"], ["test.twice"]),
            make("Sub", ["test.one", "test.twice"], ["test.sign"]),
            make("Mul", ["test.correct", "test.sign"], ["probabilities"]),
        ]
    )
    onnx.save(model, path)
    return path


def test_speed_is_told_and_not_judged_without_vnni(exported, calibration, monkeypatch):
    """Of a file that loses no accuracy, whatever kernels there are: it is fp32's own."""
    monkeypatch.setattr(accuracy_gate, "has_vnni", lambda: False)
    targets = ask_exactly(exported / "digits.crops.onnx", calibration).argmax(axis=1)
    candidates = {"int8": exported / "digits.crops.onnx"}
    (row,) = accuracy_gate.judge(
        exported / "digits.crops.onnx", candidates, [(calibration, targets)], Rules(5, {"int8": 1e9})
    )
    assert row.kept
    assert row.speedup is not None
    assert row.reason == "speed not judged: this processor has no VNNI"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_speed_of_fp16_is_not_measured_without_a_gpu(exported, made, calibration):
    targets = ask(exported / "digits.crops.onnx", calibration).argmax(axis=1)
    candidates = {"fp16": made / "digits.crops.fp16.onnx"}
    (row,) = accuracy_gate.judge(exported / "digits.crops.onnx", candidates, [(calibration, targets)], Rules(5))
    assert (row.kept, row.speedup, row.reason) == (True, None, "speed not measured: no GPU")


def test_images_that_cannot_be_read_are_left_out(run, loaded, monkeypatch):
    spec, _ = loaded
    good = [(f"{i}.png", str(i % 10), path.read_bytes()) for i, path in enumerate(sorted((run / "samples").iterdir()))]
    items = [*good, ("bad.jpg", "3", b"no image")]
    monkeypatch.setattr(split_crops.images, "read", lambda *_: iter(items))
    assert split_crops.calibration_crops(run, spec).shape == (len(good), 32, 32, 3)
    parts = list(split_crops.labelled_crops(run, spec))
    assert sum(len(targets) for _, targets in parts) == len(good)
    assert max(len(crops) for crops, _ in parts) <= split_crops.CHUNK
    assert [int(t) for _, targets in parts for t in targets] == [i % 10 for i in range(len(good))]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([("a.jpg", "0", b"")], "no test image can be read; pass --data"),
        ([], "no test image can be read; pass --data"),
        ([("a.jpg", "zebra", b"")], "'zebra' is none of its labels; pass --data"),
    ],
)
def test_data_that_does_not_belong_to_the_run_is_refused(run, loaded, monkeypatch, items, words):
    monkeypatch.setattr(split_crops.images, "read", lambda *_: iter(items))
    with pytest.raises(ValueError, match=words):
        list(split_crops.labelled_crops(run, loaded[0]))


def test_data_that_was_moved_is_asked_for_and_nothing_is_left_behind(run, folder, loaded):
    export = Export(run, folder, "digits", *loaded, Options(int8=True, data="no/such"))
    with pytest.raises(ValueError, match="pass --data"), contextlib.redirect_stderr(io.StringIO()):
        export.reduce(Rules())
    assert not list(folder.glob(".reduced-*"))
