"""Exports a run to TorchScript, torch.export and ONNX, proves that they agree, and packs the TorchServe archive.

    python -m export runs/digits
    python -m export runs/digits --verify all --int8
    python -m export --check runs/digits/export

Writes runs/NAME/export: NAME.pt, NAME.onnx, NAME.crops.onnx, NAME.pixels.onnx, the same as .pt2, NAME.mar, parity.json,
golden.json, model-config.yaml, MODEL_CARD.md, manifest.json and SHA256SUMS: all of them at the end, in the place of the
earlier export, so that one of the two is whole at any moment. If any runtime's answer lies outside its tolerance, it
ends with 1, the earlier export stays, and RUN/export.failed holds what was compared.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset.terminal import printed
from export import output_folder
from export.package import checksums, golden_images
from export.pipeline import Options, export_run
from export.proof import accuracy_gate, parity
from predictor.backends import FILES


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if sys.stderr is sys.__stderr__:
        faulthandler.enable()  # a runtime that crashes takes this process along; at least its name is said
    try:
        if options.check:
            return check(options.check, options.public_key)
        if not options.run:
            raise ValueError("name a run folder, e.g. runs/digits, or --check DIR")
        with printed("export"):
            rows = export_run(options.run, _asked(options))
    except KeyboardInterrupt:
        kept = "nothing was changed" if options.check else f"{options.run / output_folder.EXPORT} is as it was"
        print(f"export: stopped; {kept}", file=sys.stderr)
        return 130
    except parity.ParityError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 1 if any(row.failed for row in rows) else 0


def check(folder: Path, public_key: Path | None) -> int:
    """Prints what is wrong with an export. Returns 0 if that is nothing, else 1."""
    if findings := checksums.check_export(folder, public_key):
        print(*findings, sep="\n")
        return 1
    count = len(checksums.files_of(folder))
    if public_key:
        print(f"{count} files, all as exported: signature, sums, contents and answers")
    else:
        print(
            f"{count} files: the sums agree. Nothing was run, and anyone can write files and sums anew: only a "
            "signature says whose they are (--public-key FILE)"
        )
    if others := output_folder.foreign(folder):
        print(f"no export wrote, though the sums cover: {', '.join(others)}")
    return 0


def _asked(options: argparse.Namespace) -> Options:
    return Options(
        name=options.name,
        version=options.version,
        everywhere=options.verify == "all",
        data=options.data,
        int8=options.int8,
        fp16=options.fp16,
        keep_reduced=options.keep_reduced,
        backend=options.backend,
        golden_source=options.golden,
        sign=options.sign,
    )


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
        help="all: every runtime of this machine, on at least 1,000 test images (installed: PyTorch's and ONNX "
        "Runtime, on the run's samples)",
    )
    proof.add_argument("--data", help="where the run's data lies now, if not where it was trained from")
    smaller = parser.add_argument_group("smaller files, written only if they are no worse and fast enough")
    smaller.add_argument("--int8", action="store_true", help="NAME.int8.onnx and NAME.crops.int8.onnx, for CPUs")
    smaller.add_argument("--fp16", action="store_true", help="NAME.fp16.onnx and NAME.crops.fp16.onnx, for GPUs")
    smaller.add_argument(
        "--keep-reduced",
        choices=accuracy_gate.KEEP,
        default="auto",
        help="always, or never, whatever accuracy and speed they have (auto: not if the test split shows a loss)",
    )
    parser.add_argument(
        "--golden",
        choices=golden_images.SOURCES,
        default="samples",
        help="the images in the archive, by which a worker proves itself: crops of the run's samples, which whoever "
        "has the archive can look at, or synthetic ones, with none of yours (samples)",
    )
    trust = parser.add_argument_group("integrity")
    trust.add_argument("--check", type=Path, metavar="DIR", help="check an export folder against its SHA256SUMS, and "
        "that its files belong together; exports nothing")  # fmt: skip
    trust.add_argument("--sign", type=Path, metavar="KEY", help="sign the export with this private key (PEM)")
    trust.add_argument("--public-key", type=Path, metavar="KEY", help="with --check: check the signature, then "
        "run the graphs and compare their answers")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
