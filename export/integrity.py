"""Whether an export folder is whole and its files belong together: SHA256SUMS, what is inside them, a signature.

    python -m export --check runs/digits/export
    python -m export --check runs/digits/export --public-key key.pub

SHA256SUMS finds damage; anyone can write it anew. That the files are of one training shows in what they carry and
answer; that they are from whom they should be shows only in the signature.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from export import onnx
from export.archive import BESIDE_HANDLER, FROM_EXPORT
from export.card import CARD
from export.programs import GRAPHS
from export.runtimes import run_onnxruntime, run_torchscript
from model.files import sha256, write_text
from model.spec import ModelSpec

SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
MANIFEST = "MAR-INF/MANIFEST.json"
TOLERANCE = 1e-4  # of a probability, and of a logit times the largest: that of export/parity.py
PICTURES = 8
ANEW = "export again or restore the file"


def run_check(folder: Path, public_key: Path | None = None) -> int:
    """Prints what `check` and `verify_signature` find. Returns 0 if that is nothing, 1 if something, 2 for a mistake.

    Where the signature does not hold, no file is parsed: whoever changed one may have meant to harm a parser.
    """
    try:
        findings = _check(folder, public_key)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    if findings:
        print(*findings, sep="\n")
        return 1
    unsigned = (folder / SIGNATURE).exists() and not public_key
    print(
        f"{len(_files(folder))} files, all as exported"
        + (", signature included" if public_key else "")
        + (f"; {SIGNATURE} was not checked: pass --public-key FILE" if unsigned else "")
    )
    return 0


def write_sums(folder: Path) -> None:
    """Writes folder/SHA256SUMS for `sha256sum -c`, over all files but itself and signatures.

    Raises:
        ValueError: a name needs escapes, or the folder holds something else than files and folders.
    """
    lines = []
    for name in _files(folder):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is neither a file nor a folder; remove it")
        if not name.isprintable() or "\\" in name:
            raise ValueError(f"{folder}: the name {name!r} must be printable and without a backslash; rename the file")
        lines.append(f"{sha256(folder / name)}  {name}\n")
    write_text(folder / SUMS, "".join(lines))


def check(folder: Path) -> list[str]:
    """What is wrong with an export folder: each finding names the file, the fault and the way out. Empty if nothing is.

    A file is opened only if its hash is the one in SHA256SUMS, and no pickle is loaded.
    """
    findings: list[str] = []
    _check_contents(folder, _check_sums(folder, findings), findings)
    return findings


def sign(folder: Path, private_key: Path) -> Path:
    """Writes folder/model.sig over all files of the folder. Write SHA256SUMS before.

    Args:
        private_key: PEM, elliptic (prime256v1, secp384r1 or secp521r1), without a password.

    Raises:
        ValueError: the key cannot be used, or the package is missing.
    """
    signing, _, hashing = _model_signing()
    target = folder / SIGNATURE
    target.unlink(missing_ok=True)  # it would be void, and must not outlive a failure
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # AttributeError: a key of another kind
        raise ValueError(
            f"{private_key}: is no elliptic private key without a password ({_line(error)}); make one with "
            "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
        ) from None
    config.set_hashing_config(hashing).sign(folder, target)
    return target


def verify_signature(folder: Path, public_key: Path) -> list[str]:
    """What is wrong with folder/model.sig: not there, of another key, or over other files. Empty if it holds.

    Raises:
        ValueError: the public key cannot be read, or the package is missing.
    """
    _, verifying, hashing = _model_signing()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{public_key}: is no elliptic public key ({_line(error)}); make it with "
            "`openssl ec -in key.pem -pubout -out key.pub`"
        ) from None
    if not (folder / SIGNATURE).is_file():
        return [f"{SIGNATURE}: missing; sign the export, or get it from whoever signed it"]
    try:
        config.set_hashing_config(hashing).verify(folder, folder / SIGNATURE)
    except Exception as error:  # a damaged signature raises whatever the damage leads to
        reason = re.sub(r": Expected .*?digest_value=.*?digest_value=.*?\)\\?'", "", _line(error))  # names suffice
        return [f"{SIGNATURE}: does not hold for these files and this key ({reason}); get them from their maker"]
    return []


def _check(folder: Path, public_key: Path | None) -> list[str]:
    if not ((folder / SUMS).exists() or (folder / "parity.json").exists()):
        within = folder / "export"
        way_out = f"pass {within}" if within.is_dir() else "make one with `python -m export RUN`"
        raise ValueError(f"{folder}: is no export, for it has neither {SUMS} nor parity.json; {way_out}")
    findings = verify_signature(folder, public_key) if public_key else []
    if not findings:
        return check(folder)
    _check_sums(folder, findings)
    return findings


# SHA256SUMS


def _files(folder: Path) -> list[str]:
    """Everything below `folder` that SHA256SUMS must list, by its path in it."""
    entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in entries)
    return sorted(name for name in names if name != SUMS and not name.endswith(".sig"))


def _check_sums(folder: Path, findings: list[str]) -> dict[str, str]:
    """The files whose hash is the listed one, with that hash: all others are damaged or unknown."""
    listed = _read_sums(folder, findings)
    if listed is None:
        return {}
    there = _files(folder)
    findings += [f"{name}: is not in {SUMS}; remove the file or export again" for name in there if name not in listed]
    whole = {}
    for name, digest in listed.items():
        if name not in there:
            findings.append(f"{name}: is in {SUMS} and missing; {ANEW}")
        elif not (folder / name).is_file():
            findings.append(f"{name}: is neither a file nor a folder; {ANEW}")
        elif sha256(folder / name) != digest:
            findings.append(f"{name}: its SHA-256 is not the one in {SUMS}; {ANEW}")
        else:
            whole[name] = digest
    return whole


def _read_sums(folder: Path, findings: list[str]) -> dict[str, str] | None:
    if not (folder / SUMS).is_file():
        findings.append(f"{SUMS}: missing; {ANEW}")
        return None
    try:
        lines = (folder / SUMS).read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        findings.append(f"{SUMS}: is damaged ({_line(error)}); {ANEW}")
        return None
    listed: dict[str, str] = {}
    for number, line in enumerate(lines[:-1], start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not match or match[2] in listed:
            findings.append(f"{SUMS}: line {number} is not a SHA-256, two spaces and a name that is new; {ANEW}")
        else:
            listed[match[2]] = match[1]
    if lines[-1]:
        findings.append(f"{SUMS}: ends within a line; {ANEW}")
    return listed


# What is inside


def _check_contents(folder: Path, whole: Mapping[str, str], findings: list[str]) -> None:
    specs = _read_specs(folder, whole, findings)
    names = sorted({PurePosixPath(file).stem for file in whole if file.endswith((".pt", ".mar"))})
    needed = [f"{name}{end}" for name in names for end in (".pt", *(f"{m}.onnx" for m in GRAPHS.values()), ".mar")]
    for file in (*needed, "index_to_name.json", "parity.json"):
        if not (folder / file).exists() and not any(finding.startswith(f"{file}: ") for finding in findings):
            findings.append(f"{file}: missing; {ANEW}")
    if not names and not findings:
        findings.append("NAME.pt, NAME.mar: there is no model; export again")
    if specs and "index_to_name.json" in whole:
        _check_labels(folder, specs, findings)
    if specs and CARD in whole:
        _check_card(folder, specs, findings)
    if specs and "parity.json" in whole:
        _check_proof(folder, specs, findings)
    for name in names:
        if f"{name}.mar" in whole:
            _check_archive(folder, name, whole, findings)
        if f"{name}.pt" in specs:
            _compare_answers(folder, name, specs, findings)


def _read_specs(folder: Path, whole: Mapping[str, str], findings: list[str]) -> dict[str, ModelSpec]:
    """The spec inside each artifact that could be read. Those that differ from the first one's become findings."""
    specs: dict[str, ModelSpec] = {}
    for file in sorted(whole, key=lambda file: (not file.endswith(".pt"), file)):  # the others were checked against it
        if file.endswith((".pt", ".pt2", ".mar", ".onnx")):
            with _noting(file, findings):
                path = folder / file
                specs[file] = onnx.read_spec(path) if file.endswith(".onnx") else _spec_in_zip(path)
    if not specs:
        return specs
    first, expected = next(iter(specs.items()))
    for file, spec in specs.items():
        if differing := [field for field, value in vars(spec).items() if value != getattr(expected, field)]:
            findings.append(f"{file}: carries another spec than {first} ({', '.join(differing)}); export again")
    beside = folder.resolve().parent / "model.pt"
    if beside.is_file() and sha256(beside) != expected.weights_sha256:
        findings.append(f"{first}: its spec names other weights than the run's model.pt; export the run again")
    return specs


