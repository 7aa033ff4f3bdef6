"""The arrows go down only: train.py, training, export → dataset, model → predictor ← handler."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

OURS = {
    *(
        "predictor",
        "handler",
        "model",
        "dataset",
        "training",
        "audit",
        "export",
        "launcher",
        "clients",
        "deploy",
        "benchmarks",
    ),
    *("train", "serve", "demo", "tests"),
}

ALLOWED = {
    "predictor": {"predictor"},
    "handler": {"handler", "predictor"},
    "dataset": {"dataset", "predictor"},
    "model": {"model", "predictor"},
    "training": {"training", "dataset", "model", "predictor"},
    "export": {"export", "dataset", "model", "predictor"},
    "clients": {"predictor"},  # the batch job: that of the archive which it is given
    "deploy": {"deploy", "launcher", "predictor"},
    "launcher": {"launcher", "predictor"},  # the spec: is an archive that of its run?
    "train.py": {"training", "dataset", "model", "predictor"},
    "serve.py": {"launcher"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}: imports are absolute, so that export/graphs/onnx.py is never taken for onnx"
            )
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("place", ALLOWED)
def test_the_arrows_go_one_way(place):
    path = PROJECT / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    for file in files:
        assert imported(file) & OURS <= ALLOWED[place], file


def test_the_process_that_decodes_loads_nothing_heavy():
    """It starts beside every worker, and again whenever an image has ended it."""
    code = "import sys, predictor.decoder_process; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "onnxruntime", "ts", "yaml", "tqdm", "handler", "model"}
    assert {name for name in done.stdout.split() if name.startswith("predictor")} == {
        "predictor", "predictor.colour_profiles", "predictor.decoder_process", "predictor.files",
        "predictor.image_headers", "predictor.pillow_preprocessing", "predictor.spec",
    }  # fmt: skip


def test_the_spec_needs_the_standard_library_alone():
    code = "import sys; before = set(sys.modules); import predictor.spec; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) == {"predictor"}
