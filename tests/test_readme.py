"""The README's commands, run as they are printed, from a fresh copy of the project."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from export.package.archive import IN_STAGE
from tests.conftest import PROJECT, label_of
from tests.test_serve import running_in

README = (PROJECT / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this project, without what is made in it, and with its environment."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    made = shutil.ignore_patterns(".*", "__pycache__", "build", "node_modules", "runs", "logs", "key_file.json")
    shutil.copytree(PROJECT, folder, ignore=made)
    (folder / ".venv" / "bin").mkdir(parents=True)
    binaries = Path(sys.executable).parent
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{binaries}:$PATH"; export PATH\n')
    return folder


def shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("JAVA_HOME", "PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")  # torch sets the last one in its own process
    variables = {k: v for k, v in os.environ.items() if k not in ours} | environment
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False)


def test_the_commands_stand_at_the_top():
    top = "\n".join(README.splitlines()[:25])
    assert "make demo" in top
    assert "make test" in top
    for target in ("demo", "test", "serve", "check", "bench", "setup"):
        assert re.search(rf"^{target}:", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.server
def test_step_by_step_works_as_it_is_printed(checkout, tmp_path):
    for port in (8080, 8081, 8082, 7070, 7071):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port}, which the README uses, is taken by another program on this machine")
    script = "\n".join(blocks(section("Step by step"), "sh"))
    assert "\npython -m export runs/digits\n" in script  # whose archive runs what is fastest here; mostly it is this
    script = script.replace("\npython -m export runs/digits\n", "\npython -m export runs/digits --backend onnx\n")
    for command in ("train.py", "python -m export", "torch-model-archiver", "torchserve --start", "curl", "--stop"):
        assert command in script
    try:
        done = shell(script, checkout, TMPDIR=str(tmp_path), TEMP=str(tmp_path))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run = checkout / "runs" / "digits"
        seven, three = (label_of(run, (run / "samples" / f"{digit}-0.png").read_bytes()) for digit in (7, 3))
        assert f'{{"{seven}": 0.' in done.stdout
        assert f'"answer": {{"{three}": 0.' in done.stdout
        assert '"status": "Healthy"' in done.stdout
        assert "TorchServe has stopped" in done.stdout
        printed = next(line for line in done.stdout.splitlines() if line.startswith("torch-model-archiver"))
        assert printed in script  # what export runs is what the README says
    finally:
        shell(". .venv/bin/activate; torchserve --stop --foreground || true", checkout, TMPDIR=str(tmp_path))
    assert not running_in(checkout)


@pytest.mark.server
def test_the_onnx_example_works_as_it_is_printed(exported, run, label, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run)
    (program,) = blocks(section("The ONNX files"), "python")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{label}\n"


def test_the_check_works_as_it_is_printed(exported, run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run)
    (program,) = blocks(section("The ONNX files"), "sh")
    python = f'python() {{ "{sys.executable}" "$@"; }}'
    done = shell(f"{python}\nexport PYTHONPATH='{PROJECT}'\n{program}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{14 + len(IN_STAGE)} files: the sums agree. Nothing was run")


@pytest.mark.server
def test_the_demo_works_and_leaves_nothing_behind(checkout, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = shell(". .venv/bin/activate; python demo.py --at-least 0.5", checkout, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "image" in done.stdout
    assert "probability" in done.stdout
    assert "over HTTP" in done.stdout
    assert list(temporary.iterdir()) == []
    assert not running_in(checkout)


def test_the_demo_fails_where_it_should(tmp_path, capsys):
    import demo

    results = [demo.Result("1.png", "a", "a", 0.9, 1.0)] * 9 + [demo.Result("2.png", "a", "b", 0.8, 1.0)]
    options = type("Options", (), {"out": tmp_path, "at_least": 0.95})
    demo.print_table(results)
    assert "wrong" in capsys.readouterr().out
    assert demo.verdict(results, 0.9, options, 1.0) == 1
    assert "fewer than 95%" in capsys.readouterr().out
    assert demo.verdict(results, 0.95, options, 1.0) == 1
    assert "same accuracy over HTTP" in capsys.readouterr().out
    options.at_least = 0.9
    assert demo.verdict(results, 0.9, options, 1.0) == 0
    assert demo.main(["--data", "no/such", "--out", str(tmp_path)]) == 2
