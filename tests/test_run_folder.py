"""The run folder: what is found out about it before an image is read, and what an early end leaves in it."""

import contextlib
import csv
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from export.pipeline import serve_command
from model import checkpoint
from predictor import files
from tests.conftest import PROJECT
from tests.folders import make_folder
from tests.learning import before_step
from train import main, train
from training import console, run_folder
from training.console import export_command, on_terminal
from training.options import TrainOptions
from training.run_folder import claimed
from training.schedule import Schedule

DIGITS = ["--data", "digits", "--epochs", "1"]


@pytest.fixture
def no_reading(monkeypatch):
    """The data must not be read."""

    def reads(*_, **__):
        raise AssertionError("the data was read first")

    monkeypatch.setattr("training.start.load", reads)


def refused(arguments, words, capsys):
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["model.pt", "last.ckpt"])
def test_a_run_is_not_overwritten_unless_one_says_so(tmp_path, capsys, monkeypatch, name):
    out = tmp_path / "a run"
    out.mkdir()
    (out / name).write_text("work")
    with monkeypatch.context() as patch:
        patch.setattr("training.start.load", lambda *_, **__: pytest.fail("the data was read first"))
        words = f"holds a run already ({name}); go on with it (--resume '{out}'), choose another folder, or pass --over"
        refused([*DIGITS, "--out", out], words, capsys)
    assert (out / name).read_text() == "work"
    assert main([*DIGITS, "--out", str(out), "--overwrite"]) == 0
    assert (out / "spec.json").exists()
    assert checkpoint.load(out / "last.ckpt")["epoch"] == 1


def test_overwrite_goes_with_a_new_run_only(run, capsys):
    refused(["--resume", run, "--overwrite"], "leave --overwrite out", capsys)
    refused(["--evaluate", run, "--overwrite"], "leave --overwrite out", capsys)


@pytest.mark.parametrize(
    ("place", "words"),
    [(".", "is the folder of --data"), ("runs/a", "lies in --data"), ("..", "holds --data"), ("link", "is the folder")],
)
def test_the_run_folder_lies_apart_from_the_data(tmp_path, capsys, no_reading, place, words):
    data = make_folder(tmp_path / "colours" / "data", count=4)
    (data / "link").symlink_to(data)
    before = sorted(data.rglob("*"))
    refused(["--data", data, "--out", data / place], words, capsys)
    assert sorted(data.rglob("*")) == before


def test_a_second_training_is_kept_out(tmp_path, capsys, no_reading):
    out = tmp_path / "run"
    with claimed(out, "digits"):
        refused([*DIGITS, "--out", out], "another training is at work there", capsys)
        refused([*DIGITS, "--out", out, "--overwrite"], "another training is at work there", capsys)
        (out / "config.yaml").write_text("data: digits\nout: x\n")
        refused(["--resume", out], "another training is at work there", capsys)
    with claimed(out, "digits"):
        pass  # it is free again


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda out: out.mkdir(parents=True) or (out / "report").write_text(""),
            "report: is a file where the run needs a folder",
        ),
        (lambda out: (out / "model.pt").mkdir(parents=True), "model.pt is a folder, where a file must go"),
        (lambda out: out.parent.mkdir() or out.write_text(""), "is a file; name a folder"),
        (lambda out: out.parent.write_text(""), f"{os.sep}up is a file; name a folder"),
        (lambda out: out.mkdir(parents=True) or (out / "samples").symlink_to(PROJECT), "samples: is a link"),
    ],
)
def test_what_stands_in_the_way_is_found_before_an_image_is_read(tmp_path, capsys, no_reading, make, words):
    make(tmp_path / "up" / "run")
    refused([*DIGITS, "--out", tmp_path / "up" / "run"], words, capsys)


def test_a_folder_that_cannot_be_written_is_found_before_an_image_is_read(tmp_path, capsys, no_reading, monkeypatch):
    (tmp_path / "run" / "report").mkdir(parents=True)

    def read_only(dir):
        if dir.name == "report":
            raise PermissionError(errno.EACCES, "Permission denied")
        return contextlib.closing(contextlib.nullcontext())

    class File:
        def close(self):
            pass

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", lambda dir: read_only(dir) and File())
    words = f"{tmp_path / 'run' / 'report'} cannot be written (Permission denied); mend its permissions or choose"
    refused([*DIGITS, "--out", tmp_path / "run"], words, capsys)


