"""An export, from the run to the folder that takes its place: graphs, proof, smaller files, package."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export import output_folder, progress
from export.graphs import exported_program, onnx, quantization, torchscript
from export.package import archive, checksums, golden_images, model_card, serving_settings, signature
from export.proof import accuracy_gate, images, parity, runtimes, split_crops
from export.proof.accuracy_gate import ReducedRow, Rules
from export.proof.images import Named
from model import Classifier, load_run
from predictor.files import sha256, write_text
from predictor.spec import ModelSpec

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of a model: what TorchServe's URLs and archives take


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an export is asked for."""

    name: str | None = None  # of the model and its files; by default made from that of the run's folder
    version: str = "1.0"  # of the archive
    everywhere: bool = False  # compare in every runtime of this machine, on at least 1,000 images of the test split
    data: str | None = None  # where the run's data lies now, if not where it was trained from
    int8: bool = False  # these files too, if they earn it
    fp16: bool = False
    keep_reduced: str = "auto"  # whether they must earn it, one of export.proof.accuracy_gate.KEEP
    backend: str = "auto"  # of the archive's CPU workers; `auto` takes the fastest
    golden_source: str = "samples"  # of the images in the archive, one of export.package.golden_images.SOURCES
    sign: Path | None = None  # a private key; writes model.sig


def export_run(run: Path, options: Options | None = None) -> list[parity.Row]:
    """Exports `run` and tells each step; only if no row of the parity table failed, RUN/export is replaced.

    Raises:
        ValueError: the run or its data cannot be read, the name or the backend cannot be used, or RUN/export holds
            what must not be replaced.
        ParityError: parity could not be established at all.
    """
    options = options or Options()
    spec, network = load_run(run)
    name = _checked_name(options.name) if options.name else name_of(run)
    _check(run, options)
    with output_folder.alone(run):
        output_folder.check(run / output_folder.EXPORT, output_folder.all_files(name))
        shown = images.of_test_split(run, options.data) if options.everywhere else images.of_samples(run / "samples")
        with output_folder.building(run) as folder:
            export = Export(run, folder, name, spec, Classifier(network, spec).eval(), options)
            rows = export.build(shown)
    if not any(row.failed for row in rows):
        progress.say(f"next: {serve_command(run)}")
    return rows


