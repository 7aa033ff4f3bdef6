"""clients/batch with a real Ray and real kills: one row for each image, and the predictions of the endpoint."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests

from clients.batch.classify import Model, main
from tests.conftest import PROJECT

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'ray[data]'", allow_module_level=True)
parquet = pytest.importorskip("pyarrow.parquet")

IMAGES = 800
SCRIPT = PROJECT / "clients" / "batch" / "classify.py"


@pytest.fixture(scope="module")
def archive(exported) -> Path:
    return exported / "digits.mar"


@pytest.fixture(scope="module")
def many(run, tmp_path_factory) -> Path:
    """A folder of folders with many images, names of every kind, and some that are none."""
    folder = tmp_path_factory.mktemp("images")
    samples = sorted((run / "samples").iterdir())
    for i in range(IMAGES - 3):
        path = folder / f"{i % 7}" / f"{i:05d} ü\n.png" if i % 400 == 0 else folder / f"{i % 7}" / f"{i:05d}.png"
        path.parent.mkdir(exist_ok=True)
        os.link(samples[i % len(samples)], path)
    (folder / "0" / "empty.jpg").touch()
    (folder / "1" / "cut.png").write_bytes(samples[0].read_bytes()[:60])
    (folder / "gone.webp").symlink_to("nowhere")
    (folder / ".hidden.png").touch()
    (folder / "notes.txt").touch()
    return folder


def rows(out: Path) -> list[dict]:
    return [row for file in sorted(out.glob("part-*")) for row in parquet.read_table(file).to_pylist()]


def start(archive: Path, images: Path, out: Path, part_size: int = 10) -> subprocess.Popen:
    """In a process of its own, as Ray reads its settings once in each."""
    command = [sys.executable, SCRIPT, archive, images, "--out", out, "--workers", "2", "--part-size", str(part_size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(job: subprocess.Popen) -> tuple[int, str, str]:
    try:
        said, errors = job.communicate(timeout=200)
    finally:
        job.kill()
        job.communicate()
    return job.returncode, said, errors


def parts(out: Path) -> int:
    return len(list(out.glob("part-*")))


def wait_for_parts(job: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while parts(out) < count and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers(job: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(job.pid).children(recursive=True) if "Worker" in p.name() or "Map" in p.name()]


def test_whatever_is_killed_each_image_has_exactly_one_row(archive, many, tmp_path):
    out, before = tmp_path / "predictions", set(Path("/tmp").glob("ray-*"))
    job = start(archive, many, out)
    try:
        # 1. workers, of a job that goes on by itself
        for count in (8, 24):
            wait_for_parts(job, out, count)
            found = workers(job)
            assert found
            found[0].kill()
        # 2. the job itself
        wait_for_parts(job, out, 48)
        assert job.poll() is None
    finally:
        job.kill()
        job.communicate()
        for left in set(Path("/tmp").glob("ray-*")) - before:  # only a kill leaves it
            shutil.rmtree(left, ignore_errors=True)
    assert parts(out) < IMAGES // 10
    written = {file.name: file.stat().st_mtime_ns for file in out.glob("part-*")}
    # 3. and the same command goes on
    assert end(start(archive, many, out))[:2] == (1, f"{out}: {IMAGES:,} images, 3 with errors\n")
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written  # none was done twice
    paths = [row["path"] for row in rows(out)]
    assert len(paths) == IMAGES
    assert sorted(paths) == sorted(
        str(p) for p in many.rglob("*") if not p.is_dir() and p.name[0] != "." and p.suffix != ".txt"
    )
    assert json.loads((out / "_SUCCESS").read_text()) == {
        "images": IMAGES,
        "rows": {"ok": IMAGES - 3, "empty": 1, "truncated": 1, "unreadable": 1},
    }


@pytest.fixture(scope="module")
def begun(archive, run, tmp_path_factory) -> Path:
    """The predictions for the run's samples, in three parts."""
    out = tmp_path_factory.mktemp("begun") / "predictions"
    job = start(archive, run / "samples", out, 30)
    assert end(job)[:2] == (0, f"{out}: 64 images, 0 with errors\n")
    return out


