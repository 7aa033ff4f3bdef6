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

from export.__main__ import main
from export.output_folder import SIGNATURE, SUMS
from export.package import checksums, compare_graphs
from export.package.checksums import check, write_manifest, write_sums
from export.package.model_card import write_card
from export.package.signature import sign
from export.package.signature import verify as verify_signature
from export.pipeline import Options, export_run
from tests.conftest import replace_in_archive
from train import train
from training.options import TrainOptions

GRAPHS = ("digits.onnx", "digits.crops.onnx", "digits.pixels.onnx")
PROGRAMS = ("digits.pt2", "digits.crops.pt2", "digits.pixels.pt2")


def finished(run, exported, folder):
    """A copy of an export as it leaves the house: with its card and its sums, beside the weights of its run."""
    shutil.copytree(exported, folder / "export", ignore=shutil.ignore_patterns(SUMS, SIGNATURE))
    shutil.copy(run / "model.pt", folder)
    write_card(run, "digits", folder / "export")
    shutil.copy(folder / "export" / "MODEL_CARD.md", folder / "export" / "archive")
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
        train(TrainOptions(data="digits", arch="simplecnn", out=str(run), seed=1, epochs=2))
        export_run(run, Options(backend="onnx"))
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
    monkeypatch.setattr(checksums, "_check_contents", lambda *_: None)


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


def forge(folder):
    """What whoever alters a folder can write anew: the manifest and the sums."""
    seen = json.loads((folder / "manifest.json").read_text())["golden_difference"]
    write_manifest(folder, "digits", "1.0", seen)
    write_sums(folder)


def put(folder, name, content):
    """A file of the folder, and in its archive where it is packed."""
    (folder / name).write_bytes(content)
    if (folder / "archive" / name).is_file():
        (folder / "archive" / name).write_bytes(content)
    with zipfile.ZipFile(folder / "digits.mar") as packed:
        members = {info: packed.read(info) for info in packed.infolist()}
    with zipfile.ZipFile(folder / "digits.mar", "w") as packed:
        for info, before in members.items():
            packed.writestr(info, content if info.filename == name else before)


def run_check(folder, public_key=None):
    """The exit code of the command."""
    return main(["--check", str(folder), *(["--public-key", str(public_key)] if public_key else [])])


