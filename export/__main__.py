"""Exports a run to TorchScript and ONNX, proves that they agree with PyTorch, and packs the TorchServe archive.

    python -m export runs/digits

Writes runs/NAME/export: NAME.pt, NAME.onnx, NAME.crops.onnx, NAME.pixels.onnx, NAME.mar and parity.json. Ends with 1
and leaves no archive if any runtime's answer lies outside its tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from export import archive, onnx, parity, torchscript
from model import Classifier, load_run
from model.files import sha256, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder written by train.py, e.g. runs/digits")
    parser.add_argument("--name", help="name of the model and its files (default: the run folder's)")
    parser.add_argument("--version", default="1.0", help="version of the archive (1.0)")
    options = parser.parse_args(arguments)
    try:
        rows = export_run(options.run, name=options.name, version=options.version)
    except parity.ParityError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0 if all(row.passed for row in rows) else 1


def export_run(run: Path, *, name: str | None = None, version: str = "1.0") -> list[parity.Row]:
    """Exports `run`, prints the parity table and, only if every row passed, packs the archive.

    Raises:
        ValueError: the run cannot be read, or the name cannot be used.
        ParityError: parity could not be established at all.
    """
    spec, network = load_run(run)
    name = name or run.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"--name {name}: must be letters, digits, '_', '-' and '.', as TorchServe's URLs need")
    classifier = Classifier(network, spec).eval()
    target = run / "export"
    (target / f"{name}.mar").unlink(missing_ok=True)  # it would belong to other weights, or to none that are proven
    with tempfile.TemporaryDirectory(dir=run, prefix=".export-") as temporary:
        folder = Path(temporary)
        torchscript.save(classifier, spec, folder / f"{name}.pt")
        onnx.save(classifier, spec, folder, name)
        index_to_name = {str(i): label for i, label in enumerate(spec.labels)}  # as TorchServe's own handlers have it
        write_text(folder / "index_to_name.json", json.dumps(index_to_name, indent=2, ensure_ascii=False) + "\n")
        rows = parity.verify(classifier, spec, run / "samples", folder, name)
        parity.write_json(rows, folder / "parity.json")
        target.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()):
            path.replace(target / path.name)
    print(parity.table(rows))
    if not all(row.passed for row in rows):
        print(f"parity FAILED: no archive was made; see {target / 'parity.json'}")
        return rows
    path = archive.build(run, name, version)
    print(f"\n{shlex.join(archive.command(run, name, version, target))}\n")
    for path in sorted(target.iterdir()):
        print(f"{path.stat().st_size:>12,}  {sha256(path)[:12]}  {path}")
    print(f"next: make serve RUN={run}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
