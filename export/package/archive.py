"""The archive for TorchServe, made by the ordinary torch-model-archiver.

It holds NAME.pt, which GPU workers run, the file of the backend that CPU workers run, and nothing else of the export.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from export.output_folder import STAGED
from export.package.model_card import CARD
from export.package.serving_settings import CONFIG_FILE
from predictor.backends import FILES
from predictor.golden_check import FILE as GOLDEN

PROJECT = Path(__file__).resolve().parents[2]
HANDLER = PROJECT / "handler"
FROM_EXPORT = ("index_to_name.json", GOLDEN, CARD)
ENTRY = "classifier_handler.py"
TOP_LEVEL = (ENTRY, "sitecustomize.py")  # of handler/: TorchServe and Python look for these beside the model
CODE = {  # the archive's programs, and where they come from
    **{file: HANDLER / file for file in TOP_LEVEL},
    **{
        path.relative_to(PROJECT).as_posix(): path
        for folder in (HANDLER, PROJECT / "predictor")
        for path in sorted(folder.glob("*.py"))
        if path.name not in TOP_LEVEL
    },
}
IN_STAGE = (*(member for member in CODE if member != ENTRY), "spec.json", *FROM_EXPORT)  # the files of STAGED
ARCHIVE_MANIFEST = "MAR-INF/MANIFEST.json"


def members(name: str, backend: str) -> set[str]:
    """The names of all files in an archive."""
    served = {f"{name}.pt", FILES[backend].format(name)}
    return {ARCHIVE_MANIFEST, ENTRY, *IN_STAGE, CONFIG_FILE, *served}


def hashes(archive: Path) -> dict[str, str]:
    """The SHA-256 of each file in the archive."""
    found = {}
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            digest = hashlib.sha256()
            with files.open(name) as member:
                for block in iter(lambda: member.read(1 << 20), b""):
                    digest.update(block)
            found[name] = digest.hexdigest()
    return found


def command(run: Path, folder: Path, name: str, version: str, backend: str, export_path: Path) -> list[str]:
    """The torch-model-archiver line, with paths as seen from the current folder.

    Args:
        folder: that of the exported files.
        backend: one of predictor.backends.FILES; the one in the folder's model-config.yaml.
    """
    extra = [folder / STAGED]
    if backend != "torchscript":
        extra.append(folder / FILES[backend].format(name))
    return [
        "torch-model-archiver",
        *("--model-name", name),
        *("--version", version),
        *("--serialized-file", _short(folder / f"{name}.pt")),
        *("--handler", _short(CODE[ENTRY])),
        *("--extra-files", ",".join(map(_short, extra))),
        *("--config-file", _short(folder / CONFIG_FILE)),
        *("--export-path", _short(export_path)),
        "--force",
    ]


def stage(run: Path, folder: Path) -> None:
    """Writes folder/archive: what the archiver takes whole, as it lies in the archive."""
    stage_code(folder / STAGED)
    for source in (run / "spec.json", *(folder / file for file in FROM_EXPORT)):
        _copy(source, folder / STAGED / source.name)


def stage_code(target: Path) -> None:
    """Writes the archive's programs, but for its entry, into `target`."""
    for member, source in CODE.items():
        if member != ENTRY:
            _copy(source, target / member)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def build(run: Path, folder: Path, name: str, version: str, backend: str) -> Path:
    """Writes NAME.mar into the folder of the exported files, whole or not at all.

    The archiver empties and uses the folder `$TMPDIR/NAME`, whosever it is: it gets a temporary folder of its own.

    Raises:
        RuntimeError: the archiver failed; the message is its own.
    """
    target = folder / f"{name}.mar"
    stage(run, folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".archive-") as temporary:
        line = command(run, folder, name, version, backend, Path(temporary))
        line[0] = str(Path(sys.executable).with_name(line[0]))
        environment = {**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"torch-model-archiver failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        (Path(temporary) / f"{name}.mar").replace(target)
    return target


def check_paths(run: Path) -> None:
    """
    Raises:
        ValueError: a path holds a comma, at which torch-model-archiver would cut it.
    """
    for path in (run, PROJECT):
        if "," in _short(path):
            raise ValueError(f"{path}: torch-model-archiver takes no comma in a path; rename the folder")


def _short(path: Path) -> str:
    """Relative to the current folder where it lies below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