def test_what_was_exported_is_whole(whole, capsys):
    assert check(whole) == []
    assert run_check(whole) == 0
    count = len((whole / SUMS).read_text().splitlines())
    assert capsys.readouterr().out == (
        f"{count} files: the sums agree. Nothing was run, and anyone can write files and sums anew: only a signature "
        "says whose they are (--public-key FILE)\n"
    )


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
    files = [path for path in sorted(whole.rglob("*")) if path.is_file()]
    assert {SUMS, "digits.mar", "digits.pt", "parity.json", *GRAPHS, *PROGRAMS} <= {path.name for path in files}
    assert {"archive/predictor/spec.py", "archive/spec.json"} <= {path.relative_to(whole).as_posix() for path in files}
    for path in files:
        if not (size := path.stat().st_size):  # an __init__.py
            continue
        for place in (0, 1, size // 2, size - 2, size - 1, *(choose.randrange(size) for _ in range(5))):
            bit = choose.randrange(8)
            with flipped(path, place, bit):
                findings = check(whole)
            assert findings, (path.name, place, bit)
            assert all(path.name in finding for finding in findings), findings
    assert check(whole) == []


def test_every_flipped_bit_of_the_sums_is_found(whole, sums_only, monkeypatch):
    """It is the one file that has no hash of its own."""
    monkeypatch.setattr(checksums, "sha256", functools.cache(checksums.sha256))  # the others stay as they are
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

    watch(checksums, "_spec_in_zip", lambda path: path.name)
    watch(checksums, "read_json", lambda path: path.name)
    watch(checksums.onnx, "read_spec", lambda path: path.name)
    watch(checksums, "check_archive", lambda folder, name, *_: f"{name}.mar")
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


def under_our_spec(folder, other, name):
    """The other training's file with the spec of this one."""
    spec = checksums.onnx.read_spec(folder / "digits.onnx")
    if name.endswith(".onnx"):
        model = onnx.load(other / name)
        onnx.helper.set_model_props(model, {"spec": spec.to_json()})
        return model.SerializeToString()
    buffer = io.BytesIO()
    with zipfile.ZipFile(other / name) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            is_spec = info.filename.endswith("extra/spec.json")
            new.writestr(info, spec.to_json().encode() if is_spec else old.read(info))
    return buffer.getvalue()


@pytest.mark.parametrize("name", [*GRAPHS, *PROGRAMS, "digits.pt"])
def test_other_weights_under_the_same_spec_are_found_by_their_answers(folder, other, name):
    put(folder, name, under_our_spec(folder, other, name))
    forge(folder)
    assert check(folder) == []  # nothing is run where no signature vouches for it
    findings = check(folder, trusted=True)
    if name == "digits.pt":  # the others are compared with it
        blamed = [one.split(":")[0] for one in findings if "is of another training than digits.pt" in one]
        assert sorted(blamed) == sorted([*GRAPHS, *PROGRAMS]), findings
    else:
        assert any(one.startswith(f"{name}: is of another training than ") for one in findings), findings


@pytest.mark.parametrize("small", ["int8", "fp16"])
def test_int8_and_fp16_files_are_of_this_training_too(folder, other, small):
    for middle in ("", ".crops"):
        shutil.copy(folder / f"digits{middle}.onnx", folder / f"digits{middle}.{small}.onnx")
    forge(folder)
    assert check(folder, trusted=True) == []
    for middle in ("", ".crops"):
        content = under_our_spec(folder, other, f"digits{middle}.onnx")
        (folder / f"digits{middle}.{small}.onnx").write_bytes(content)
        forge(folder)
        files = {finding.split(":")[0] for finding in check(folder, trusted=True)}
        # The network's file too, where the two trainings differ in temperature: that is inside the crop graph.
        assert {f"digits{middle}.{small}.onnx"} <= files <= {f"digits.{small}.onnx", f"digits.crops.{small}.onnx"}
    shutil.copy(other / "digits.onnx", folder / f"digits.{small}.onnx")
    forge(folder)
    (finding,) = check(folder)
    assert finding.startswith(f"digits.{small}.onnx: carries another spec than digits.pt (")


def test_golden_images_with_other_answers_are_found_where_the_graphs_are_run(folder):
    content = json.loads((folder / "golden.json").read_text())
    content["probabilities"].reverse()
    put(folder, "golden.json", json.dumps(content).encode())
    forge(folder)
    assert check(folder) == []
    findings = check(folder, trusted=True)
    assert {one.split(": is of another training than ")[0] for one in findings} == {
        "digits.crops.onnx", "digits.pt", "digits.crops.pt2",
    }  # fmt: skip


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
    labels, proof, staged, archive = check(folder)
    assert staged == "archive/index_to_name.json: is not the index_to_name.json of the export; export again"
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
        ({}, ("predictor/spec.py",), "'predictor/spec.py' is inside 0 times"),
        ({}, ("classifier_handler.py",), "'classifier_handler.py' is inside 0 times"),
        ({}, ("model-config.yaml",), "'model-config.yaml' is inside 0 times"),
        ({}, ("spec.json",), "cannot be read (0 specs are inside, not one)"),
        ({}, ("MAR-INF/MANIFEST.json",), "'MAR-INF/MANIFEST.json' is inside 0 times"),
        (
            {"MAR-INF/MANIFEST.json": '{"model": {"serializedFile": "x.pt", "handler": "classifier_handler.py"}}'},
            (),
            "its manifest names x.pt as serializedFile, not digits.pt",
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
    spec = checksums.onnx.read_spec(folder / "digits.onnx")
    replace_in_archive(other / "digits.mar", folder / "digits.mar", {"spec.json": spec.to_json()})
    forge(folder)
    staged = ("MODEL_CARD.md", "golden.json")
    assert check(folder) == [
        *(f"archive/{one}: is not the one that was packed (manifest.json); export again" for one in staged),
        *(
            f"digits.mar: '{member}' inside is not the {member} beside it; export again"
            for member in ("MODEL_CARD.md", "digits.crops.onnx", "digits.pt", "golden.json")
        ),
    ]


def test_a_signature_holds_for_these_files_and_this_key_only(folder, keys, capsys):
    (private, public), (_, theirs) = keys
    assert sign(folder, private) == folder / SIGNATURE
    assert verify_signature(folder, public) == []
    assert run_check(folder, public) == 0
    assert "all as exported: signature, sums, contents and answers" in capsys.readouterr().out
    assert run_check(folder) == 0
    assert "Nothing was run" in capsys.readouterr().out
    (finding,) = verify_signature(folder, theirs)
    assert finding.startswith(f"{SIGNATURE}: does not hold")
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
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
    monkeypatch.setattr(checksums, "_check_contents", lambda *_: pytest.fail("a file was opened"))
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


# Alterations of an export whose maker writes the manifest and the sums anew


def altered(change_members):
    """An alteration of the archive's members, given as a dict from names to content."""

    def alter(folder):
        with zipfile.ZipFile(folder / "digits.mar") as packed:
            members = {info.filename: packed.read(info) for info in packed.infolist()}
        extra = change_members(members) or []
        with zipfile.ZipFile(folder / "digits.mar", "w") as packed:
            for info, content in [*members.items(), *extra]:
                packed.writestr(info, content)

    return alter


def appended(member):
    return altered(lambda members: members.update({member: members[member] + b"\nimport os\n"}))


def manifest_says(**values):
    def change_members(members):
        content = json.loads(members["MAR-INF/MANIFEST.json"])
        content["model"] |= {key: value for key, value in values.items() if key != "runtime"}
        content |= {key: value for key, value in values.items() if key == "runtime"}
        members["MAR-INF/MANIFEST.json"] = json.dumps(content).encode()

    return altered(change_members)


def a_link(members):
    del members["golden.json"]
    info = zipfile.ZipInfo("golden.json")
    info.external_attr = 0o120777 << 16
    return [(info, b"/etc/passwd")]


def twice(members):
    return [(zipfile.ZipInfo("handler/request_parsing.py"), b"import os")]


def seen_by_a_stream_only(folder):
    """A member without an entry in the table of contents: Java's stream unpacks it, Python does not see it."""
    with zipfile.ZipFile(folder / "digits.mar", "a") as packed:
        packed.writestr("yaml.py", b"import os")
        del packed.filelist[-1], packed.NameToInfo["yaml.py"]


def golden_says(**values):
    def alter(folder):
        content = json.loads((folder / "golden.json").read_text()) | values
        put(folder, "golden.json", json.dumps(content).encode())

    return alter


def config_says(old, new):
    def alter(folder):
        text = (folder / "model-config.yaml").read_text()
        assert old in text
        put(folder, "model-config.yaml", text.replace(old, new).encode())

    return alter


def labels_swapped(folder):
    names = json.loads((folder / "index_to_name.json").read_text())
    put(folder, "index_to_name.json", json.dumps(names | {"3": names["4"], "4": names["3"]}).encode())


def a_script_that_writes(folder):
    class Writes(torch.nn.Module):
        def forward(self, images):
            torch.save(images, "written-by-a-script")
            return images

    spec = checksums.onnx.read_spec(folder / "digits.onnx")
    path = folder / "prepared"
    with contextlib.suppress(DeprecationWarning):
        torch.jit.save(torch.jit.script(Writes()), str(path), _extra_files={"spec.json": spec.to_json()})
    content = path.read_bytes()
    path.unlink()
    put(folder, "digits.pt", content)


def int8_of_anything(folder):
    shutil.copy(folder / "digits.crops.onnx", folder / "digits.int8.onnx")


def proof_of_nothing(folder):
    change(folder / "parity.json", rows=[])


def card_that_praises(folder):
    put(folder, "MODEL_CARD.md", (folder / "MODEL_CARD.md").read_bytes() + b"\nAccuracy: 100%\n")


def program_removed(folder):
    (folder / "digits.pixels.pt2").unlink()


def another_model(folder):
    shutil.copy(folder / "digits.pt", folder / "cats.pt")


def staged(name, text):
    """In the folder that the archiver's line packs again."""
    return lambda folder: (folder / "archive" / name).write_text(text)


# name: (alteration, whether it is found without a key; with one, all are)
ALTERATIONS = {
    "trojaned handler": (appended("classifier_handler.py"), True),
    "trojaned parser of requests": (appended("handler/request_parsing.py"), True),
    "trojaned decoder": (appended("predictor/pillow_preprocessing.py"), True),
    "trojaned sitecustomize": (appended("sitecustomize.py"), True),
    "trojaned handler, staged": (staged("handler/request_parsing.py", "import os"), True),
    "trojaned package, staged": (staged("predictor/__init__.py", "import os"), True),
    "module that shadows yaml, staged": (staged("yaml.py", "import os"), True),
    "golden.json of no images, staged": (staged("golden.json", '{"images": []}'), True),
    "spec of anything, staged": (staged("spec.json", "{}"), True),
    "module that shadows yaml": (altered(lambda members: [("yaml.py", b"import os")]), True),
    "member outside": (altered(lambda members: [("../evil.py", b"import os")]), True),
    "member at an absolute path": (altered(lambda members: [("/tmp/evil.py", b"import os")]), True),
    "member twice": (altered(twice), True),
    "member that is a link": (altered(a_link), True),
    "member that only a stream sees": (seen_by_a_stream_only, True),
    "handler of TorchServe's own": (manifest_says(handler="image_classifier"), True),
    "packages to install": (manifest_says(requirementsFile="requirements.txt"), True),
    "another runtime": (manifest_says(runtime="LSP"), True),
    "emptied golden.json": (golden_says(images=[], probabilities=[]), True),
    "golden.json that allows all": (golden_says(tolerance={"cpu": 1.0, "gpu": 1.0}), True),
    "golden.json of no images": (golden_says(images=[{"name": "0", "b64": ""}] * 8), True),
    "settings of TorchServe": (config_says("responseTimeout: ", "startupTimeout: 9999\nresponseTimeout: "), True),
    "backend whose file is not packed": (config_says("\nbackend: ", "\nbackend: onnx-int8 #"), True),
    "swapped labels": (labels_swapped, True),
    "proof of nothing": (proof_of_nothing, True),
    "a program removed": (program_removed, True),
    "another model beside": (another_model, True),
    "script that writes a file": (a_script_that_writes, False),
    "int8 of anything": (int8_of_anything, False),
    "card that praises": (card_that_praises, False),
    "golden.json of other answers": (golden_says(probabilities=[[1.0] + [0.0] * 9] * 8), False),
}


@pytest.fixture(scope="module")
def signed(whole, keys, tmp_path_factory):
    target = tmp_path_factory.mktemp("signed") / "digits"
    shutil.copytree(whole.parent, target)
    sign(target / "export", keys[0][0])
    return target


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_alteration_is_found_and_nothing_is_run(signed, keys, name, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "digits" / "export"
    shutil.copytree(signed, folder.parent)
    monkeypatch.chdir(tmp_path)
    alter, found = ALTERATIONS[name]
    alter(folder)
    forge(folder)
    for runs in ("run_torchscript", "run_exported_program", "run_onnxruntime"):
        monkeypatch.setattr(compare_graphs, runs, lambda *_: pytest.fail("a graph was run"))
    code = run_check(folder)
    out = capsys.readouterr().out
    assert code == found, out
    assert found or "Nothing was run" in out  # and no word that the files are good
    assert run_check(folder, keys[0][1]) == 1
    assert "does not hold for these files" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_one_who_does_not_know_of_the_manifest_is_found_by_it(folder):
    appended("classifier_handler.py")(folder)
    write_sums(folder)
    assert (
        "digits.mar: 'classifier_handler.py' inside is not the one that was packed (manifest.json); export again"
        in (check(folder))
    )


def test_a_handler_of_another_checkout_is_said_to_be_one_and_passes_with_a_signature(
    folder, keys, tmp_path, monkeypatch
):
    name = "handler/request_parsing.py"
    newer = tmp_path / name
    newer.parent.mkdir()
    newer.write_text("# of a newer checkout")
    monkeypatch.setattr(checksums.archive, "PROJECT", tmp_path)
    others = {member: tmp_path / member for member in checksums.archive.CODE if member != name}
    for member, path in others.items():
        path.parent.mkdir(exist_ok=True)
        shutil.copy(checksums.archive.CODE[member], path)
    monkeypatch.setattr(checksums.archive, "CODE", others | {name: newer})
    assert check(folder) == [
        f"{what} differs from this checkout's {name}; export again, or, if another checkout made it, check it there or "
        "by its signature (--public-key FILE)"
        for what in (f"archive/{name}:", f"digits.mar: '{name}' inside")
    ]
    sign(folder, keys[0][0])
    assert run_check(folder, keys[0][1]) == 0


def test_what_no_export_wrote_is_named(folder, capsys):
    (folder / "notes.txt").write_text("x")
    write_sums(folder)
    assert run_check(folder) == 0
    assert capsys.readouterr().out.endswith("no export wrote, though the sums cover: notes.txt\n")


def test_a_folder_that_is_no_export_is_one_line_and_exit_code_2(folder, run, tmp_path, capsys):
    for wrong, words in ((run, f"pass {run / 'export'}"), (tmp_path / "none", "make one with")):
        assert run_check(wrong) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
