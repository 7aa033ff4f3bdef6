import contextlib
import functools
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from export import integrity, torchscript
from export.__main__ import export_run
from export.card import write_card
from export.integrity import SIGNATURE, SUMS, check, run_check, sign, verify_signature, write_sums
from model import Classifier, load_run
from tests.conftest import replace_in_archive
from train import train
from training.config import TrainConfig

GRAPHS = ("digits.onnx", "digits.crops.onnx", "digits.pixels.onnx")
PROGRAMS = ("digits.pt2", "digits.crops.pt2", "digits.pixels.pt2")


def finished(run, exported, folder):
    """A copy of an export as it leaves the house: with its card and its sums, beside the weights of its run."""
    shutil.copytree(exported, folder / "export", ignore=shutil.ignore_patterns(SUMS, SIGNATURE))
    shutil.copy(run / "model.pt", folder)
    write_card(run, "digits", folder / "export")
    write_sums(folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def whole(run, exported, tmp_path_factory):
    """The export that the tests copy; those that change one file of it put it back."""
    return finished(run, exported, tmp_path_factory.mktemp("whole") / "digits")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An export of another training of the same name and the same labels."""
    run = tmp_path_factory.mktemp("other") / "digits"
    with contextlib.redirect_stdout(io.StringIO()):
        train(TrainConfig(data="digits", arch="simplecnn", out=str(run), seed=1, epochs=2))
        export_run(run, wanted="onnx")
    return finished(run, run / "export", run / "finished")


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path / "digits")
    return tmp_path / "digits" / "export"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs of keys: [private, public], [private, public]."""
    place = tmp_path_factory.mktemp("keys")

    def pair(name):
        key = ec.generate_private_key(ec.SECP256R1())
        plain = serialization.NoEncryption()
        private, public = place / f"{name}.pem", place / f"{name}.pub"
        pem = serialization.Encoding.PEM
        private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        return private, public

    return pair("ours"), pair("theirs")


@pytest.fixture
def sums_only(monkeypatch):
    """For sweeps: what is inside the files can only add findings."""
    monkeypatch.setattr(integrity, "_check_contents", lambda *_: None)


@contextlib.contextmanager
def flipped(path, place, bit):
    before = path.read_bytes()
    content = bytearray(before)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values, ensure_ascii=False), encoding="utf-8")


def test_what_was_exported_is_whole(whole, capsys):
    assert check(whole) == []
    assert run_check(whole) == 0
    count = len((whole / SUMS).read_text().splitlines())
    assert capsys.readouterr().out == f"{count} files, all as exported\n"


def test_sha256sum_agrees(folder):
    (folder / "more files").mkdir()
    (folder / "more files" / "ü *.txt").write_text("x")
    (folder / SIGNATURE).write_text("x")
    write_sums(folder)
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = [line.removesuffix(": OK") for line in done.stdout.splitlines()]
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert listed == sorted(set(files) - {SUMS, SIGNATURE})


@pytest.mark.parametrize("name", ["line\nbreak", "back\\slash"])
def test_a_name_that_sha256sum_would_have_to_escape_is_refused(folder, name):
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match="rename the file"):
        write_sums(folder)