def test_a_folder_that_cannot_be_made_is_found_before_an_image_is_read(capsys, no_reading):
    refused([*DIGITS, "--out", "/proc/run"], "--out /proc/run: cannot be written (", capsys)


def test_leftovers_of_a_kill_are_removed_when_the_run_goes_on_or_begins_anew(tmp_path):
    out = tmp_path / "run"
    assert main([*DIGITS, "--out", str(out)]) == 0
    for arguments in (["--resume", str(out)], [*DIGITS, "--out", str(out), "--overwrite"]):
        for name in (
            *(".last.ckpt.a1b2_3d4.tmp", ".model.pt.abcdefgh.tmp", ".splits.json.gz.abcdefgh.tmp"),
            *(".samples.json.abcdefgh.tmp", "samples/.3-0.png.abcdefgh.tmp", "samples/.[0].png.abcdefgh.tmp"),
            *("report/.curves.png.abcdefgh.tmp", "report/.confusion.png.abcdefgh.tmp"),
        ):
            (out / name).write_bytes(b"half")
        (out / ".mine.tmp").write_text("")
        assert main(arguments) == 0
        assert [path.name for path in out.rglob("*.tmp")] == [".mine.tmp"]


def test_what_a_kill_leaves_is_what_is_looked_for(tmp_path):
    code = f"""
import os, runpy
files = runpy.run_path({files.__file__!r})
with files["atomic_write"]({str(tmp_path / "last.ckpt")!r}):
    os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    files.remove_leftovers(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def little_room(size):
    """No file may become larger: to the program a full disk, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100_000, 50_000_000])
