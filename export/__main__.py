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
import json
import re
import shlex
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from export import output_folder, progress
from export.graphs import exported_program, onnx, quantization, torchscript
from export.package import archive, checksums, golden_images, model_card, serving_settings
from export.proof import images, parity, runtimes
from model import Classifier, load_run
from predictor.backends import FILES
from predictor.files import sha256, write_text
from predictor.spec import ModelSpec

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a model: what TorchServe's URLs and archives take


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if sys.stderr is sys.__stderr__:
        faulthandler.enable()  # a runtime that crashes takes this process along; at least its name is said
    try:
        if options.check:
            return checksums.run_check(options.check, options.public_key)
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
            golden_source=options.golden,
            keep_reduced=options.keep_reduced,
        )
    except KeyboardInterrupt:
        print(f"export: stopped; {options.run / output_folder.EXPORT} is as it was", file=sys.stderr)
        return 130
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
    golden_source: str = "samples",
    keep_reduced: str = "auto",
) -> list[parity.Row]:
    """Exports `run`, prints the parity table and, only if no row failed, packs the archive and replaces RUN/export.

    Args:
        name: of the model and its files; by default made from that of the run's folder.
        everywhere: compare in every runtime of this machine, on at least 1,000 images of the test split.
        data: where the run's data lies now; needed for `everywhere`, `int8` and `fp16` if it was moved.
        int8, fp16: write these too, if they earn it.
        sign: a private key; writes model.sig.
        wanted: the backend of the archive's CPU workers; `auto` takes the fastest.
        golden_source: the images in the archive, one of export.package.golden_images.SOURCES.
        keep_reduced: whether int8 and fp16 files must earn it, one of export.graphs.quantization.KEEP.

    Raises:
        ValueError: the run or its data cannot be read, the name or the backend cannot be used, or RUN/export holds
            what must not be replaced.
        ParityError: parity could not be established at all.
    """
    spec, network = load_run(run)
    name = _checked_name(name) if name else name_of(run)
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", version):
        raise ValueError(f"--version {version}: must be a number such as 1.0 or 2, as TorchServe orders by it")
    if not any((run / "samples").glob("*")):
        raise ValueError(f"{run / 'samples'}: no images for the golden answers; re-run train.py, or put some there")
    if wanted == "onnx-int8" and not int8:
        raise ValueError("--backend onnx-int8: add --int8, which writes its file")
    archive.check_paths(run)
    target = run / output_folder.EXPORT
    with output_folder.alone(run):
        output_folder.check(target, output_folder.all_files(name))
        shown = images.of_test_split(run, data) if everywhere else images.of_samples(run / "samples")
        classifier = Classifier(network, spec).eval()
        with output_folder.building(run) as folder:
            _write_graphs(classifier, spec, folder, name)
            compared = runtimes.RUNTIMES if everywhere else runtimes.INSTALLED
            rows = parity.verify(classifier, spec, shown, folder, name, compared, progress.say)
            print(f"\n{parity.table(rows)}")
            if any(row.failed for row in rows):
                _keep_failed(rows, spec, folder, run, name, version)
                return rows
            smaller = []
            if int8 or fp16:
                with progress.step("smaller files, on the test split"):
                    smaller = quantization.reduce_run(
                        run, folder, name, spec, classifier, data, int8=int8, fp16=fp16, keep=keep_reduced
                    )
                print(f"\n{quantization.table(smaller)}")
            with progress.step("speed of each backend"):
                speeds = serving_settings.measure(folder, name, spec, wanted)
            print(f"\n{serving_settings.table(speeds)}")
            serving_settings.write_config(speeds, folder / serving_settings.CONFIG_FILE)
            served = serving_settings.chosen(speeds).backend
            seen = golden_images.write(run, folder, name, spec, classifier, served, golden_source)
            parity.write_json(rows, spec, folder / "parity.json", smaller, speeds)
            _pack(run, folder, name, version, served)
            _finish(run, folder, name, version, seen, sign)
    print(f"next: {serve_command(run)}")
    return rows


def name_of(run: Path) -> str:
    """The run folder's name, with '-' for what TorchServe's URLs do not take.

    Raises:
        ValueError: nothing of it can be used.
    """
    folder = run.resolve().name
    if re.fullmatch(NAME, folder):
        return folder
    plain = unicodedata.normalize("NFKD", folder).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-_.")
    if not name:
        raise ValueError(f"{folder}: TorchServe's URLs take none of these letters; name the model, e.g. --name model")
    return name


def _checked_name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"--name {name}: must be letters, digits, '_', '-' and '.', as TorchServe's URLs need")
    return name


def _write_graphs(classifier: Classifier, spec: ModelSpec, folder: Path, name: str) -> None:
    with progress.step("TorchScript"):
        torchscript.save(classifier, spec, folder / f"{name}.pt")
    with progress.step("torch.export"):
        traced = exported_program.trace(classifier)
        exported_program.save(traced, spec, folder, name)
    with progress.step("ONNX"):
        onnx.save(traced, spec, folder, name)
    index_to_name = {str(i): label for i, label in enumerate(spec.labels)}  # as TorchServe's own handlers have it
    write_text(folder / "index_to_name.json", json.dumps(index_to_name, indent=2, ensure_ascii=False) + "\n")


def _keep_failed(rows: list[parity.Row], spec: ModelSpec, folder: Path, run: Path, name: str, version: str) -> None:
    parity.write_json(rows, spec, folder / "parity.json")
    checksums.write_manifest(folder, name, version)
    kept = output_folder.put_failed(folder, run)
    before = run / output_folder.EXPORT
    state = f"{before} is as it was" if before.is_dir() else "nothing was exported"
    print(f"\nparity FAILED: no archive was made, and {state}; see {kept / 'parity.json'}")


def _pack(run: Path, folder: Path, name: str, version: str, served: str) -> None:
    model_card.write_card(run, name, folder)
    with progress.step("archive"):
        archive.build(run, folder, name, version, served)
    target = run / output_folder.EXPORT
    print(f"\n{shlex.join(archive.command(run, target, name, version, served, target))}\n")


def _finish(run: Path, folder: Path, name: str, version: str, seen: dict[str, float], sign: Path | None) -> None:
    """The manifest, the sums and the signature; then the folder takes its place."""
    target = run / output_folder.EXPORT
    checksums.write_manifest(folder, name, version, seen)
    with output_folder.replacing(folder, target):
        checksums.write_sums(folder)
        if sign:
            checksums.sign(folder, sign)
        for path in sorted(folder.iterdir()):
            if path.is_file():
                print(f"{path.stat().st_size:>12,}  {sha256(path)[:12]}  {target / path.name}")
    output_folder.remove_failed(run)


def serve_command(run: Path) -> str:
    """The next command, to be pasted as it is: make would cut a name with a space, and expand one with a dollar."""
    quoted = shlex.quote(str(run))
    return f"make serve RUN={run}" if quoted == str(run) else f"python serve.py {quoted}"


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
        choices=quantization.KEEP,
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
