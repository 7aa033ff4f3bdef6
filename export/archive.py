"""The archive for TorchServe, made by the ordinary torch-model-archiver.

It holds NAME.pt, which GPU workers run, the file of the backend that CPU workers run, and nothing else of the export.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from export.backend import CONFIG_FILE
from export.card import CARD
from handler.backends import FILES
from handler.golden import FILE as GOLDEN

PROJECT = Path(__file__).resolve().parent.parent
HANDLER = PROJECT / "handler"
BESIDE_HANDLER = (
    *("backends.py", "bodies.py", "explanations.py", "golden.py", "measures.py"),
    *("worker.py", "sitecustomize.py"),
)
FROM_EXPORT = ("index_to_name.json", GOLDEN, CARD)


def command(run: Path, name: str, version: str, backend: str, export_path: Path) -> list[str]:
    """The torch-model-archiver line, with paths as seen from the current folder.

    Args:
        backend: one of handler.backends.FILES; the one in export/model-config.yaml.
    """
    folder = run / "export"
    extra = [HANDLER / file for file in BESIDE_HANDLER]
    extra += [PROJECT / "model" / "pictures.py", run / "spec.json", *(folder / file for file in FROM_EXPORT)]
    if backend != "torchscript":
        extra.append(folder / FILES[backend].format(name))
    return [
        "torch-model-archiver",
        *("--model-name", name),
        *("--version", version),
        *("--serialized-file", _short(folder / f"{name}.pt")),
        *("--handler", _short(HANDLER / "classifier_handler.py")),
        *("--extra-files", ",".join(map(_short, extra))),
        *("--config-file", _short(folder / CONFIG_FILE)),
        *("--export-path", _short(export_path)),
        "--force",
    ]


def build(run: Path, name: str, version: str, backend: str) -> Path:
    """Writes NAME.mar into the run's export folder, whole or not at all.

    The archiver empties and uses the folder `$TMPDIR/NAME`, whosever it is: it gets a temporary folder of its own.

    Raises:
        RuntimeError: the archiver failed; the message is its own.
    """
    target = run / "export" / f"{name}.mar"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".archive-") as temporary:
        line = command(run, name, version, backend, Path(temporary))
        line[0] = str(Path(sys.executable).with_name(line[0]))
        environment = {**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"torch-model-archiver failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        (Path(temporary) / f"{name}.mar").replace(target)
    return target


def _short(path: Path) -> str:
    """Relative to the current folder where it lies below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
