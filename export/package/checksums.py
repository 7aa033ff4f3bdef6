"""Whether an export folder is whole and its files belong together: SHA256SUMS, what is inside them, a signature.

    python -m export --check runs/digits/export
    python -m export --check runs/digits/export --public-key key.pub

SHA256SUMS finds damage; anyone can write it anew. What the files say of themselves, and whether the archive's programs
are this checkout's, is compared without running or unpickling anything. Only a signature says from whom the files are:
where it holds, the graphs are run too, and their answers compared.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from export.graphs import onnx
from export.graphs.exported_program import GRAPHS
from export.output_folder import MANIFEST, STAGED, SUMS
from export.package import archive, serving_settings, signature
from export.package.archive_check import check_archive, check_staged
from export.package.compare_graphs import compare_golden, compare_graphs
from export.package.findings import ANEW, differs, noting, read_json, text_inside
from export.package.model_card import CARD
from export.progress import one_line
from predictor import golden_check
from predictor.backends import FILES, HALF_TOLERANCE
from predictor.files import sha256, write_text
from predictor.golden_check import FILE as GOLDEN
from predictor.golden_check import Golden
from predictor.spec import ModelSpec


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
        check_staged(folder, whole, trusted, findings)
    for name in names:
        if {f"{name}.mar", serving_settings.CONFIG_FILE, MANIFEST} <= whole.keys():
            check_archive(folder, name, whole, trusted, findings)
    if trusted and not findings:
        for name in names:
            compare_graphs(folder, name, specs, findings)
            compare_golden(folder, name, specs[f"{name}.pt"], findings)


def _read_specs(folder: Path, whole: Mapping[str, str], findings: list[str]) -> dict[str, ModelSpec]:
    """The spec inside each artifact that could be read. Those that differ from the first one's become findings."""
    specs: dict[str, ModelSpec] = {}
    for file in sorted(whole, key=lambda file: (not file.endswith(".pt"), file)):  # the others were checked against it
        if file.endswith((".pt", ".pt2", ".mar", ".onnx")) and not _is_kept(file, whole):
            with noting(file, findings):
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
        return ModelSpec.from_json(text_inside(file, inside[0]), source=inside[0])


def _is_kept(file: str, whole: Mapping[str, str]) -> bool:
    """Whether it may be an archive that a rollout keeps as NAME-VERSION.mar: of another training, on purpose."""
    return file.endswith(".mar") and f"{PurePosixPath(file).stem.rpartition('-')[0]}.mar" in whole


def _check_labels(folder: Path, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    first, spec = next(iter(specs.items()))
    with noting("index_to_name.json", findings):
        if read_json(folder / "index_to_name.json") != {str(i): label for i, label in enumerate(spec.labels)}:
            findings.append(f"index_to_name.json: names other labels than the spec in {first}; export again")


def _check_card(folder: Path, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    first, spec = next(iter(specs.items()))
    with noting(CARD, findings):
        if spec.weights_sha256 not in (folder / CARD).read_text(encoding="utf-8"):
            findings.append(f"{CARD}: describes other weights than those of {first}; export again")


def _check_proof(folder: Path, specs: Mapping[str, ModelSpec], findings: list[str]) -> None:
    first, spec = next(iter(specs.items()))
    with noting("parity.json", findings):
        report = read_json(folder / "parity.json")
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
    with noting(GOLDEN, findings):
        found, rows = Golden(folder), len(read_json(folder / GOLDEN)["probabilities"])
        good = found.bodies and all(found.bodies) and found.expected.shape == (len(found.bodies), len(spec.labels))
        if not (good and rows and np.allclose(found.expected.sum(axis=1), 1, atol=1e-4) and found.expected.min() >= 0):
            findings.append(f"{GOLDEN}: holds no images, or no probability of each label for each; export again")
        seen = read_json(folder / MANIFEST)["golden_difference"]
        for name in names:
            served = FILES[serving_settings.backend_of(folder / serving_settings.CONFIG_FILE)].format(name)
            allowed = {"cpu": golden_check.tolerance(served, float(seen.get(served, 0))), "gpu": HALF_TOLERANCE}
            if found.tolerance != allowed:
                findings.append(f"{GOLDEN}: allows {found.tolerance}, and an export {allowed}; export again")


def _check_config(folder: Path, findings: list[str]) -> None:
    """What TorchServe is told about the model, but for the two values that an export sets."""
    with noting(serving_settings.CONFIG_FILE, findings):
        if not serving_settings.is_this_checkouts(folder / serving_settings.CONFIG_FILE):
            findings.append(differs(f"{serving_settings.CONFIG_FILE}:", "handler/model-config.yaml"))
