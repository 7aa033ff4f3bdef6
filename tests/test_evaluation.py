import json
import shutil

import pytest

from model import ModelSpec
from tests.conftest import label_of, reports
from tests.folders import make_folder
from train import main
from training import console
from training.report import write_report


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of images without splits, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("colours")
    make_folder(folder / "images", count=12)
    with reports(write_report):
        assert main(["--data", str(folder / "images"), "--epochs", "60", "--out", str(folder / "run")]) == 0
    assert (folder / "run" / "report" / "index.html").exists()  # where there may be no mistakes
    return folder / "images", folder / "run"


def evaluate(capsys, *arguments):
    """The line of scores that is printed, and the JSON after it."""
    capsys.readouterr()
    code = main(["--evaluate", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    *_, line, summary = printed.out.splitlines()
    return line, json.loads(summary)


def test_a_run_scores_its_own_test_images_as_training_did(run, capsys, tmp_path):
    line, summary = evaluate(capsys, run, "--out", tmp_path / "scores.json")
    metrics = json.loads((run / "metrics.json").read_text())
    assert {name: summary[name] for name in metrics["test"]} == metrics["test"]
    assert (summary["data"], summary["split"], summary["run"]) == ("digits", "test", str(run))
    assert line.startswith(f"digits, test: {metrics['test']['accuracy']:.2%} of 360 images")
    assert json.loads((tmp_path / "scores.json").read_text()) == summary
    assert evaluate(capsys, run, "--split", "val")[1]["accuracy"] == metrics["val"]["accuracy"]


def test_scoring_says_how_far_it_is(run, capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_A_LINE", 0)
    assert main(["--evaluate", str(run)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scoring: ")]
    assert lines[-1].startswith("scoring: 360 of 360 images, ")


def test_the_temperature_changes_the_confidence_and_not_the_answers(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    text = (run / "spec.json").read_text().replace('"temperature": 1.0', '"temperature": 3.0')
    (tmp_path / "run" / "spec.json").write_text(text)
    assert ModelSpec.load(tmp_path / "run").temperature == 3
    cool, warm = evaluate(capsys, run)[1], evaluate(capsys, tmp_path / "run")[1]
    assert cool["accuracy"] == warm["accuracy"]
    assert cool["ece"] != warm["ece"]


def test_other_images_are_all_scored_and_their_classes_found_by_name(colours, tmp_path, capsys):
    _, run = colours
    other = make_folder(tmp_path / "new", count=5, kind="png")
    shutil.rmtree(other / "blue")  # green and red are places 0 and 1 there, and 1 and 2 in the run
    _, summary = evaluate(capsys, run, "--data", other)
    assert (summary["split"], summary["images"]) == ("all", 10)
    assert summary["per_class"]["blue"]["images"] == 0
    correct = sum(label_of(run, path.read_bytes()) == path.parent.name for path in other.glob("*/*.png"))
    assert summary["accuracy"] == correct / 10


def test_the_runs_own_data_is_cut_as_the_run_cut_it(colours, capsys):
    images, run = colours
    own = json.loads((run / "metrics.json").read_text())
    assert evaluate(capsys, run)[1]["images"] == own["test"]["images"]
    assert evaluate(capsys, run, "--data", images, "--split", "val")[1]["images"] == own["val"]["images"]
    assert evaluate(capsys, run, "--data", images, "--split", "all")[1]["images"] == 36


def test_unreadable_images_stop_it_or_are_left_out(colours, tmp_path, capsys):
    images, run = colours
    shutil.copytree(images, tmp_path / "new")
    (tmp_path / "new" / "red" / "bad.jpg").write_bytes(b"no image")
    assert main(["--evaluate", str(run), "--data", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "red/bad.jpg" in error
    assert "--skip-bad" in error
    assert error.count("\n") == 1
    assert main(["--evaluate", str(run), "--data", str(tmp_path / "new"), "--skip-bad", "--split", "all"]) == 0
    assert "of 36 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digits"], "the run does not know '0', '1', '2'"),
        (["--lr", "0.1"], "leave --lr out"),
        (["--resume", "x"], "leave --resume out"),
        (["--config", "x"], "leave --config out"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--data", "digit"], "did you mean digits"),
    ],
)
def test_a_mistake_is_one_line(colours, capsys, arguments, words):
    assert main(["--evaluate", str(colours[1]), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_scores_replace_only_earlier_scores(run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "new" / "scores.json"
    for split in ("test", "val"):
        evaluate(capsys, run, "--split", split, "--out", file)
        assert json.loads(file.read_text())["split"] == split
    mine = tmp_path / "mine"
    monkeypatch.setattr("training.evaluation.read_images", lambda *_: pytest.fail("the images were read first"))
    for content in (b"mine", b"\xff\xfe", b"[1]", (run / "metrics.json").read_bytes()):
        mine.write_bytes(content)
        refuse(capsys, run, mine, "holds something other than an evaluation's scores; name another file")
        assert mine.read_bytes() == content


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (".", "is a folder; name a file, e.g. scores.json"),
        ("file/scores.json", "cannot be written (Not a directory); name another file"),
        ("/proc/scores.json", "cannot be written (No such file or directory); name another file"),
        ("/dev/null", "is a device; name a file, e.g. scores.json"),
    ],
)
def test_scores_that_cannot_be_kept_are_said_before_an_image_is_read(run, tmp_path, capsys, monkeypatch, out, words):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("training.evaluation.read_images", lambda *_: pytest.fail("the images were read first"))
    refuse(capsys, run, tmp_path / out, words)


def refuse(capsys, run, out, words):
    capsys.readouterr()
    assert main(["--evaluate", str(run), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"train.py: --out {out}: {words}\n"


def test_a_run_that_is_none_and_a_split_without_evaluate(tmp_path, capsys):
    assert main(["--evaluate", str(tmp_path / "none"), "--data", "digits"]) == 2
    assert "none: no such file" in capsys.readouterr().err
    assert main(["--data", "digits", "--out", str(tmp_path / "run"), "--split", "all"]) == 2
    assert "--split: belongs to --evaluate" in capsys.readouterr().err


def test_training_ends_with_its_summary(tmp_path, capsys):
    assert main(["--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {"run": str(tmp_path / "run"), **json.loads((tmp_path / "run" / "metrics.json").read_text())}