def test_a_flipped_bit_anywhere_in_any_file_is_found_and_the_file_named(whole, sums_only):
    choose = random.Random(0)
    files = [path for path in sorted(whole.iterdir()) if path.is_file()]
    assert {SUMS, "digits.mar", "digits.pt", "parity.json", *GRAPHS, *PROGRAMS} <= {path.name for path in files}
    for path in files:
        size = path.stat().st_size
        for place in (0, 1, size // 2, size - 2, size - 1, *(choose.randrange(size) for _ in range(5))):
            bit = choose.randrange(8)
            with flipped(path, place, bit):
                findings = check(whole)
            assert findings, (path.name, place, bit)
            assert all(path.name in finding for finding in findings), findings
    assert check(whole) == []


def test_every_flipped_bit_of_the_sums_is_found(whole, sums_only, monkeypatch):
    """It is the one file that has no hash of its own."""
    monkeypatch.setattr(integrity, "sha256", functools.cache(integrity.sha256))  # the others stay as they are
    size = (whole / SUMS).stat().st_size
    for place in range(size - 90, size):  # the last line whole, and the end of the one before
        for bit in range(8):
            with flipped(whole / SUMS, place, bit):
                assert check(whole), (place, bit)


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are handed to a parser from here on."""
    names = set()

    def watch(place, attribute, name_of):
        original = getattr(place, attribute)

        def watching(*arguments):
            names.add(name_of(*arguments))
            return original(*arguments)

        monkeypatch.setattr(place, attribute, watching)

    watch(integrity, "_spec_in_zip", lambda path: path.name)
    watch(integrity, "_read_json", lambda path: path.name)
    watch(integrity.onnx, "read_spec", lambda path: path.name)
    watch(integrity, "_check_archive", lambda folder, name, *_: f"{name}.mar")
    watch(integrity, "run_torchscript", lambda folder, name, *_: f"{name}.pt")
    watch(integrity, "run_onnxruntime", lambda folder, name, graph, _: f"{name}{integrity.GRAPHS[graph]}.onnx")
    return names


@pytest.mark.parametrize("name", ["digits.pt", "digits.crops.onnx", "digits.mar", "digits.pt2", "index_to_name.json"])
def test_a_damaged_file_is_named_and_not_opened(whole, name, opened, capsys):
    assert check(whole) == []
    assert name in opened
    everything = set(opened)
    opened.clear()
    with flipped(whole / name, 100, 3):
        assert run_check(whole) == 1
    assert capsys.readouterr().out == (
        f"{name}: its SHA-256 is not the one in {SUMS}; export again or restore the file\n"
    )
    assert opened == everything - {name}


def test_no_pickle_is_loaded(whole, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle was loaded")

    for place, attribute in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, attribute, refuse)
    assert check(whole) == []


def test_a_missing_and_an_extra_file_are_named(folder):
    (folder / "digits.onnx").unlink()
    (folder / "notes.txt").write_text("x")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("x")
    (folder / "elsewhere").symlink_to(folder.parent)
    assert sorted(check(folder)) == [
        f"digits.onnx: is in {SUMS} and missing; export again or restore the file",
        f"elsewhere: is not in {SUMS}; remove the file or export again",
        f"more/notes.txt: is not in {SUMS}; remove the file or export again",
        f"notes.txt: is not in {SUMS}; remove the file or export again",
    ]


@pytest.mark.parametrize(
    "name", ["digits.pt", "digits.mar", "index_to_name.json", "parity.json", "digits.onnx", "digits.pixels.onnx"]
)
def test_a_missing_file_is_named_even_if_the_sums_are_written_anew(folder, name):
    (folder / name).unlink()
    write_sums(folder)
    assert f"{name}: missing; export again or restore the file" in check(folder)


def test_a_folder_without_any_model_is_not_whole(folder):
    for path in folder.glob("digits.*"):
        path.unlink()
    write_sums(folder)
    assert any("there is no model" in finding for finding in check(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "missing"),
        (b"\xff", "damaged"),
        (b"digits.pt\n", "line 1"),
        (b"%s  digits.pt" % (b"0" * 64), "ends within a line"),
        (b"%s  ../model.pt\n" % (b"0" * 64), "../model.pt: is in SHA256SUMS and missing"),
        (b"%s  x\n%s  x\n" % (b"0" * 64, b"1" * 64), "line 2"),
    ],
)
def test_sums_that_are_not_well_formed_are_found(whole, tmp_path, text, words):
    shutil.copytree(whole, tmp_path / "export")
    (tmp_path / "export" / SUMS).unlink()
    if text is not None:
        (tmp_path / "export" / SUMS).write_bytes(text)
    assert any(words in finding for finding in check(tmp_path / "export"))


@pytest.mark.parametrize("name", ["digits.pt", "digits.mar", "MODEL_CARD.md", *GRAPHS, *PROGRAMS])
def test_an_artifact_of_another_training_is_found_even_if_the_sums_are_written_anew(folder, other, name):
    shutil.copy(other / name, folder / name)
    write_sums(folder)
    findings = check(folder)
    assert findings
    assert all(name in finding for finding in findings), findings
    assert any("another spec" in finding or "other weights" in finding for finding in findings)


def test_a_whole_export_beside_the_weights_of_another_training_is_found(folder, other):
    assert check(other) == []
    shutil.copy(other.parent / "model.pt", folder.parent / "model.pt")
    assert check(folder) == ["digits.pt: its spec names other weights than the run's model.pt; export the run again"]


@pytest.mark.parametrize("name", GRAPHS)
def test_other_weights_under_the_same_spec_are_found_by_their_answers(folder, other, name):
    model = onnx.load(other / name)
    onnx.helper.set_model_props(model, {"spec": integrity.onnx.read_spec(folder / name).to_json()})
    onnx.save(model, folder / name)
    write_sums(folder)
    *archive, finding = check(folder)
    assert finding.startswith(f"{name}: is of another training than digits.pt (answers differ by up to ")
    served = json.loads((folder / "parity.json").read_text())["backends"]
    in_archive = name == "digits.crops.onnx" and any(row["backend"] == "onnx" and row["chosen"] for row in served)
    assert archive == [f"digits.mar: '{name}' inside is not the {name} beside it; export again"] * in_archive


def test_a_script_with_other_weights_under_the_same_spec_is_found_by_its_answers(folder, run, other):
    spec, network = load_run(run)
    with torch.no_grad():
        next(network.parameters()).mul_(1.1)
    torchscript.save(Classifier(network, spec).eval(), spec, folder / "digits.pt")
    write_sums(folder)
    findings = check(folder)
    assert {finding.split(":")[0] for finding in findings} == {*GRAPHS, "digits.mar"}
    assert all("digits.pt" in finding for finding in findings)


def test_int8_and_fp16_files_need_not_answer_alike_but_carry_the_spec(folder, other):
    model = onnx.load(other / "digits.onnx")
    onnx.helper.set_model_props(model, {"spec": integrity.onnx.read_spec(folder / "digits.onnx").to_json()})
    onnx.save(model, folder / "digits.int8.onnx")
    write_sums(folder)
    assert check(folder) == []
    shutil.copy(other / "digits.onnx", folder / "digits.fp16.onnx")
    write_sums(folder)
    (finding,) = check(folder)
    assert finding.startswith("digits.fp16.onnx: carries another spec than digits.pt (")


@pytest.mark.parametrize("name", [*GRAPHS, "digits.pt", "digits.mar", "digits.pt2", "parity.json"])
def test_a_file_that_nothing_can_read_is_a_finding_and_no_crash(folder, name):
    (folder / name).write_bytes(b"nothing of the kind")
    write_sums(folder)
    assert any(finding.startswith(f"{name}: cannot be read (") for finding in check(folder))


def test_the_proof_and_the_labels_must_fit(folder):
    report = json.loads((folder / "parity.json").read_text())
    names = json.loads((folder / "index_to_name.json").read_text())
    change(folder / "index_to_name.json", **{"3": names["4"], "4": names["3"]})
    row = report["rows"][1]
    row["passed"] = False
    change(folder / "parity.json", rows=report["rows"])
    write_sums(folder)
    labels, proof, archive = check(folder)
    assert labels.startswith("index_to_name.json: names other labels than the spec in digits.pt")
    assert proof == f"parity.json: not passed by {row['graph']} in {row['runtime']}; export again"
    assert archive.startswith("digits.mar: 'index_to_name.json' inside is not the index_to_name.json beside it")


def test_a_proof_of_other_weights_is_none(folder):
    change(folder / "parity.json", weights_sha256="0" * 64)
    write_sums(folder)
    assert check(folder) == ["parity.json: is about other weights than those of digits.pt; export again"]


def test_a_skipped_row_proves_nothing_and_does_not_hurt(folder):
    skipped = {"graph": "network", "runtime": "TensorRT", "passed": False, "skipped": "no GPU"}
    rows = json.loads((folder / "parity.json").read_text())["rows"]
    change(folder / "parity.json", rows=[*rows, skipped])
    write_sums(folder)
    assert check(folder) == []
    change(folder / "parity.json", rows=[skipped])
    write_sums(folder)
    assert check(folder) == ["parity.json: nothing was compared; export again"]


def test_an_archive_with_a_damaged_member_is_found(folder):
    content = bytearray((folder / "digits.mar").read_bytes())
    content[1000] ^= 1  # within the first member, digits.pt
    (folder / "digits.mar").write_bytes(content)
    write_sums(folder)
    assert check(folder) == ["digits.mar: 'digits.pt' inside is damaged; export again or restore the file"]


@pytest.mark.parametrize(
    ("files", "without", "words"),
    [
        ({"index_to_name.json": "{}"}, (), "'index_to_name.json' inside is not the index_to_name.json beside it"),
        ({}, ("pictures.py",), "'pictures.py' is inside 0 times"),
        ({}, ("classifier_handler.py",), "'classifier_handler.py' is inside 0 times"),
        ({}, ("model-config.yaml",), "'model-config.yaml' is inside 0 times"),
        ({}, ("spec.json",), "cannot be read (0 specs are inside, not one)"),
        ({}, ("MAR-INF/MANIFEST.json",), "cannot be read"),
        (
            {"MAR-INF/MANIFEST.json": '{"model": {"serializedFile": "x.pt", "handler": "classifier_handler.py"}}'},
            (),
            "its manifest names x.pt, not digits.pt",
        ),
    ],
)
def test_an_archive_that_does_not_hold_what_it_must_is_found(folder, whole, files, without, words):
    replace_in_archive(whole / "digits.mar", folder / "digits.mar", files)
    with zipfile.ZipFile(folder / "digits.mar") as old, zipfile.ZipFile(folder / "fewer.mar", "w") as new:
        for name in set(old.namelist()) - set(without):
            new.writestr(name, old.read(name))
    (folder / "fewer.mar").replace(folder / "digits.mar")
    write_sums(folder)
    findings = check(folder)
    assert any(words in finding for finding in findings), findings
    assert all(finding.startswith("digits.mar: ") for finding in findings)


def test_the_script_inside_the_archive_must_be_the_one_beside_it(folder, other):
    spec = integrity.onnx.read_spec(folder / "digits.onnx")
    replace_in_archive(other / "digits.mar", folder / "digits.mar", {"spec.json": spec.to_json()})
    write_sums(folder)
    assert check(folder) == [
        f"digits.mar: '{member}' inside is not the {member} beside it; export again"
        for member in ("MODEL_CARD.md", "digits.crops.onnx", "digits.pt", "golden.json")
    ]


def test_a_signature_holds_for_these_files_and_this_key_only(folder, keys, capsys):
    (private, public), (_, theirs) = keys
    assert sign(folder, private) == folder / SIGNATURE
    assert verify_signature(folder, public) == []
    assert run_check(folder, public) == 0
    assert "signature included" in capsys.readouterr().out
    assert run_check(folder) == 0
    assert f"{SIGNATURE} was not checked" in capsys.readouterr().out
    (finding,) = verify_signature(folder, theirs)
    assert finding.startswith(f"{SIGNATURE}: does not hold")
    for path in sorted(folder.iterdir()):
        with flipped(path, path.stat().st_size // 2, 2):
            (finding,) = verify_signature(folder, public)
            assert finding.startswith(f"{SIGNATURE}: does not hold")
            assert path.name in finding
            assert "\n" not in finding
    for name in ("notes.txt", ".gitignore"):
        (folder / name).write_text("x")
        assert name in verify_signature(folder, public)[0]
        (folder / name).unlink()
    assert verify_signature(folder, public) == []


def test_sums_written_anew_do_not_deceive_the_signature_and_then_nothing_is_opened(folder, keys, monkeypatch, capsys):
    (private, public), _ = keys
    sign(folder, private)
    change(folder / "parity.json", note="changed")
    write_sums(folder)
    assert check(folder) == []
    monkeypatch.setattr(integrity, "_check_contents", lambda *_: pytest.fail("a file was opened"))
    assert run_check(folder, public) == 1
    out = capsys.readouterr().out
    assert "parity.json" in out
    assert out.count("\n") == 1


def test_with_a_public_key_an_unsigned_export_is_a_finding(folder, keys):
    assert verify_signature(folder, keys[0][1]) == [
        f"{SIGNATURE}: missing; sign the export, or get it from whoever signed it"
    ]


def test_a_key_that_cannot_be_used_is_one_line_and_exit_code_2(folder, keys, tmp_path, capsys):
    (private, public), _ = keys
    sign(folder, private)
    for wrong in (tmp_path / "none.pub", private, folder / "parity.json"):
        assert run_check(folder, wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"export: {wrong}: is no elliptic public key (")
        assert error.count("\n") == 1
    for wrong in (tmp_path / "none.pem", public):
        with pytest.raises(ValueError, match="is no elliptic private key"):
            sign(folder, wrong)
        assert not (folder / SIGNATURE).exists()


def test_without_the_package_the_error_says_what_to_install(folder, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ValueError, match="pip install model-signing"):
        sign(folder, keys[0][0])


def test_a_folder_that_is_no_export_is_one_line_and_exit_code_2(folder, run, tmp_path, capsys):
    for wrong, words in ((run, f"pass {run / 'export'}"), (tmp_path / "none", "make one with")):
        assert run_check(wrong) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