def test_a_checkpoint_that_does_not_fit_says_why_and_leaves_the_old_one(tmp_path, size):
    checkpoint.save({"w": torch.zeros(1)}, tmp_path / "last.ckpt")
    with little_room(size), pytest.raises(OSError, match="File too large"):
        checkpoint.save({"w": torch.zeros(size // 4 + 1)}, tmp_path / "last.ckpt")
    assert checkpoint.load(tmp_path / "last.ckpt")["w"].shape == (1,)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("when", ["in an epoch", "at the end"])
def test_a_full_disk_ends_a_run_in_one_line_and_it_can_go_on(tmp_path, capsys, monkeypatch, when):
    out, real = tmp_path / "run", files.atomic_write

    @contextlib.contextmanager
    def full(path):
        with real(path) as file:
            yield file
            history = out / "history.csv"
            late = history.exists() and len(history.read_text().splitlines()) > 2
            if late and path.name == ("last.ckpt" if when == "in an epoch" else "metrics.json"):
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for module in ("model.checkpoint", "predictor.files"):
            patch.setattr(f"{module}.atomic_write", full)
        refused([*DIGITS, "--epochs", "3", "--out", out], f"{out}: cannot be written (No space left on device)", capsys)
        assert checkpoint.load(out / "last.ckpt")["epoch"] == (2 if when == "in an epoch" else 3)
    assert main(["--resume", str(out)]) == 0
    assert checkpoint.load(out / "last.ckpt")["epoch"] == 3
    assert (out / "metrics.json").exists()


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", [0, 5])
def test_ctrl_c_in_the_first_epoch_writes_no_untrained_weights(tmp_path, capsys, step):
    out = tmp_path / "run"
    with before_step(step, ctrl_c):
        assert main(["--data", "digits", "--out", str(out)]) == 130
    error = capsys.readouterr().err
    assert error == "train.py: interrupted before the first epoch was over: there are no weights to keep\n"
    assert {path.name for path in out.iterdir() if path.is_file()} == {"splits.json.gz", "config.yaml"}
    assert main([*DIGITS, "--out", str(out)]) == 0  # nothing is in the way


def test_ctrl_c_in_a_later_epoch_leaves_that_one_out_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "run"
    with before_step(41 + 5, ctrl_c):
        assert main(["--data", "digits", "--out", str(out)]) == 0
    assert "interrupted: the best weights so far are kept" in capsys.readouterr().err
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1"]
    assert (out / "spec.json").exists()


def test_ctrl_c_while_reading_is_one_line(tmp_path, capsys, monkeypatch):
    def reads(*_, **__):
        assert threading.current_thread() is threading.main_thread()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("training.start.load", reads)
    assert main([*DIGITS, "--out", str(tmp_path / "runs" / "run")]) == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def ends_in_the_middle(monkeypatch, epochs):
    """The time of --minutes is over after so many epochs, of 41 steps each."""
    real = Schedule._look

    def look(self, done):
        real(self, done)
        self.progress = min(1, done / epochs)
        return done / epochs

    monkeypatch.setattr(Schedule, "_look", look)


def test_a_part_of_an_epoch_at_the_end_is_none_in_the_history(tmp_path, capsys, monkeypatch):
    ends_in_the_middle(monkeypatch, 2.5)
    with on_terminal():
        metrics = train(TrainOptions(data="digits", out=str(tmp_path / "run"), minutes=99))
    rows = list(csv.DictReader((tmp_path / "run" / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "2.51"]  # 21 steps of 41
    assert metrics["train"]["epochs"] == 2.51
    assert "epoch 2.51 " in capsys.readouterr().out


def test_a_run_that_goes_on_after_a_part_of_an_epoch_counts_from_there(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        ends_in_the_middle(patch, 1.5)
        train(TrainOptions(data="digits", out=str(out), minutes=99))
    with monkeypatch.context() as patch:
        ends_in_the_middle(patch, 3)
        assert main(["--resume", str(out), "--minutes", "100"]) == 0
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "1.51", "2.51"]


def test_elsewhere_than_on_a_terminal_a_line_comes_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_A_LINE", 0)
    assert main([*DIGITS, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1: ")]
    assert len(lines) == 41
    assert lines[9].startswith("epoch 1/1: 320 of 1,293 images, loss ")
    for words in ("images/s", "left of the epoch", "of the run"):
        assert words in lines[9]


def test_between_those_nothing_is_printed(tmp_path, capsys):
    assert main([*DIGITS, "--out", str(tmp_path / "run")]) == 0
    assert "left of the epoch" not in capsys.readouterr().out


def test_on_a_terminal_a_bar_has_the_speed_and_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    assert main([*DIGITS, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "epoch 1/1" in said.err
    assert " images/s" in said.err
    assert "run 00:00 left" in said.err
    assert "left of the epoch" not in said.out
    assert re.search(r"\rreading: .*/1797 \[.* images/s\]", said.err)


def test_elsewhere_the_reading_too_says_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_A_LINE", 0)
    assert main([*DIGITS, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reading: ")]
    assert re.fullmatch(r"reading: 1,797 of 1,797 images, [\d,]+\.\d images/s, 00:00 left", lines[-1])


@pytest.mark.parametrize(
    ("out", "command"),
    [
        ("runs/digits", "python -m export runs/digits"),
        ("runs/my run", "python -m export 'runs/my run' --name my-run"),
        ("runs/猫", "python -m export runs/猫 --name model"),
    ],
)
def test_the_export_command_can_be_pasted(tmp_path, monkeypatch, out, command):
    monkeypatch.chdir(tmp_path)
    assert export_command(run_folder.Path(out)) == command.replace("runs/猫", "'runs/猫'")


@pytest.mark.parametrize("name", ["samples", "report"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_run_does_not_write_through_links(tmp_path, capsys, name, kind):
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.mkdir()
    (mine / "photo.png").write_bytes(b"mine")
    (mine / "index.html").write_bytes(b"mine")
    if kind == "link":
        (run / name).symlink_to(mine)
    else:
        (run / name).write_bytes(b"mine")
    assert main(["--data", "digits", "--epochs", "1", "--out", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{run / name}: is a {kind}" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == {"photo.png": b"mine", "index.html": b"mine"}
    assert [path.name for path in run.iterdir()] == [name]  # found before anything was read


@pytest.mark.parametrize(
    ("folder", "export", "serve"),
    [
        ("runs/digits", "python -m export runs/digits", "make serve RUN=runs/digits"),
        ("my runs/a", "python -m export 'my runs/a'", "python serve.py 'my runs/a'"),
        ("runs/my pets", "python -m export 'runs/my pets' --name my-pets", "python serve.py 'runs/my pets'"),
        ("runs/$(ls)é", "python -m export 'runs/$(ls)é' --name ls-", "python serve.py 'runs/$(ls)é'"),
    ],
)
def test_the_next_command_can_be_pasted(folder, export, serve):
    assert export_command(Path(folder)) == export
    assert serve_command(Path(folder)) == serve
