"""The export folder is the earlier one or the new one, whatever stops the exchange, and a user's files stay."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from export import output_folder
from tests.conftest import PROJECT

# Exports anew in a process of its own that is stopped at its first operation on files, then its second, and so on.
STOPPED_EVERYWHERE = """
import errno, json, os, signal, sys
from pathlib import Path
from export import output_folder

root, how, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "exchange"
if not exchange:
    output_folder._exchange = lambda one, other: False


def make(folder, text, names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(text)
    (folder / "manifest.json").write_text(json.dumps({"files": names}))


def state(target):
    return {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}


def export(run):
    with output_folder.alone(run), output_folder.building(run) as new:
        new.rmdir()
        make(new, "new", ["a.pt", "a.onnx"])
        with output_folder.replacing(new, run / "export"):
            pass


def stop_at(step):
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.")):
            count += 1
            if count == step and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == step:
                raise KeyboardInterrupt if how == "interrupt" else OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(hook)
    return lambda: count < step


own = {"notes.txt": "mine", "more/notes.txt": "mine"}
states = {"old": 0, "new": 0, "between": 0}
for step in range(1, 10_000):
    run = root / str(step)
    make(run / "export", "old", ["a.pt", "b.mar"])
    (run / "export" / "more").mkdir()
    for name, text in own.items():
        (run / "export" / name).write_text(text)
    old = state(run / "export")
    new = {"a.pt": "new", "a.onnx": "new", "manifest.json": json.dumps({"files": ["a.pt", "a.onnx"]})} | own
    child = os.fork()
    if not child:
        unreached = stop_at(step)
        try:
            export(run)
        except (OSError, ValueError, KeyboardInterrupt):
            os._exit(1)
        os._exit(2 if unreached() else 0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 2:
        break
    found = state(run / "export")
    kind = "old" if found == old else "new" if found == new else "between"
    states[kind] += 1
    assert kind != "between" or not found, (step, found)
    with output_folder.alone(run):  # the next export's first step
        pass
    assert state(run / "export") in (old, new), (step, found)
    assert [path.name for path in run.iterdir()] == ["export"], (step, list(run.iterdir()))
print(json.dumps(states))
"""


@pytest.mark.parametrize("exchange", ["exchange", "two renames"])
@pytest.mark.parametrize("how", ["kill", "full", "interrupt"])
def test_stopped_at_any_operation_the_export_is_the_old_one_or_the_new_one(tmp_path, how, exchange):
    line = [sys.executable, "-c", STOPPED_EVERYWHERE, str(tmp_path), how, exchange]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert states["old"] > 20
    assert states["new"] > 5
    if exchange == "exchange" or how == "full":
        assert states["between"] == 0
    else:  # the next export puts it back
        assert states["between"] <= 3


@pytest.fixture
def run(tmp_path):
    """A run whose export is one of before there was a manifest: it has sums, which name a user's file too."""
    target = tmp_path / "cats" / "export"
    target.mkdir(parents=True)
    for name in ("digits.pt", "digits.crops.onnx", "digits.mar", "parity.json", "notes.txt", "digits-1.0.mar"):
        (target / name).write_text("old")
    names = sorted(path.name for path in target.iterdir())
    (target / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    return tmp_path / "cats"


def export(run, *names):
    with output_folder.alone(run), output_folder.building(run) as new:
        for name in names:
            (new / name).write_text("new")
        with output_folder.replacing(new, run / "export"):
            pass
    return {path.name: path.read_text() for path in (run / "export").iterdir()}


def test_of_an_earlier_version_goes_what_it_wrote_and_nothing_else(run):
    assert export(run, "cats.pt", "cats.mar") == {
        "cats.pt": "new", "cats.mar": "new", "notes.txt": "old", "digits-1.0.mar": "old",
    }  # fmt: skip


def test_where_nothing_tells_what_was_written_all_other_files_stay(run):
    (run / "export" / "SHA256SUMS").unlink()
    assert export(run, "cats.pt") == {
        "cats.pt": "new", "digits.pt": "old", "digits.crops.onnx": "old", "digits.mar": "old", "notes.txt": "old",
        "digits-1.0.mar": "old",
    }  # fmt: skip


def test_a_file_of_the_users_that_an_export_may_write_is_not_replaced(run):
    (run / "export" / "cats.int8.onnx").write_text("mine")
    with pytest.raises(ValueError, match=r"cats\.int8\.onnx: no export wrote it, and this one may write that name"):
        output_folder.check(run / "export", output_folder.all_files("cats"))
    output_folder.check(run / "export", output_folder.all_files("digits"))


@pytest.mark.parametrize("name", ["archive", "archive/notes.txt"])
def test_a_file_of_the_users_where_the_archives_files_lie_is_not_replaced(run, name):
    for left in ("SHA256SUMS", name):  # and if nothing tells what was written
        (run / "export" / "SHA256SUMS").unlink(missing_ok=left == name)
        (run / "export" / name).parent.mkdir(exist_ok=True)
        (run / "export" / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name}: no export wrote it, and this one may write that name"):
            output_folder.check(run / "export", set())


def test_the_archives_files_of_the_earlier_export_go_with_it(run):
    (run / "export" / "archive" / "handler").mkdir(parents=True)
    (run / "export" / "archive" / "handler" / "old.py").write_text("old")
    written = {"files": ["archive/handler/old.py", "digits.pt"]}
    (run / "export" / "manifest.json").write_text(json.dumps(written))
    output_folder.check(run / "export", {"digits.pt"})
    assert set(export(run, "cats.pt")) == {"cats.pt", "digits.crops.onnx", "digits.mar", "parity.json", "notes.txt",
                                           "digits-1.0.mar"}  # fmt: skip


def test_what_killed_exports_left_goes_at_the_next_one_and_what_looks_like_it_stays(run, tmp_path):
    (run / ".export-abcd_123" / "deep").mkdir(parents=True)  # of before there was a swap
    (run / ".export-new-abcd_123").mkdir()
    (run / ".export-old-abcd_123").mkdir()
    (run / "export" / ".archive-abcd_123").mkdir()
    (run / "export" / ".archive-abcd_123" / "x").write_text("x")
    (run / "export" / ".digits.pt.abcd_123.tmp").write_text("x")
    (run / ".export-of-mine").mkdir()
    (run / ".export-new-link_123").symlink_to(tmp_path)
    export(run, "cats.pt")
    assert sorted(path.name for path in run.iterdir()) == [".export-new-link_123", ".export-of-mine", "export"]
    assert not [path.name for path in (run / "export").iterdir() if path.name.startswith(".")]


def test_two_exports_of_one_run_do_not_meet_and_what_the_first_has_is_not_removed(run):
    program = (
        "import sys; from pathlib import Path; from export import output_folder\n"
        "with output_folder.alone(Path(sys.argv[1])): pass"
    )
    with output_folder.alone(run), output_folder.building(run) as new:
        done = subprocess.run([sys.executable, "-c", program, str(run)], cwd=PROJECT, capture_output=True, text=True)
        assert f"ValueError: {run}: another process works on this run; wait for it, or stop it" in done.stderr
        assert new.is_dir()


def test_what_cannot_be_swapped_is_said_in_one_line_and_the_old_one_stays(run, monkeypatch):
    monkeypatch.setattr(output_folder, "_exchange", lambda *_: False)
    rename = output_folder.Path.rename

    def refuse(self, target):
        if self.name == "export" and self.parent.name.startswith(".export-new-"):
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(output_folder.Path, "rename", refuse)
    with pytest.raises(ValueError, match="cannot be replaced as a whole"):
        export(run, "cats.pt")
    assert (run / "export" / "digits.mar").read_text() == "old"
    assert [path.name for path in run.iterdir()] == ["export"]