@dataclass(frozen=True)
class Export:
    """One export at work. Each stage reads the files of those before it."""

    run: Path
    folder: Path  # where its files are written, until all are there and it takes the place of RUN/export
    name: str
    spec: ModelSpec
    classifier: Classifier
    options: Options = Options()

    def build(self, shown: Sequence[Named]) -> list[parity.Row]:
        """All stages; the earlier export stays until the last one, and for good if parity failed.

        Args:
            shown: the images on which parity is proven.
        """
        self.write_graphs()
        rows = self.prove(shown)
        if any(row.failed for row in rows):
            self.keep_failed(rows)
            return rows
        reduced = self.reduce(Rules(keep=self.options.keep_reduced))
        speeds = self.choose_backend()
        served = serving_settings.chosen(speeds).backend
        seen = golden_images.write(self.golden_images(), self.folder, self.name, served)
        parity.write_json(rows, self.spec, self.folder / "parity.json", reduced, speeds)
        self.pack(served)
        self.publish(seen)
        return rows

    # Graphs

    def write_graphs(self) -> None:
        """TorchScript, torch.export and ONNX in fp32, and the labels."""
        with progress.step("TorchScript"):
            torchscript.save(self.classifier, self.spec, self.folder / f"{self.name}.pt")
        with progress.step("torch.export"):
            traced = exported_program.trace(self.classifier)
            exported_program.save(traced, self.spec, self.folder, self.name)
        with progress.step("ONNX"):
            onnx.save(traced, self.spec, self.folder, self.name)
        index_to_name = {str(i): label for i, label in enumerate(self.spec.labels)}  # as TorchServe's own handlers
        write_text(self.folder / "index_to_name.json", json.dumps(index_to_name, indent=2, ensure_ascii=False) + "\n")

    def reduce(self, rules: Rules) -> list[ReducedRow]:
        """int8 and fp16 files, as far as they are asked for: made apart, judged, and put into the folder if kept.

        Raises:
            ValueError: the data cannot be found, or is not what the run was trained on.
            RuntimeError: the network cannot be quantised, or not be expressed in half precision.
        """
        if not (self.options.int8 or self.options.fp16):
            return []
        with (
            progress.step("smaller files, on the test split"),
            tempfile.TemporaryDirectory(dir=self.folder, prefix=".reduced-") as temporary,
        ):
            made = self._make_reduced(Path(temporary))
            test = split_crops.labelled_crops(self.run, self.spec, self.options.data)
            rows = accuracy_gate.judge(self.folder / f"{self.name}.crops.onnx", made, test, rules)
            for row in rows:
                for file in (f"{self.name}.{row.precision}.onnx", row.file):
                    (self.folder / file).unlink(missing_ok=True)
                    if row.kept:
                        (Path(temporary) / file).replace(self.folder / file)
        progress.say(f"\n{accuracy_gate.table(rows)}")
        return rows

    def _make_reduced(self, folder: Path) -> dict[str, Path]:
        """The crop graphs by precision."""
        if self.options.int8:
            calibration = split_crops.calibration_crops(self.run, self.spec, self.options.data)
            network = self.folder / f"{self.name}.onnx"
            quantization.make_int8(self.spec, network, calibration, folder, self.name, split_crops.SEED)
        if self.options.fp16:
            quantization.make_fp16(self.classifier.network, self.spec, folder, self.name)
        crops = {precision: folder / f"{self.name}.crops.{precision}.onnx" for precision in ("int8", "fp16")}
        return {precision: path for precision, path in crops.items() if path.exists()}

    # Proof

    def prove(self, shown: Sequence[Named]) -> list[parity.Row]:
        """Each graph, reloaded from disk, against eager PyTorch in each runtime."""
        compared = runtimes.RUNTIMES if self.options.everywhere else runtimes.INSTALLED
        rows = parity.verify(self.classifier, self.spec, shown, self.folder, self.name, compared, progress.say)
        progress.say(f"\n{parity.table(rows)}")
        return rows

    def keep_failed(self, rows: list[parity.Row]) -> None:
        """RUN/export.failed, to look at."""
        parity.write_json(rows, self.spec, self.folder / "parity.json")
        checksums.write_manifest(self.folder, self.name, self.options.version)
        kept = output_folder.put_failed(self.folder, self.run)
        before = self.run / output_folder.EXPORT
        state = f"{before} is as it was" if before.is_dir() else "nothing was exported"
        progress.say(f"\nparity FAILED: no archive was made, and {state}; see {kept / 'parity.json'}")

    # Package

    def choose_backend(self) -> list[serving_settings.BackendRow]:
        """Measures the backends and writes the archive's settings."""
        with progress.step("speed of each backend"):
            speeds = serving_settings.measure(self.folder, self.name, self.spec, self.options.backend)
        progress.say(f"\n{serving_settings.table(speeds)}")
        serving_settings.write_config(speeds, self.folder / serving_settings.CONFIG_FILE)
        return speeds

    def golden_images(self) -> golden_images.Answered:
        """The images by which a worker proves itself, with the answers of eager PyTorch."""
        return golden_images.answered(self.run, self.classifier, self.spec, self.options.golden_source)

    def pack(self, served: str) -> None:
        """The card and the archive.

        Args:
            served: the backend of its CPU workers.
        """
        model_card.write_card(self.run, self.name, self.folder)
        with progress.step("archive"):
            archive.build(self.run, self.folder, self.name, self.options.version, served)
        target = self.run / output_folder.EXPORT
        line = archive.command(self.run, target, self.name, self.options.version, served, target)
        progress.say(f"\n{shlex.join(line)}\n")

    def publish(self, seen: dict[str, float]) -> None:
        """The manifest, the sums and the signature; then the folder takes its place.

        Args:
            seen: for each file that can serve, how far it is from the golden answers.
        """
        target = self.run / output_folder.EXPORT
        checksums.write_manifest(self.folder, self.name, self.options.version, seen)
        with output_folder.replacing(self.folder, target):
            checksums.write_sums(self.folder)
            if self.options.sign:
                signature.sign(self.folder, self.options.sign)
            for path in sorted(self.folder.iterdir()):
                if path.is_file():
                    progress.say(f"{path.stat().st_size:>12,}  {sha256(path)[:12]}  {target / path.name}")
        output_folder.remove_failed(self.run)


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


def serve_command(run: Path) -> str:
    """The next command, to be pasted as it is: make would cut a name with a space, and expand one with a dollar."""
    quoted = shlex.quote(str(run))
    return f"make serve RUN={run}" if quoted == str(run) else f"python serve.py {quoted}"


def _checked_name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"--name {name}: must be letters, digits, '_', '-' and '.', as TorchServe's URLs need")
    return name


def _check(run: Path, options: Options) -> None:
    """What can be refused before anything is read or written.

    Raises:
        ValueError: an option cannot be used, or the run lacks what its archive needs.
    """
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", options.version):
        raise ValueError(f"--version {options.version}: must be a number such as 1.0 or 2, as TorchServe orders by it")
    images.sample_files(run / "samples")
    if options.backend == "onnx-int8" and not options.int8:
        raise ValueError("--backend onnx-int8: add --int8, which writes its file")
    archive.check_paths(run)
