"""Exports a run to TorchScript, torch.export and ONNX, proves that they agree, and packs the TorchServe archive.

    python -m export runs/digits
    python -m export runs/digits --verify all --int8
    python -m export --check runs/digits/export

Writes runs/NAME/export: NAME.pt, NAME.onnx, NAME.crops.onnx, NAME.pixels.onnx, the same as .pt2, NAME.mar, parity.json,
golden.json, model-config.yaml, MODEL_CARD.md and SHA256SUMS. Ends with 1 and leaves no archive if any runtime's answer
lies outside its tolerance.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from export import (
    archive,
    backend,
    card,
    golden,
    integrity,
    onnx,
    parity,
    pictures,
    programs,
    reduced,
    runtimes,
    torchscript,
)
from handler.backends import FILES
from model import Classifier, load_run
from model.files import sha256, write_text


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if sys.stderr is sys.__stderr__:
        faulthandler.enable()  # a runtime that crashes takes this process along; at least its name is said
    try:
        if options.check:
            return integrity.run_check(options.check, options.public_key)
        if not options.run:
            raise ValueError("name a run folder, e.g. runs/digits, or --check DIR")
        rows = export_run(
            options.run,
            name=options.name,
            version=options.version,
            everywhere=options.verify == "all",
            data=options.data,
            int8=options.int8,
            fp16=options.fp16,
            sign=options.sign,
            wanted=options.backend,
        )
    except parity.ParityError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 1 if any(row.failed for row in rows) else 0


def export_run(
    run: Path,
    *,
    name: str | None = None,
    version: str = "1.0",
    everywhere: bool = False,
    data: str | None = None,
    int8: bool = False,
    fp16: bool = False,
    sign: Path | None = None,
    wanted: str = "auto",
) -> list[parity.Row]:
    """Exports `run`, prints the parity table and, only if no row failed, packs the archive.

    Args:
        everywhere: compare in every runtime of this machine, on at least 1,000 pictures of the test split.
        data: where the run's data lies now; needed for `everywhere`, `int8` and `fp16` if it was moved.
        int8, fp16: write these too, if they earn it.
        sign: a private key; writes model.sig.
        wanted: the backend of the archive's CPU workers; `auto` takes the fastest.

    Raises:
        ValueError: the run or its data cannot be read, or the name or the backend cannot be used.
        ParityError: parity could not be established at all.
    """
    spec, network = load_run(run)
    name = name or run.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"--name {name}: must be letters, digits, '_', '-' and '.', as TorchServe's URLs need")
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", version):
        raise ValueError(f"--version {version}: must be a number such as 1.0 or 2, as TorchServe orders by it")
    if not any((run / "samples").glob("*")):
        raise ValueError(f"{run / 'samples'}: no pictures for the golden answers; re-run train.py, or put some there")
    if wanted == "onnx-int8" and not int8:
        raise ValueError("--backend onnx-int8: add --int8, which writes its file")
    shown = pictures.of_test_split(run, data) if everywhere else pictures.of_samples(run / "samples")
    classifier = Classifier(network, spec).eval()
    target = run / "export"
    for file in (f"{name}.mar", card.CARD, integrity.SUMS, integrity.SIGNATURE):
        (target / file).unlink(missing_ok=True)  # of other weights, or of none that are proven
    with tempfile.TemporaryDirectory(dir=run, prefix=".export-") as temporary:
        folder = Path(temporary)
        torchscript.save(classifier, spec, folder / f"{name}.pt")
        traced = programs.trace(classifier)
        programs.save(traced, spec, folder, name)
        onnx.save(traced, spec, folder, name)
        index_to_name = {str(i): label for i, label in enumerate(spec.labels)}  # as TorchServe's own handlers have it
        write_text(folder / "index_to_name.json", json.dumps(index_to_name, indent=2, ensure_ascii=False) + "\n")
        compared = runtimes.RUNTIMES if everywhere else runtimes.INSTALLED
        rows = parity.verify(classifier, spec, shown, folder, name, compared)
        print(parity.table(rows))
        smaller = []
        if int8 or fp16:
            smaller = reduced.reduce_run(run, folder, name, spec, classifier, data, int8=int8, fp16=fp16)
            print(f"\n{reduced.table(smaller)}")
        speeds = backend.measure(folder, name, spec, wanted)
        print(f"\n{backend.table(speeds)}")
        backend.write_config(speeds, folder / backend.CONFIG_FILE)
        served = backend.chosen(speeds).backend
        golden.write(run, folder, name, spec, classifier, served)
        parity.write_json(rows, spec, folder / "parity.json", smaller, speeds)
        target.mkdir(exist_ok=True)
        for path in target.glob("*"):
            if re.fullmatch(rf"{re.escape(name)}\.((crops|pixels)\.)?((int8|fp16)\.)?(pt|pt2|onnx)", path.name):
                path.unlink()  # nothing of an earlier export is left that this one did not write
        for path in sorted(folder.iterdir()):
            path.replace(target / path.name)
    if any(row.failed for row in rows):
        print(f"parity FAILED: no archive was made; see {target / 'parity.json'}")
        return rows
    card.write_card(run, name, target)
    archive.build(run, name, version, served)
    print(f"\n{shlex.join(archive.command(run, name, version, served, target))}\n")
    integrity.write_sums(target)
    if sign:
        integrity.sign(target, sign)
    for path in sorted(target.iterdir()):
        print(f"{path.stat().st_size:>12,}  {sha256(path)[:12]}  {path}")
    print(f"next: make serve RUN={run}")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="run folder written by train.py, e.g. runs/digits")
    parser.add_argument("--name", help="name of the model and its files (default: the run folder's)")
    parser.add_argument("--version", default="1.0", help="version of the archive (1.0)")
    parser.add_argument(
        "--backend",
        choices=("auto", *FILES),
        default="auto",
        help="what the archive's CPU workers run; GPU workers run torchscript (auto: the fastest on this machine, "
        "onnx-int8 among them if --int8 wrote it)",
    )
    proof = parser.add_argument_group("proof")
    proof.add_argument(
        "--verify",
        choices=("installed", "all"),
        default="installed",
        help="all: every runtime of this machine, on at least 1,000 test pictures (installed: PyTorch's and ONNX "
        "Runtime, on the run's samples)",
    )
    proof.add_argument("--data", help="where the run's data lies now, if not where it was trained from")
    smaller = parser.add_argument_group("smaller files, written only if the test accuracy falls by at most 0.5 points")
    smaller.add_argument("--int8", action="store_true", help="NAME.int8.onnx and NAME.crops.int8.onnx, for CPUs")
    smaller.add_argument("--fp16", action="store_true", help="NAME.fp16.onnx and NAME.crops.fp16.onnx, for GPUs")
    trust = parser.add_argument_group("integrity")
    trust.add_argument("--check", type=Path, metavar="DIR", help="check an export folder against its SHA256SUMS, and "
        "that its files belong together; exports nothing")  # fmt: skip
    trust.add_argument("--sign", type=Path, metavar="KEY", help="sign the export with this private key (PEM)")
    trust.add_argument("--public-key", type=Path, metavar="KEY", help="with --check: check the signature too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
