"""The handler's backends: one answer from each, and what is said when one is not there."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from export.__main__ import main
from export.graphs import torchscript
from export.package import serving_settings
from model import ModelSpec
from predictor import backends
from tests.conftest import PROJECT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of torch's own modules

TOLERANCE = 1e-4  # of a probability, between backends: that of the crop graph in export/proof/parity.py


@pytest.fixture(scope="module")
def answer(exported):
    """Each backend of the export, as a function from crops to probabilities."""
    return {name: backends.load(name, exported, "digits") for name in serving_settings.backends_of(exported, "digits")}


def crops(count, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)  # blocks of 8×8 px: images that get different answers


def test_the_export_has_a_file_for_each_backend_but_int8(answer):
    assert set(answer) == set(backends.FILES) - {"onnx-int8"}


@given(count=st.integers(1, 40), seed=st.integers(0, 99))
def test_every_backend_gives_the_same_probabilities_whatever_the_batch(answer, count, seed):
    batch = crops(count, seed)
    expected = answer["torchscript"](batch)
    assert expected.dtype == np.float32
    assert expected.shape == (count, 10)
    for name, run in answer.items():
        got = run(batch)
        assert np.abs(got - expected).max() <= TOLERANCE, name
        alone = np.concatenate([run(one[None]) for one in batch])
        assert np.abs(got - alone).max() <= 1e-5, name


@pytest.mark.parametrize("name", ["tensorrt", None, 7, ""])
def test_an_unknown_backend_is_named_with_those_that_there_are(exported, name):
    with pytest.raises(ValueError, match=r"'backend' is .*must be one of onnx, onnx-int8, torchscript, pt2"):
        backends.load(name, exported, "digits")


def test_a_backend_whose_file_is_not_in_the_archive_is_named_with_the_way_out(exported):
    with pytest.raises(ValueError, match=r"digits\.crops\.int8\.onnx is not in the archive.*--backend onnx-int8"):
        backends.load("onnx-int8", exported, "digits")


def test_the_fastest_backend_is_chosen_and_a_wish_is_obeyed(exported, run):
    spec = ModelSpec.load(run)
    rows = serving_settings.measure(exported, "digits", spec)
    (fastest,) = (row for row in rows if row.chosen)
    product = {row.backend: np.prod(list(row.milliseconds.values())) for row in rows}
    assert product[fastest.backend] == min(product.values())
    wished = serving_settings.measure(exported, "digits", spec, "pt2")
    assert serving_settings.chosen(wished).backend == "pt2"
    assert "in the archive" in next(
        line for line in serving_settings.table(wished).splitlines() if line.startswith("pt2")
    )
    with pytest.raises(ValueError, match=r"--backend onnx-int8: digits\.crops\.int8\.onnx was not written; choose"):
        serving_settings.measure(exported, "digits", spec, "onnx-int8")


def test_int8_without_its_file_is_refused_before_anything_is_exported(exported, run, capsys):
    before = (exported / "digits.mar").read_bytes()
    assert main([str(run), "--backend", "onnx-int8"]) == 2
    assert capsys.readouterr().err == "export: --backend onnx-int8: add --int8, which writes its file\n"
    assert (exported / "digits.mar").read_bytes() == before


def test_the_choice_stands_in_the_archives_settings_and_in_parity_json(exported):
    rows = json.loads((exported / "parity.json").read_text())["backends"]
    (row,) = (serving_settings.BackendRow(**row) for row in rows if row["chosen"])
    settings = (exported / serving_settings.CONFIG_FILE).read_text()
    assert row.backend == "onnx"  # as it was asked for
    chosen = {"backend": "onnx", "batchSize": serving_settings.batch_size(row)}
    assert {name: yaml.safe_load(settings)[name] for name in chosen} == chosen
    assert len(settings.splitlines()) == len(serving_settings.CONFIG.read_text().splitlines())


def test_settings_get_other_values_and_keep_every_comment():
    text = "# first\nb: 1  # of b\n\n'a': \"x\"   # of a: b\nlist: [b, a]\n"
    changed = serving_settings.with_values(text, {"a": "no", "b": 32})
    assert changed == "# first\nb: 32  # of b\n\n'a': 'no'   # of a: b\nlist: [b, a]\n"
    assert yaml.safe_load(changed) == {"b": 32, "a": "no", "list": ["b", "a"]}
    with pytest.raises(KeyError, match="absent"):
        serving_settings.with_values(text, {"absent": 1})


def test_only_what_an_export_chooses_may_differ_from_the_checkouts_settings(tmp_path):
    path, text = tmp_path / "model-config.yaml", serving_settings.CONFIG.read_text()
    rows = [serving_settings.BackendRow("pt2", {"1": 99.0, "8": 34}, True)]
    serving_settings.write_config(rows, path)
    assert path.read_text() != text
    assert serving_settings.is_this_checkouts(path)
    assert serving_settings.backend_of(path) == "pt2"
    path.write_text(path.read_text().replace("topk: 5", "topk: 6"))
    assert not serving_settings.is_this_checkouts(path)
    for backend in ("tensorrt", "[onnx]", "1"):
        path.write_text(
            serving_settings.with_values(text, {"backend": "x"}).replace("backend: x", f"backend: {backend}")
        )
        with pytest.raises(ValueError, match=r"as backend, not one of onnx, onnx-int8, torchscript, pt2"):
            serving_settings.backend_of(path)


@pytest.mark.parametrize(("milliseconds", "size"), [(0.03, 32), (2.1, 32), (4.9, 8), (9.6, 4), (34, 2), (900, 1)])
def test_a_batch_is_as_large_as_a_worker_answers_soon(milliseconds, size):
    assert (
        serving_settings.batch_size(serving_settings.BackendRow("onnx", {"1": 99.0, "8": milliseconds}, True)) == size
    )


def test_half_precision_channels_last_is_the_same_answer_but_for_rounding(exported):
    module, _ = torchscript.load(exported / "digits.pt")
    batch = torch.from_numpy(crops(16))
    with torch.inference_mode():
        expected = module.classify_crops(batch)
        got = backends.in_half(module)(batch)
        assert (got - expected).abs().max() <= backends.HALF_TOLERANCE
        assert got.dtype == torch.float32
        torch.testing.assert_close(module.classify_crops(batch), expected)  # the module itself is as it was


@pytest.mark.parametrize(("count", "filled"), [(1, 1), (3, 4), (33, 64), (64, 64), (65, 65)])
def test_a_gpus_batches_are_filled_up_to_a_recorded_size(count, filled):
    batch = crops(count)
    got = backends.fill_up(batch, backends.GPU_BATCHES)
    assert got.shape == (filled, 32, 32, 3)
    np.testing.assert_array_equal(got[:count], batch)
    assert not got[count:].any()


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("x"), RuntimeError("in TorchScript: CUDA out of memory. Tried to allocate")]
)
def test_a_batch_for_which_a_gpu_has_no_memory_is_halved_until_it_fits(answer, error):
    calls = []

    def small_gpu(batch):
        calls.append(len(batch))
        if len(batch) > 3:
            raise error
        return answer["onnx"](batch)

    batch = crops(11)
    got = backends.surviving(small_gpu)(batch)
    assert np.abs(got - answer["onnx"](batch)).max() <= 1e-5
    assert calls == [11, 5, 2, 3, 6, 3, 3]


def test_a_single_image_without_memory_is_said_to_torchserve_as_that():
    def full(batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match="no memory for one image"):
        backends.surviving(full)(crops(2))


def test_an_error_that_is_not_cudas_is_passed_on():
    def broken(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        backends.surviving(broken)(crops(2))


@pytest.mark.anywhere
@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access was encountered", "device-side assert triggered"]
)
def test_a_worker_whose_cuda_has_failed_ends_so_that_it_is_replaced(text):
    code = f"""
