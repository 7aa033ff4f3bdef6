"""Whether an export folder is whole and its files belong together: SHA256SUMS, what is inside them, a signature.

    python -m export --check runs/digits/export
    python -m export --check runs/digits/export --public-key key.pub

SHA256SUMS finds damage; anyone can write it anew. What the files say of themselves, and whether the archive's programs
are this checkout's, is compared without running or unpickling anything. Only a signature says from whom the files are:
where it holds, the graphs are run too, and their answers compared.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from export.graphs import onnx
from export.graphs.exported_program import GRAPHS
from export.output_folder import MANIFEST, STAGED, SUMS
from export.package import archive, golden_images, serving_settings, signature
from export.package.model_card import CARD
from export.progress import one_line
from export.proof import sessions
from export.proof.runtimes import Runtime, run_exported_program, run_onnxruntime, run_torchscript
from predictor import golden_check
from predictor.backends import FILES, HALF_TOLERANCE
from predictor.files import sha256, write_text
from predictor.golden_check import FILE as GOLDEN
from predictor.golden_check import Golden
from predictor.pillow_preprocessing import read
from predictor.spec import ModelSpec

TOLERANCE = 1e-4  # of a probability, and of a logit times the largest: that of export/proof/parity.py
IMAGES = 8
MOST_TEXT = 64_000_000  # bytes of a text inside an archive: a zip file can promise terabytes
ANEW = "export again or restore the file"


def write_manifest(folder: Path, name: str, version: str, seen: Mapping[str, float] | None = None) -> None:
    """Writes folder/manifest.json: which files this export wrote, and what its archive holds.

    Args:
        seen: for each file that can serve, how far it is from the golden answers.
    """
    packed = folder / f"{name}.mar"
    content = {
        "name": name,
        "version": version,
        "files": sorted({*files_of(folder), MANIFEST, SUMS}),
        "archive": archive.hashes(packed) if packed.is_file() else {},
        "golden_difference": dict(seen or {}),
    }
    write_text(folder / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_sums(folder: Path) -> None:
    """Writes folder/SHA256SUMS for `sha256sum -c`, over all files but itself and signatures.

    Raises:
        ValueError: a name needs escapes, or the folder holds something else than files and folders.
    """
    lines = []
    for name in files_of(folder):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is neither a file nor a folder; remove it")
        if not name.isprintable() or "\\" in name:
            raise ValueError(f"{folder}: the name {name!r} must be printable and without a backslash; rename the file")
        lines.append(f"{sha256(folder / name)}  {name}\n")
    write_text(folder / SUMS, "".join(lines))


def check_export(folder: Path, public_key: Path | None = None) -> list[str]:
    """What `signature.verify`, where there is a key, and `check` find wrong with an export.

    Where the signature does not hold, no file is parsed: whoever changed one may have meant to harm a parser.

    Raises:
        ValueError: the folder is no export, or the key cannot be used.
    """
    if not ((folder / SUMS).exists() or (folder / "parity.json").exists()):
        within = folder / "export"
        way_out = f"pass {within}" if within.is_dir() else "make one with `python -m export RUN`"
        raise ValueError(f"{folder}: is no export, for it has neither {SUMS} nor parity.json; {way_out}")
    findings = signature.verify(folder, public_key) if public_key else []
    if not findings:
        return check(folder, trusted=public_key is not None)
    _check_sums(folder, findings)
    return findings


def check(folder: Path, *, trusted: bool = False) -> list[str]:
    """What is wrong with an export folder: each finding names the file, the fault and the way out. Empty if nothing is.

    A file is opened only if its hash is the one in SHA256SUMS, and no pickle is loaded.

    Args:
        trusted: a signature vouches for the files. Then, if nothing else is wrong, the graphs are run and compared.
            Otherwise none is, and the archive's programs must be this checkout's.
    """
    findings: list[str] = []
    _check_contents(folder, _check_sums(folder, findings), trusted, findings)
    return findings


def files_of(folder: Path) -> list[str]:
    """Everything below `folder` that SHA256SUMS must list, by its path in it."""
    entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in entries)
    return sorted(name for name in names if name != SUMS and not name.endswith(".sig"))


# SHA256SUMS


def _check_sums(folder: Path, findings: list[str]) -> dict[str, str]:
    """The files whose hash is the listed one, with that hash: all others are damaged or unknown."""
    listed = _read_sums(folder, findings)
    if listed is None:
        return {}
    there = files_of(folder)
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
        findings.append(f"{SUMS}: is damaged ({one_line(error)}); {ANEW}")
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


def _models(whole: Mapping[str, str]) -> list[str]:
    """The names of the models; not of the archives NAME-VERSION.mar that a rollout keeps."""
    return sorted(PurePosixPath(file).stem for file in whole if file.endswith(".pt") and "/" not in file)


def _check_contents(folder: Path, whole: Mapping[str, str], trusted: bool, findings: list[str]) -> None:
    specs = _read_specs(folder, whole, findings)
    names = _models(whole) or sorted(PurePosixPath(file).stem for file in whole if file.endswith(".mar"))
    needed = [
        f"{name}{end}"
        for name in names
        for end in (".pt", *(f"{m}.{kind}" for m in GRAPHS.values() for kind in ("onnx", "pt2")), ".mar")
    ]
    staged = [f"{STAGED}/{member}" for member in archive.IN_STAGE]
    common = ("index_to_name.json", "parity.json", GOLDEN, serving_settings.CONFIG_FILE, MANIFEST)
    for file in (*needed, *common, *staged):
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
    if specs and {GOLDEN, serving_settings.CONFIG_FILE, MANIFEST} <= whole.keys():
        _check_golden(folder, names, specs, findings)
    if serving_settings.CONFIG_FILE in whole and not trusted:
        _check_config(folder, findings)
    if MANIFEST in whole:
        _check_staged(folder, whole, trusted, findings)
    for name in names:
        if {f"{name}.mar", serving_settings.CONFIG_FILE, MANIFEST} <= whole.keys():
            _check_archive(folder, name, whole, trusted, findings)
    if trusted and not findings:
        for name in names:
            _compare_answers(folder, name, specs, findings)
            _compare_golden(folder, name, specs[f"{name}.pt"], findings)


def _read_specs(folder: Path, whole: Mapping[str, str], findings: list[str]) -> dict[str, ModelSpec]:
    """The spec inside each artifact that could be read. Those that differ from the first one's become findings."""
    specs: dict[str, ModelSpec] = {}
    for file in sorted(whole, key=lambda file: (not file.endswith(".pt"), file)):  # the others were checked against it
        if file.endswith((".pt", ".pt2", ".mar", ".onnx")) and not _is_kept(file, whole):
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
        return ModelSpec.from_json(_text(file, inside[0]), source=inside[0])


