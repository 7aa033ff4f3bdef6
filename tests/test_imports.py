"""The arrows: train.py → training → model ← export; the handler imports nothing of this repository."""

import ast
from pathlib import Path

import pytest

from tests.conftest import PROJECT

OURS = {"model", "training", "export", "handler", "clients", "deploy", "benchmarks", "train", "serve", "demo", "tests"}
OURS |= {"launcher"}

ALLOWED = {
    "model": {"model"},
    "training": {"training", "model"},
    "export": {"export", "model", "training", "handler"},  # of these two little: see below
    "handler": set(),
    "clients": set(),
    "deploy": {"deploy", "launcher", "predictor"},
    "launcher": {"launcher"},
    "train.py": {"training", "model"},
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


def test_export_asks_the_handler_for_its_backends_and_a_file_name_and_nothing_else():
    for path in (PROJECT / "export").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("handler"):
                assert node.module in ("predictor.backends", "predictor.golden_check"), path


def test_what_travels_in_the_archive_needs_installed_packages_only():
    assert imported(PROJECT / "model" / "images.py") & OURS == set()
    assert "torch" not in imported(PROJECT / "model" / "images.py")


def test_export_asks_training_for_its_data_and_nothing_else():
    for path in (PROJECT / "export").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training"):
                assert node.module == "training.data", path
            assert not (isinstance(node, ast.Import) and node.names[0].name.startswith("training")), path