def _spec_in_zip(path: Path) -> ModelSpec:
    """Of an archive, or of a file of torch's, which are zip files too: so no pickle in them need be loaded."""
    with zipfile.ZipFile(path) as file:
        inside = [name for name in file.namelist() if re.fullmatch(r"spec\.json|[^/]+/extra/spec\.json", name)]
        if len(inside) != 1:
            raise ValueError(f"{len(inside)} specs are inside, not one")
        return ModelSpec.from_json(file.read(inside[0]).decode(), source=inside[0])


def _check_labels(folder: Path, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    first, spec = next(iter(specs.items()))
    with _noting("index_to_name.json", findings):
        if _read_json(folder / "index_to_name.json") != {str(i): label for i, label in enumerate(spec.labels)}:
            findings.append(f"index_to_name.json: names other labels than the spec in {first}; export again")


def _check_card(folder: Path, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    first, spec = next(iter(specs.items()))
    with _noting(CARD, findings):
        if spec.weights_sha256 not in (folder / CARD).read_text(encoding="utf-8"):
            findings.append(f"{CARD}: describes other weights than those of {first}; export again")


def _check_proof(folder: Path, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    first, spec = next(iter(specs.items()))
    with _noting("parity.json", findings):
        report = _read_json(folder / "parity.json")
        if report["weights_sha256"] != spec.weights_sha256:
            findings.append(f"parity.json: is about other weights than those of {first}; export again")
        rows = [row for row in report["rows"] if not row.get("skipped")]
        failed = [f"{row['graph']} in {row['runtime']}" for row in rows if row["passed"] is not True]
        if failed:
            findings.append(f"parity.json: not passed by {', '.join(failed)}; export again")
        if not rows:
            findings.append("parity.json: nothing was compared; export again")


def _check_archive(folder: Path, name: str, whole: Mapping[str, str], findings: list[str]) -> None:
    """The archive's members: undamaged, those that its manifest and its handler need, the same as in the folder."""
    file = f"{name}.mar"
    with _noting(file, findings), zipfile.ZipFile(folder / file) as archive:
        if damaged := archive.testzip():
            findings.append(f"{file}: '{damaged}' inside is damaged; {ANEW}")
            return
        members = archive.namelist()
        model = json.loads(archive.read(MANIFEST))["model"]
        if model["serializedFile"] != f"{name}.pt":
            findings.append(f"{file}: its manifest names {model['serializedFile']}, not {name}.pt; export again")
        needed = [f"{name}.pt", model["handler"], model.get("configFile"), "pictures.py", "spec.json"]
        needed += [*BESIDE_HANDLER, *FROM_EXPORT]
        for member in needed:
            if member and members.count(member) != 1:
                findings.append(f"{file}: '{member}' is inside {members.count(member)} times, not once; export again")
        for member in sorted(set(members) & whole.keys()):
            with archive.open(member) as content:
                if _sha256_of(content) != whole[member]:
                    findings.append(f"{file}: '{member}' inside is not the {member} beside it; export again")


def _compare_answers(folder: Path, name: str, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    """The three graphs of NAME.pt against those of the ONNX files, on the same seeded pictures."""
    script = f"{name}.pt"
    for graph, middle in GRAPHS.items():
        file = f"{name}{middle}.onnx"
        if file not in specs or specs[file] != specs[script]:  # it is a finding already
            continue
        batch = _pictures(specs[script], graph)
        expected = got = None
        with _noting(script, findings):
            expected = run_torchscript(folder, name, graph, [batch]).outputs[0]
        with _noting(file, findings):
            got = run_onnxruntime(folder, name, graph, [batch]).outputs[0]
        if expected is None or got is None:
            continue
        tolerance = TOLERANCE * (float(np.abs(expected).max()) if graph == "network" else 1)
        difference = float(np.abs(expected - got).max()) if got.shape == expected.shape else float("nan")
        if not difference <= tolerance:  # nor if it is no number
            what = f"answers differ by up to {difference:.1e}, and {tolerance:.1e} is allowed"
            findings.append(f"{file}: is of another training than {script} ({what}); export again")


def _pictures(spec: ModelSpec, graph: str) -> np.ndarray:
    """Noise around a colour and a contrast for each picture, so that they get different answers.

    Returns:
        For `network` float32 (N, 3, S, S), normalised; else uint8 (N, S, S, 3).
    """
    random = np.random.default_rng(0)
    colours = random.uniform(0, 255, (PICTURES, 1, 1, 3))
    contrasts = np.linspace(5, 120, PICTURES).reshape(-1, 1, 1, 1)  # grey levels
    noise = random.standard_normal((PICTURES, spec.size, spec.size, 3))
    pixels = (colours + contrasts * noise).clip(0, 255).astype(np.uint8)
    if graph != "network":
        return pixels
    planes = (pixels / 255 - np.array(spec.mean)) / np.array(spec.std)
    return np.ascontiguousarray(planes.transpose(0, 3, 1, 2), dtype=np.float32)  # (N, 3, S, S)


# Helpers


@contextmanager
def _noting(file: str, findings: list[str]) -> Iterator[None]:
    """An error of the block becomes a finding: of a wrong file, parsers raise whatever it leads them into."""
    try:
        yield
    except Exception as error:
        findings.append(f"{file}: cannot be read ({_line(error)}); {ANEW}")


def _model_signing() -> tuple[Any, Any, Any]:
    """Its modules, and what is hashed: all but the signature, .git* too, which the package would leave out."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:  # model-signing 1.1.1 imports pyopenssl and does not declare it
        raise ValueError(f"signatures: {error}; pip install model-signing pyopenssl") from None
    config: Any = hashing.Config
    return signing, verifying, config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _sha256_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