import numpy, predictor.backends
def broken(batch):
    raise RuntimeError({text!r})
try:
    predictor.backends.surviving(broken)(numpy.zeros((2, 4, 4, 3), numpy.uint8))
finally:
    print("still here")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (backends.STICKY, "")
    assert text in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_worker_answers_as_the_cpu_does(exported, answer):
    run = backends.load("onnx", exported, "digits", gpu=0)
    for count in (1, 3, 64, 65):
        batch = crops(count)
        assert np.abs(run(batch) - answer["torchscript"](batch)).max() <= backends.HALF_TOLERANCE


LAZY = """
import sys
import {first}
print("torch._C" in sys.modules)
import torch
print(torch.ones(2).sum().item(), "torch._C" in sys.modules)
from torch import nn
import torch.nn.functional as F
print(nn.Linear(2, 3).weight.shape[0], F.relu(torch.tensor(-1.0)).item())
"""


@pytest.mark.anywhere
@pytest.mark.parametrize("first", ["torch", "ts.protocol.otf_message_handler", "torch.nn"])
def test_torch_is_loaded_when_it_is_first_used(first):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAZY.format(first=first)],
        env={"PYTHONPATH": str(PROJECT / "handler"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = str(first == "torch.nn")
    assert done.stdout.splitlines() == [loaded, "2.0 True", "3 0.0"]
