"""The commands of the README and of docs/, run as they are printed, from a fresh copy of the project."""

import errno
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import demo
import train
from export.proof.parity import ParityError
from launcher import ServerError, archives_of
from tests.conftest import PROJECT, label_of
from tests.folders import COLOURS, image
from tests.test_serve import running_in
from training import resolve
from training.command_line import parse
from training.failures import Diverged
from training.options import make_options

README = (PROJECT / "README.md").read_text()
DOCS = PROJECT / "docs"
PAGES = (
    "installation",
    "training",
    "onnx",
    "integrity",
    "serving",
)  # each goes on from what earlier ones have made


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
    # The last four are set by torch in its own process, and by the `make` that may have started this test.
    ours = ("JAVA_HOME", "PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR", "MAKELEVEL", "MAKEFLAGS", "MFLAGS")
    variables = {k: v for k, v in os.environ.items() if k not in ours} | environment
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=280, check=False)


def commands(page: str) -> str:
    return "\n".join(blocks((DOCS / f"{page}.md").read_text(), "sh"))


def test_the_commands_stand_at_the_top():
    make, own = blocks("\n".join(README.splitlines()[:40]), "sh")
    assert [line.split("#")[0].split() for line in make.splitlines()] == [["make", "demo"], ["make", "test"]]
    assert len(own.splitlines()) == 3
    for target in ("demo", "test", "serve", "check", "bench", "setup"):
        assert re.search(rf"^{target}:", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)


def test_no_command_is_left_out():
    """Commands stand in the README's two blocks and on PAGES, programs in Python in docs/onnx.md: all are run below."""
    assert len(blocks(README, "sh")) == 2
    assert {page.stem for page in DOCS.glob("*.md") if blocks(page.read_text(), "sh")} == set(PAGES)
    assert [page.stem for page in DOCS.glob("*.md") if blocks(page.read_text(), "python")] == ["onnx"]
    for page in (PROJECT / "README.md", *DOCS.glob("*.md")):
        fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for language, text in fences:
            assert language in ("sh", "python", ""), page
            if not language:  # a layout, or a command to be filled in
                assert re.search(r"\bDIR\b", text), f"{page}: not run by any test: {text}"


def test_the_readme_says_which_command_suits_how_many_photographs():
    """As docs/training.md does, with commands that take these options."""
    (table,) = re.findall(r"^\| photographs \|.*?\n\n", README, flags=re.DOTALL | re.MULTILINE)
    assert table in (DOCS / "training.md").read_text()
    assert re.findall(r"^\| ([\d,]+) \|", table, flags=re.MULTILINE) == ["500", "3,000", "50,000"]
    scratch = re.search(r"`(--recipe photos .*?)`", README)[1]
    commands = [*re.findall(r"`python train\.py (.*?)`", table), f"--data DIR --out runs/NAME {scratch}"]
    assert len(commands) == 3
    for command in commands:
        parsed, options = parse(shlex.split(command), None)
        assert make_options(None, options, parsed.recipe).data == "DIR"