def test_the_archives_own_predictor_is_run_whatever_is_checked_out(archive, sample, tmp_path):
    """In a process whose path has another one in front, as a worker's may."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "archive")
    (tmp_path / "other" / "predictor").mkdir(parents=True)
    (tmp_path / "other" / "predictor" / "__init__.py").write_text("raise SystemExit('another predictor was run')")
    (tmp_path / "seven.png").write_bytes(sample)
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "other")!r}, {str(SCRIPT.parent)!r}]
from pathlib import Path
import classify
model = classify.Model(Path({str(tmp_path / "archive")!r}), None)
(row,) = model.rows([{str(tmp_path / "seven.png")!r}])
assert row["label"] and not row["error"], row
print(sys.modules["predictor"].__file__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "archive" / "predictor" / "__init__.py")]


@pytest.mark.server
def test_predictions_are_the_endpoints(begun, server):
    found = rows(begun)
    assert list(found[0]) == ["path", "label", "probability", "predictions", "error", "message"]
    assert len(found) == 64
    for row in found[::8]:
        reply = requests.post(
            f"{server.url}/predictions/digits",
            data=Path(row["path"]).read_bytes(),
            headers={"Authorization": f"Bearer {server.key()}"},
            timeout=30,
        )
        assert json.loads(row["predictions"]) == pytest.approx(reply.json(), abs=1e-5)
        assert (row["label"], row["probability"]) == next(iter(json.loads(row["predictions"]).items()))


def test_a_job_that_is_done_is_not_done_again(archive, run, begun, capsys):
    before = {file.name: file.stat().st_mtime_ns for file in begun.glob("part-*")}
    assert main([str(archive), str(run / "samples"), "--out", str(begun), "--part-size", "30"]) == 0
    assert "64 images, 0 with errors" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in begun.glob("part-*")} == before


def test_mistakes_are_one_line_and_change_nothing(archive, run, begun, tmp_path, capsys):
    samples, full = str(run / "samples"), tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    (tmp_path / "none.mar").write_bytes(b"no zip")
    before = sorted(path.name for path in begun.iterdir())
    for arguments, said in [
        ([str(archive), str(tmp_path / "nowhere"), "--out", str(tmp_path / "a")], "no such image or folder"),
        ([str(archive), "--out", str(tmp_path / "a")], "no images there"),
        ([str(tmp_path / "absent.mar"), samples, "--out", str(tmp_path / "b")], "No such file"),
        ([str(tmp_path / "none.mar"), samples, "--out", str(tmp_path / "c")], "no whole archive"),
        ([str(archive), samples, "--out", str(full)], "holds something else"),
        ([str(archive), samples, "--out", str(begun), "--part-size", "31"], "differs in part size"),
        ([str(archive), f"{samples}/0-0.png", "--out", str(begun), "--part-size", "30"], "differs in images"),
    ]:
        assert main(arguments) == 2, said
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in begun.iterdir()) == before


def test_a_job_of_an_earlier_version_of_the_program_is_not_continued(archive, run, begun, tmp_path, capsys):
    """Its parts have another column of predictions, and one reader takes all parts as one table."""
    out = tmp_path / "earlier"
    shutil.copytree(begun, out)
    started = json.loads((out / "_job" / "started.json").read_text())
    (out / "_job" / "started.json").write_text(json.dumps({k: v for k, v in started.items() if k != "columns"}))
    assert main([str(archive), str(run / "samples"), "--out", str(out), "--part-size", "30"]) == 2
    assert "differs in columns; name the same, or another --out" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_ends_the_job_before_it_starts(archive, sample, tmp_path, monkeypatch, capsys):
    images, real = tmp_path / "images", os.scandir
    (images / "locked").mkdir(parents=True)
    (images / "seven.png").write_bytes(sample)

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root, whom no mode stops
    assert main([str(archive), str(images), "--out", str(tmp_path / "out")]) == 2
    said = f"classify.py: {images / 'locked'}: the folder cannot be listed (Permission denied); make it readable\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_an_archive_that_answers_its_golden_images_wrongly_is_not_used(archive, run, tmp_path):
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "digits.mar", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "golden.json":
                golden = json.loads(content)
                golden["probabilities"] = golden["probabilities"][::-1]
                content = json.dumps(golden).encode()
            new.writestr(name, content)
    status, _, error = end(start(tmp_path / "digits.mar", run / "samples", tmp_path / "predictions"))
    assert (status, "golden" in error) == (2, True), error
    assert rows(tmp_path / "predictions") == []


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(MemoryError(), "too_large"), (RuntimeError("of a decoder"), "unreadable"), (RecursionError(), "unreadable")],
)
def test_an_image_at_which_a_decoder_fails_in_any_way_is_a_row_and_the_part_ends(tmp_path, failure, kind):
    from predictor.pillow_preprocessing import ImageError

    def read(body):
        if body == b"1":
            raise failure
        return np.full((8, 8, 3), int(body), np.uint8)

    model = Model.__new__(Model)  # without an archive
    model.image_error = ImageError
    model.predictor = types.SimpleNamespace(decode=read, infer=lambda crops: [{"b": 0.75, "a": 0.25} for _ in crops])
    for name in "012":
        (tmp_path / name).write_text(name)
    rows = model.rows([str(tmp_path / name) for name in "012"])
    assert [row["error"] for row in rows] == [None, kind, None]
    assert [row["label"] for row in rows] == ["b", None, "b"]
    assert rows[1]["message"]
