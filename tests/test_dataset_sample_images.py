"""The samples in a run folder: whole files of the val split, which replace only what a run has written."""

import hashlib
import json
import zipfile

from dataset.loading import load
from dataset.sample_images import save_samples
from predictor.spec import PixelRule
from tests.conftest import reports
from tests.folders import as_zip, make_folder
from train import main
from training.report import write_report


def test_samples_are_whole_files_of_the_val_split(tmp_path):
    folder = make_folder(tmp_path / "pets", count=10)
    data = load(str(as_zip(folder, tmp_path / "pets.zip", wrapped=True)), rule=PixelRule.square(16))
    assert len(data.samples) == len(data.val)
    assert {name.split("-")[0] for name in data.samples} == {name.split("/")[0] for name in data.val.names}
    files = {path.read_bytes() for path in folder.rglob("*.jpg")}
    assert set(data.samples.values()) <= files


def test_labels_that_are_mathematics_or_longer_than_a_file_name_are_trained_on(tmp_path):
    long = "l" * 250
    names = {"red": "$5_$", "green": long + "one", "blue": long + "two"}
    folder, target = make_folder(tmp_path / "pics", count=20), tmp_path / "pics.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.jpg")):
            archive.write(path, f"{names[path.parent.name]}/{path.name}")
    with reports(write_report):
        assert main(["--data", str(target), "--epochs", "1", "--lr", "1e-9", "--out", str(tmp_path / "run")]) == 0
    for name in ("confusion.png", "mistakes.png"):
        assert (tmp_path / "run" / "report" / name).read_bytes().startswith(b"\x89PNG")
    written = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    val = load(str(target), rule=PixelRule.square(8)).val
    assert len(written) == len(val)  # although two labels begin alike
    assert {name.rpartition("-")[0] for name in written} <= {"_5__", "l" * 80}


def test_samples_of_an_earlier_run_are_removed_and_the_users_files_are_not(tmp_path):
    folder, said = tmp_path / "samples", []
    save_samples({"a-0.png": b"1", "a-1.png": b"2", "a-2.png": b"3", "b-0.png": b"4"}, folder)
    (folder / "a-1.png").write_bytes(b"changed by hand")
    (folder / "mine.png").write_bytes(b"mine")
    (folder / "c-0.png").write_bytes(b"mine too")
    (folder / "notes").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(b"4")
    (folder / "b-0.png").unlink()
    (folder / "b-0.png").symlink_to(tmp_path / "elsewhere.png")
    save_samples({"a-0.png": b"new", "c-0.png": b"5", "d-0.png": b"6"}, folder, say=said.append)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert files == {
        "a-0.png": b"new", "a-1.png": b"changed by hand", "mine.png": b"mine", "c-0.png": b"mine too", "d-0.png": b"6",
        "b-0.png": b"4",
    }  # fmt: skip
    assert (folder / "notes").is_dir()
    assert said == [f"{folder}: 1 files that no run has written were left as they are, such as c-0.png"]
    save_samples({}, folder)
    assert {path.name for path in folder.iterdir()} == {"a-1.png", "mine.png", "c-0.png", "notes", "b-0.png"}


def test_a_list_of_samples_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "mine.txt").write_bytes(b"mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    for content in ({"../mine.txt": digest, str(tmp_path / "mine.txt"): digest}, ["mine.txt"], 3):
        (tmp_path / "samples.json").write_text(json.dumps(content))
        save_samples({"a-0.png": b"1"}, tmp_path / "samples")
    assert (tmp_path / "mine.txt").read_bytes() == b"mine"
