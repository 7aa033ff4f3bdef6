"""The predictor, and its command: as the handler answers, with three packages, and no traceback for any mistake."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from predictor.__main__ import find_images, main
from predictor.pillow_preprocessing import ImageError
from predictor.predictor import Predictor, read_settings
from tests.conftest import PROJECT, replace_in_archive
from tests.kinds import BAD, GOOD

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged files


@pytest.fixture(scope="module")
def archive(exported) -> Path:
    return exported / "digits.mar"


@pytest.fixture(scope="module")
def predictor(archive) -> Predictor:
    return Predictor.open(archive)


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def images(run, tmp_path_factory) -> Path:
    """A folder of samples, of every kind of image, and of files that are none."""
    folder = tmp_path_factory.mktemp("images")
    for path in sorted((run / "samples").iterdir())[:5]:
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / path.name).write_bytes(path.read_bytes())
    for i, (body, *_) in enumerate([*GOOD.values(), *BAD.values()]):
        (folder / f"{i:02d}.png").write_bytes(body)
    (folder / "notes.txt").write_text("none")
    (folder / ".hidden.png").write_text("none")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_its_predictions_are_the_handlers(unpacked, images, predictor):
    from ts.context import Context, RequestProcessor

    from handler.classifier_handler import ClassifierHandler

    paths = sorted(path for path in images.rglob("*.png") if path.name[0] != ".")
    settings = yaml.safe_load((unpacked / "model-config.yaml").read_text())
    manifest = json.loads((unpacked / "MAR-INF" / "MANIFEST.json").read_text())
    handler = ClassifierHandler()
    context = Context("digits", str(unpacked), manifest, 4, None, "0.12.0", True, None, settings)
    handler.initialize(context)
    context.request_processor = [RequestProcessor({}) for _ in paths]
    bodies = [path.read_bytes() for path in paths]
    answers = [json.loads(body) for body in handler.handle([{"body": body} for body in bodies], context)]
    predictions = predictor.predict(bodies)
    assert len(answers) == len(predictions) > 30
    for answer, prediction in zip(answers, predictions, strict=True):
        if isinstance(prediction, ImageError):
            assert answer["type"] == prediction.cause
        else:
            assert list(answer) == list(prediction)
            assert answer == pytest.approx(prediction, abs=1e-5)


@pytest.mark.server
def test_its_predictions_are_the_endpoints(client, run, archive, capsys):
    paths = sorted((run / "samples").iterdir())[:6]
    assert main([str(archive), *map(str, paths), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        answer = client.classify(path.read_bytes())
        assert row["predictions"] == pytest.approx(answer, abs=1e-5)
        assert (row["label"], row["probability"]) == next(iter(row["predictions"].items()))


@pytest.mark.parametrize("form", ["archive", "unpacked", "export", "staged", "run"])
def test_it_opens_an_archive_an_unpacked_one_and_an_export(form, archive, unpacked, run, sample, predictor):
    path = {
        "archive": archive, "unpacked": unpacked, "export": archive.parent, "staged": archive.parent / "archive",
        "run": run,
    }[form]  # fmt: skip
    found = Predictor.open(path)
    assert found.spec == predictor.spec
    assert found.predict([sample]) == [pytest.approx(predictor.predict([sample])[0], abs=1e-5)]


def test_a_folder_that_cannot_be_listed_is_a_mistake_and_its_images_are_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "seven.png").touch()
    real = os.scandir

    def scandir(path):
        if Path(path).name in ("locked", ".hidden"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root, whom no mode stops
    with pytest.raises(ValueError, match=r"locked: the folder cannot be listed \(Permission denied\)"):
        find_images([tmp_path])
    (tmp_path / "locked").rmdir()
    assert find_images([tmp_path]) == [tmp_path / "seven.png"]


def test_nothing_of_an_archive_is_run_or_left(archive, tmp_path, sample, monkeypatch):
    trojans = dict.fromkeys(("classifier_handler.py", "sitecustomize.py", "predictor/__init__.py"), "raise SystemExit")
    replace_in_archive(archive, tmp_path / "digits.mar", trojans)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    assert isinstance(Predictor.open(tmp_path / "digits.mar").predict([sample])[0], dict)
    assert sorted(tmp_path.iterdir()) == before


def test_it_needs_numpy_pillow_and_onnx_runtime_and_nothing_else(archive, run, images):
    """In a process in which nothing else that is installed can be imported."""
    code = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = {"torch", "torchvision", "ts", "yaml", "tqdm", "requests", "sklearn", "scipy", "psutil", "matplotlib",
           "simplejpeg", "handler", "model", "training", "dataset", "export", "onnx", "pyarrow", "ray"}
sys.meta_path.insert(0, Blocked())
from predictor.__main__ import main
status = main(sys.argv[1:])
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
sys.exit(status)
"""
    line = [sys.executable, "-c", code, str(archive), str(images / "samples"), "--json"]
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 5