@pytest.fixture
def folder_of_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `photos`, of 120×90 px."""
    for label, colour in COLOURS.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(20):
            image(colour, i, (120, 90)).save(tmp_path / "photos" / label / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_your_own_images_take_three_commands(folder_of_photos, exported, checkout, capsys, monkeypatch):
    """The first is run, for one epoch; of the others, which run below for another folder, what they would read."""
    learn, leave, serve = blocks(README, "sh")[1].splitlines()
    python, script, *options = shlex.split(learn)
    assert (python, script) == (".venv/bin/python", "train.py")
    monkeypatch.setattr(resolve, "DEFAULT_EPOCHS", 1)
    assert train.main(options) == 0
    said = capsys.readouterr().out
    assert said.startswith("60 images in 3 classes")
    assert "these are photographs: timm/tf_efficientnet_lite0" in said
    assert "python -m export runs/photos" in said
    assert leave == ".venv/bin/python -m export runs/photos"
    shutil.copytree(exported, folder_of_photos / "runs" / "photos" / "export")
    (checkout / ".venv" / "ready").touch()
    said = shell(f"make --dry-run {serve.removeprefix('make ')}", checkout).stdout
    assert said.split() == [".venv/bin/python", "serve.py", "runs/photos"]
    assert archives_of(Path("runs/photos/export"))


@pytest.mark.server
def test_the_pages_work_as_they_are_printed_one_after_the_other(checkout, tmp_path):
    for port in (8080, 8081, 8082, 7070, 7071):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port}, which docs/ uses, is taken by another program on this machine")
    script = "\n".join(map(commands, PAGES))
    assert "\npython -m export runs/digits\n" in script  # whose archive runs what is fastest here; mostly it is this
    script = script.replace("\npython -m export runs/digits\n", "\npython -m export runs/digits --backend onnx\n")
    for command in (
        "train.py",
        "export --check",
        "-m predictor",
        "torch-model-archiver",
        "torchserve --start",
        "curl",
        "--stop",
    ):
        assert command in script
    try:
        done = shell(script, checkout, TMPDIR=str(tmp_path), TEMP=str(tmp_path))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run = checkout / "runs" / "digits"
        assert "digits.mar: OK\n" in done.stdout
        files = len((run / "export" / "SHA256SUMS").read_text().splitlines())
        assert f"\n{files} files: the sums agree. Nothing was run" in done.stdout
        assert (checkout / "key.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")
        seven, three = (label_of(run, (run / "samples" / f"{digit}-0.png").read_bytes()) for digit in (7, 3))
        assert f'{{"{seven}": 0.' in done.stdout
        assert f'"predictions": {{"{three}": 0.' in done.stdout
        assert '"status": "Healthy"' in done.stdout
        rows = (checkout / "predictions.csv").read_text().splitlines()
        assert len(rows) == 1 + len(list((run / "samples").iterdir()))
        assert "TorchServe has stopped" in done.stdout
        printed = next(line for line in done.stdout.splitlines() if line.startswith("torch-model-archiver"))
        assert printed in script  # what export runs is what the page says
    finally:
        shell(". .venv/bin/activate; torchserve --stop --foreground || true", checkout, TMPDIR=str(tmp_path))
    assert not running_in(checkout)


@pytest.mark.server
def test_the_onnx_example_works_as_it_is_printed(exported, run, label, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run)
    (program,) = blocks((DOCS / "onnx.md").read_text(), "python")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{label}\n"


@pytest.mark.server
def test_the_demo_works_and_leaves_nothing_behind(checkout, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (checkout / ".venv" / "ready").touch()
    command = shell("make --dry-run demo", checkout).stdout.strip()
    assert command == ".venv/bin/python demo.py --at-least 0.95"
    script = ". .venv/bin/activate; python demo.py --at-least 0.5 --out runs/demo"  # runs/digits is that of the pages
    done = shell(script, checkout, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "image" in done.stdout
    assert "probability" in done.stdout
    assert "over HTTP" in done.stdout
    assert list(temporary.iterdir()) == []
    assert not running_in(checkout)


@pytest.fixture
def demo_trains(monkeypatch):
    """Calls demo.py for a folder and an epoch; what follows the training is left out, and gives 1."""
    monkeypatch.setattr("export.pipeline.export_run", lambda run: [SimpleNamespace(passed=False)])
    return lambda out, *more: demo.main(["--epochs", "1", "--out", str(out), *more])


def test_the_demo_replaces_its_own_run_and_no_other(tmp_path, capsys, demo_trains):
    out = tmp_path / "a run"
    assert demo_trains(out) == 1
    before = (out / "model.pt").stat().st_mtime_ns
    assert demo_trains(out) == 1
    trained = (out / "model.pt").stat().st_mtime_ns
    assert trained != before
    capsys.readouterr()
    refusal = f"demo.py: --out {out}: holds a run that is not this demo's (model.pt); pass another --out\n"
    for others in (["--epochs", "2"], ["--arch", "fastnet_small"], ["--data", "mnist"]):
        assert demo_trains(out, *others) == 2
        assert capsys.readouterr().err == refusal
    for text in ("epochs: [", ""):
        (out / "config.yaml").write_text(text)
        assert demo_trains(out) == 2
        assert capsys.readouterr().err == refusal
    (out / "config.yaml").unlink()
    assert demo_trains(out) == 2
    assert capsys.readouterr().err == refusal
    assert (out / "model.pt").stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.EACCES, "Permission denied"), 2, "[Errno 13] Permission denied"),
        (Diverged("the loss is nan"), 2, "the loss is nan"),
        (ParityError("no images"), 2, "no images"),
        (ServerError("no Java"), 2, "no Java"),
    ],
)
def test_whatever_ends_the_demo_is_one_line(tmp_path, monkeypatch, capsys, error, code, words):
    def ends(*_, **__):
        raise error

    monkeypatch.setattr("train.train", ends)
    assert demo.main(["--out", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err == f"demo.py: {words}\n"


def test_the_demo_fails_where_it_should(tmp_path, capsys):
    results = [demo.Result("1.png", "a", "a", 0.9, 1.0)] * 9 + [demo.Result("2.png", "a", "b", 0.8, 1.0)]
    options = type("TrainOptions", (), {"out": tmp_path, "at_least": 0.95})
    demo.print_table(results)
    assert "wrong" in capsys.readouterr().out
    assert demo.verdict(results, 0.9, options, 1.0) == 1
    assert "fewer than 95%" in capsys.readouterr().out
    options.at_least = 0.9
    assert demo.verdict(results, 0.7, options, 1.0) == 1
    assert "same accuracy over HTTP" in capsys.readouterr().out
    assert demo.verdict(results, 0.9, options, 1.0) == 0
    assert demo.verdict(results, 1.0, options, 1.0) == 0  # one near tie
    assert demo.main(["--data", "no/such", "--out", str(tmp_path)]) == 2