def _is_kept(file: str, whole: Mapping[str, str]) -> bool:
    """Whether it may be an archive that a rollout keeps as NAME-VERSION.mar: of another training, on purpose."""
    return file.endswith(".mar") and f"{PurePosixPath(file).stem.rpartition('-')[0]}.mar" in whole


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


def _check_golden(folder: Path, names: list[str], specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    """They must be there, be probabilities, and allow no more than an export would."""
    spec = next(iter(specs.values()))
    with _noting(GOLDEN, findings):
        found, rows = Golden(folder), len(_read_json(folder / GOLDEN)["probabilities"])
        good = found.bodies and all(found.bodies) and found.expected.shape == (len(found.bodies), len(spec.labels))
        if not (good and rows and np.allclose(found.expected.sum(axis=1), 1, atol=1e-4) and found.expected.min() >= 0):
            findings.append(f"{GOLDEN}: holds no images, or no probability of each label for each; export again")
        seen = _read_json(folder / MANIFEST)["golden_difference"]
        for name in names:
            served = FILES[serving_settings.backend_of(folder / serving_settings.CONFIG_FILE)].format(name)
            allowed = {"cpu": golden_check.tolerance(served, float(seen.get(served, 0))), "gpu": HALF_TOLERANCE}
            if found.tolerance != allowed:
                findings.append(f"{GOLDEN}: allows {found.tolerance}, and an export {allowed}; export again")


def _check_config(folder: Path, findings: list[str]) -> None:
    """What TorchServe is told about the model, but for the two values that an export sets."""
    with _noting(serving_settings.CONFIG_FILE, findings):
        if not serving_settings.is_this_checkouts(folder / serving_settings.CONFIG_FILE):
            findings.append(_differs(f"{serving_settings.CONFIG_FILE}:", "handler/model-config.yaml"))


def _check_staged(folder: Path, whole: Mapping[str, str], trusted: bool, findings: list[str]) -> None:
    """The files that the archiver's line packs again: those of the archive, and no other."""
    with _noting(MANIFEST, findings):
        packed = _read_json(folder / MANIFEST)["archive"]
        for file, digest in whole.items():
            top, _, member = file.partition("/")
            if top != STAGED:
                continue
            if member not in archive.IN_STAGE:
                findings.append(f"{file}: is nothing that an export packs; remove it")
            elif member in whole and digest != whole[member]:
                findings.append(f"{file}: is not the {member} of the export; export again")
            elif digest != packed.get(member):
                findings.append(f"{file}: is not the one that was packed ({MANIFEST}); export again")
            if not trusted and member in archive.CODE and digest != sha256(archive.CODE[member]):
                findings.append(_differs(f"{file}:", archive.CODE[member].relative_to(archive.PROJECT).as_posix()))


def _check_archive(folder: Path, name: str, whole: Mapping[str, str], trusted: bool, findings: list[str]) -> None:
    """The archive's members: those of an export and no other, undamaged, the same as in the folder and the checkout."""
    file = f"{name}.mar"
    with _noting(file, findings), zipfile.ZipFile(folder / file) as packed:
        if wrong := _wrong_members(folder, packed, name):
            findings += [f"{file}: {words}; export again" for words in wrong]
            return
        if damaged := packed.testzip():
            findings.append(f"{file}: '{damaged}' inside is damaged; {ANEW}")
            return
        listed = _read_json(folder / MANIFEST)
        findings += [f"{file}: {words}; export again" for words in _wrong_manifest(packed, name, listed["version"])]
        for member, digest in sorted(archive.hashes(folder / file).items()):
            if member in whole and digest != whole[member]:
                findings.append(f"{file}: '{member}' inside is not the {member} beside it; export again")
            elif digest != listed["archive"].get(member):
                findings.append(f"{file}: '{member}' inside is not the one that was packed ({MANIFEST}); export again")
            if not trusted and member in archive.CODE and digest != sha256(archive.CODE[member]):
                source = archive.CODE[member].relative_to(archive.PROJECT).as_posix()
                findings.append(_differs(f"{file}: '{member}' inside", source))


def _wrong_members(folder: Path, packed: zipfile.ZipFile, name: str) -> list[str]:
    """What is wrong with the names of the members, before any of them is read."""
    there, needed = (
        packed.namelist(),
        archive.members(name, serving_settings.backend_of(folder / serving_settings.CONFIG_FILE)),
    )
    wrong = [f"'{one}' is inside {there.count(one)} times, not once" for one in sorted(needed) if there.count(one) != 1]
    for info in packed.infolist():
        if info.filename not in needed:
            wrong.append(f"'{info.filename}' inside is nothing that an export packs")
        elif (info.external_attr >> 28) not in (0, 8):  # the kind of file, of POSIX: 8 is an ordinary one
            wrong.append(f"'{info.filename}' inside is not an ordinary file")
    if not wrong and not _is_plain(packed):
        wrong.append("it holds bytes that its table of contents does not name")
    return wrong


def _is_plain(packed: zipfile.ZipFile) -> bool:
    """Whether a reader of the local headers, as Java's streams are, sees what one of the table of contents sees."""
    end, file = 0, packed.fp
    assert file is not None
    for info in sorted(packed.infolist(), key=lambda info: info.header_offset):
        file.seek(info.header_offset)
        header = file.read(30)
        flags, method = struct.unpack("<HH", header[6:10])
        crc, packed_size, size, name_length, extra_length = struct.unpack("<IIIHH", header[14:30])
        same = (method, crc) == (info.compress_type, info.CRC) and file.read(name_length) == info.filename.encode()
        sizes = {packed_size, size} == {0xFFFFFFFF} or (packed_size, size) == (info.compress_size, info.file_size)
        if info.header_offset != end or flags & 8 or not same or not sizes:
            return False
        end = info.header_offset + 30 + name_length + extra_length + info.compress_size
    return end == packed.start_dir


def _wrong_manifest(packed: zipfile.ZipFile, name: str, version: str) -> list[str]:
    """What is wrong with what the archive tells TorchServe to load."""
    content = json.loads(_text(packed, archive.MANIFEST))
    model, runtime = content["model"], content.get("runtime")
    expected = {
        "modelName": name,
        "modelVersion": version,
        "serializedFile": f"{name}.pt",
        "handler": archive.ENTRY,
        "configFile": serving_settings.CONFIG_FILE,
    }
    wrong = [f"its manifest names {model.get(key)} as {key}, not {value}" for key, value in expected.items()
             if model.get(key) != value]  # fmt: skip
    wrong += [f"its manifest has '{key}', which no export writes" for key in sorted(model.keys() - expected.keys())]
    return wrong + [f"its manifest names {runtime} as runtime, not python"] * (runtime != "python")


def _differs(what: str, source: str) -> str:
    return (
        f"{what} differs from this checkout's {source}; export again, or, if another checkout made it, check it there "
        "or by its signature (--public-key FILE)"
    )


def _compare_answers(folder: Path, name: str, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    """The three graphs of NAME.pt against those of the other files, on the same seeded images."""
    script = f"{name}.pt"
    for graph, middle in GRAPHS.items():
        batch = _images(specs[script], graph)
        expected = None
        with _noting(script, findings):
            expected = run_torchscript(folder, name, graph, [batch]).outputs[0]
        if expected is None:
            continue
        largest = float(np.abs(expected).max()) if graph == "network" else 1.0
        runs: dict[str, Runtime] = {"onnx": run_onnxruntime, "pt2": run_exported_program}
        for kind, run in runs.items():
            file = f"{name}{middle}.{kind}"
            with _noting(file, findings):
                got = run(folder, name, graph, [batch]).outputs[0]
                _compare(file, script, got, expected, TOLERANCE * largest, findings)
    for small, tolerance in (("int8", golden_check.INT8), ("fp16", HALF_TOLERANCE)):
        if {f"{name}.{small}.onnx", f"{name}.crops.{small}.onnx"} <= specs.keys():
            _compare_smaller(folder, name, small, tolerance, specs[script], findings)


def _compare_smaller(
    folder: Path, name: str, small: str, tolerance: float, spec: ModelSpec, findings: list[str]
) -> None:
    """The network of an int8 or fp16 pair against its crop graph, which the golden images judge."""
    file, crops = f"{name}.{small}.onnx", f"{name}.crops.{small}.onnx"
    with _noting(file, findings):
        logits = sessions.outputs(folder / file, _images(spec, "network")) / spec.temperature
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected = sessions.outputs(folder / crops, _images(spec, "crops"))
        _compare(file, crops, powers / powers.sum(axis=1, keepdims=True), expected, tolerance, findings)


def _compare_golden(folder: Path, name: str, spec: ModelSpec, findings: list[str]) -> None:
    """Each file that could serve against the archive's golden images."""
    seen, found = _read_json(folder / MANIFEST)["golden_difference"], Golden(folder)
    crops = np.stack([read(body, spec.rule) for body in found.bodies])
    for file, classify in golden_images.servable(folder, name).items():
        with _noting(file, findings):
            tolerance = golden_check.tolerance(file, float(seen.get(file, 0)))
            _compare(file, GOLDEN, classify(crops), found.expected, tolerance, findings)


def _compare(
    file: str, reference: str, got: np.ndarray, expected: np.ndarray, tolerance: float, findings: list[str]
) -> None:
    difference = float(np.abs(expected - got).max()) if got.shape == expected.shape else math.nan
    if not difference <= tolerance:  # nor if it is NaN
        what = f"answers differ by up to {difference:.1e}, and {tolerance:.1e} is allowed"
        findings.append(f"{file}: is of another training than {reference} ({what}); export again")


def _images(spec: ModelSpec, graph: str) -> np.ndarray:
    """Noise around a colour and a contrast for each image, so that they get different answers.

    Returns:
        For `network` float32 (N, 3, H, W), normalised; else uint8 (N, H, W, 3).
    """
    random = np.random.default_rng(0)
    colours = random.uniform(0, 255, (IMAGES, 1, 1, 3))
    contrasts = np.linspace(5, 120, IMAGES).reshape(-1, 1, 1, 1)  # grey levels
    noise = random.standard_normal((IMAGES, spec.height, spec.width, 3))
    pixels = (colours + contrasts * noise).clip(0, 255).astype(np.uint8)
    if graph != "network":
        return pixels
    planes = (pixels / 255 - np.array(spec.mean)) / np.array(spec.std)
    return np.ascontiguousarray(planes.transpose(0, 3, 1, 2), dtype=np.float32)  # (N, 3, H, W)


# Helpers


@contextmanager
def _noting(file: str, findings: list[str]) -> Iterator[None]:
    """An error of the block becomes a finding: of a wrong file, parsers raise whatever it leads them into."""
    try:
        yield
    except Exception as error:
        findings.append(f"{file}: cannot be read ({one_line(error)}); {ANEW}")


def _text(packed: zipfile.ZipFile, name: str) -> str:
    """
    Raises:
        ValueError: it is larger than any text of an export.
    """
    if packed.getinfo(name).file_size > MOST_TEXT:
        raise ValueError(f"'{name}' inside is larger than {MOST_TEXT:,} bytes")
    return packed.read(name).decode()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