def test_a_table_has_a_row_for_each_image_and_errors_fail_alone(archive, images, capsys):
    assert main([str(archive), str(images), "--top", "2"]) == 1
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert error == ""
    assert len(lines) == 5 + len(GOOD) + len(BAD)  # neither hidden files nor texts
    refused = [line for line in lines if "  error: " in line]
    assert len(refused) == len(BAD)
    assert {line.split("error: ")[1].split(":")[0] for line in refused} == {cause for _, cause in BAD.values()}
    best = next(line for line in lines if line not in refused)
    assert len(best.rsplit("  ", 2)) == 3  # a name and two labels


def test_odd_names_and_files_are_rows_for_programs_and_people(archive, sample, tmp_path, capsys):
    names = ["line\nbreak.png", "ü.png", os.fsdecode(b"\xff.png"), "\x1b[31m.png"]
    for name in names:
        (tmp_path / name).write_bytes(sample)
    (tmp_path / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    assert main([str(archive), str(tmp_path), "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(Path(row["image"]).name for row in rows if "error" in row) == ["gone.png", "pipe.png"]
    assert {row["error"] for row in rows if "error" in row} == {"unreadable"}
    assert {Path(row["image"]).name for row in rows if "label" in row} == {*names[:2], "\\xff.png", names[3]}
    assert main([str(archive), str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 6
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("out", "error", "has_tqdm", "is_shown"),
    [
        ("file", "terminal", True, True),
        ("terminal", "terminal", True, False),  # where the rows tell how far it is
        ("file", "file", True, False),
        ("file", "terminal", False, False),
    ],
)
def test_a_bar_is_shown_where_the_rows_go_into_a_file_and_somebody_watches(
    archive, images, monkeypatch, out, error, has_tqdm, is_shown
):
    streams = {name: io.StringIO() for name in ("stdout", "stderr")}
    for (name, stream), kind in zip(streams.items(), (out, error), strict=True):
        monkeypatch.setattr(stream, "isatty", lambda kind=kind: kind == "terminal", raising=False)
        monkeypatch.setattr(sys, name, stream)
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main([str(archive), str(images / "samples"), "--json"]) == 0
    rows = [json.loads(line) for line in streams["stdout"].getvalue().splitlines()]
    assert len(rows) == 5
    said = streams["stderr"].getvalue()
    assert ("| 5/5 [" in said and "images/s]" in said) if is_shown else said == ""


def test_a_reader_that_has_enough_gets_no_traceback(archive, images):
    line = f"'{sys.executable}' -m predictor '{archive}' '{images}' '{images}' '{images}' | head -1"
    done = subprocess.run(line, shell=True, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_mistakes_are_one_line_and_exit_code_2(archive, run, sample, tmp_path, capsys):
    image = tmp_path / "seven.png"
    image.write_bytes(sample)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.mar").write_bytes(b"no zip")
    outside, twice = tmp_path / "outside.mar", tmp_path / "twice.mar"
    for path, name in ((outside, "../spec.json"), (twice, "spec.json")):
        path.write_bytes(archive.read_bytes())
        with (
            zipfile.ZipFile(path, "a") as packed,
            pytest.warns(UserWarning) if path == twice else zipfile.ZipFile(tmp_path / "unused.zip", "w"),
        ):
            packed.writestr(name, "{}")
    replace_in_archive(archive, tmp_path / "spec.mar", {"spec.json": "{}"})
    replace_in_archive(archive, tmp_path / "backend.mar", {"model-config.yaml": "backend: onnx-int8\n"})
    golden = json.loads((archive.parent / "golden.json").read_text())
    golden["probabilities"].reverse()
    replace_in_archive(archive, tmp_path / "golden.mar", {"golden.json": json.dumps(golden)})
    for arguments, said in [
        ([tmp_path / "absent.mar", image], "no such archive or folder"),
        ([tmp_path / "none.mar", image], "no whole archive"),
        ([tmp_path / "empty", image], "has no model"),
        ([outside, image], "'../spec.json' lies outside of it"),
        ([twice, image], "'spec.json' is inside twice"),
        ([tmp_path / "spec.mar", image], "spec.json: field 'arch' is missing"),
        ([tmp_path / "backend.mar", image], "digits.crops.int8.onnx is not in the archive"),
        ([tmp_path / "golden.mar", image], "golden image"),
        ([archive, tmp_path / "absent.png"], "absent.png: no such image or folder"),
        ([archive, tmp_path / "empty"], "no images there"),
    ]:
        assert main([str(one) for one in arguments]) == 2, said
        out, error = capsys.readouterr()
        assert said in error
        assert (out, error.count("\n"), error.startswith("predictor: ")) == ("", 1, True), error
    for wrong in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as ended:
            main([str(archive), str(image), "--top", wrong])
        assert ended.value.code == 2


def test_a_damaged_archive_is_a_mistake_wherever_it_is_damaged(archive, tmp_path):
    whole = archive.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.mar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="no whole archive"):
            Predictor.open(tmp_path / "cut.mar")


def test_settings_are_read_as_yaml_reads_them():
    text = (PROJECT / "handler" / "model-config.yaml").read_text() + "a: \"quoted\"\nb: 'x'\nc:\n  d: 7\n# e: 8\n"
    ours, all_of_them = read_settings(text), yaml.safe_load(text)
    for name in ("backend", "topk", "max_pixels", "max_images", "threads", "a", "b"):
        assert ours[name] == all_of_them[name]
    assert not {"c", "d", "e"} & ours.keys()


@pytest.mark.parametrize(
    "value",
    [
        "50_000_000",
        "0x10",
        "0xFf_ff",
        "0b1_01",
        "010",
        "0",
        "-7",
        "+7",
        "-0x1",
        "08",
        "1.5",
        "7px",
        "'7'",
        '"7"',
        "x_1",
    ],
)
def test_a_setting_is_read_as_yaml_reads_it(value):
    found, expected = read_settings(f"topk: {value}\n")["topk"], yaml.safe_load(value)
    assert found == (value if isinstance(expected, float) else expected)  # no setting of the predictor has a fraction
    assert isinstance(found, int) == isinstance(expected, int)


def test_no_image_costs_another_its_prediction(predictor, sample, monkeypatch):
    read = predictor.decode

    def fails(body):
        if body == b"memory":
            raise MemoryError
        if body == b"decoder":
            raise RecursionError("of a decoder")
        return read(body)

    monkeypatch.setattr(predictor, "decode", fails)
    first, memory, decoder, last = predictor.predict([sample, b"memory", b"decoder", sample])
    assert (memory.cause, decoder.cause) == ("too_many_pixels", "truncated")
    assert first == pytest.approx(last, abs=1e-5)


def test_a_tie_goes_to_the_label_that_stands_first(predictor):
    probabilities = np.full((1, len(predictor.spec.labels)), 0.1, np.float32)
    (prediction,) = predictor.rank(probabilities)
    assert tuple(prediction) == predictor.spec.labels[: predictor.topk]
