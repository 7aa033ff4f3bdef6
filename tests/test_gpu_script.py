"""benchmarks/gpu.sh: what it runs, in which order, and what a part that fails costs. The programs are stand-ins here;
`benchmarks/gpu.sh --dry-run` runs the real ones, for three minutes."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import PROJECT

PYTHON = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  -c*) exit {no_gpu} ;;
  *"{failing}"*) exit 1 ;;
  *"-m export"*) mkdir -p "$3/export" && echo '{{"rows": []}}' > "$3/export/parity.json" ;;
esac
"""


@pytest.fixture
def gpu_sh(tmp_path):
    """Runs a copy of the script from the folder above it, with programs of ours; returns what it called too."""
    (tmp_path / "project" / "benchmarks").mkdir(parents=True)
    script = shutil.copy(PROJECT / "benchmarks" / "gpu.sh", tmp_path / "project" / "benchmarks")
    (tmp_path / "bin").mkdir()
    (tmp_path / "data.tar").touch()
    log = tmp_path / "log"

    def run(*arguments, failing="nothing", gpu=True, **variables):
        log.write_text("")
        programs = {"python": PYTHON.format(log=log, no_gpu=int(not gpu), failing=failing), "nvidia-smi": "#!/bin/sh\n"}
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "bin/python", **variables}
        command = ["bash", script, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done, [line for line in log.read_text().splitlines() if not line.startswith("-c")]

    return run


def names(called):
    return [words.split()[1].rpartition(".")[2] if words[0] == "-" else words.split()[0] for words in called]


ALL = ["cold", "training", "serving", "train.py", "export"]


def test_a_dry_run_does_everything_on_the_cpu_and_keeps_nothing(gpu_sh, tmp_path):
    done, called = gpu_sh("--dry-run", gpu=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert names(called) == ALL
    assert all("--device cpu" in called[i] for i in (0, 1, 3))
    assert "cuda" not in "".join(called)
    assert not (tmp_path / "project" / "benchmarks" / "results").exists()


def test_on_a_gpu_the_figures_are_kept_and_relative_paths_hold(gpu_sh, tmp_path):
    done, called = gpu_sh(DATA="data.tar")
    assert (done.returncode, done.stderr) == (0, "")
    assert names(called) == ALL
    assert f"--data {tmp_path / 'data.tar'} " in called[0]
    assert "--rounds 3 --device cuda" in called[0]
    results = tmp_path / "project" / "benchmarks" / "results" / "gpu"
    assert f"--json {results / 'cold.json'}" in called[0]
    assert [path.name for path in results.iterdir()] == ["parity.json"]
    assert names(gpu_sh()[1]) == ALL[2:]  # without DATA


@pytest.mark.parametrize("part", ["benchmarks.cold", "benchmarks.serving", "-m export"])
def test_a_part_that_fails_keeps_no_other_from_running(gpu_sh, part):
    done, called = gpu_sh(DATA="data.tar", failing=part)
    assert done.returncode == 1
    assert names(called) == ALL


def test_without_a_gpu_it_says_so(gpu_sh):
    done, called = gpu_sh(gpu=False)
    assert (done.returncode, called) == (2, [])
    assert done.stderr.startswith("gpu.sh: PyTorch sees no CUDA GPU")
    assert done.stderr.count("\n") == 1
