"""Everything once: trains, exports, proves parity, archives, serves, and classifies the held-out images over HTTP.

    python demo.py
    python demo.py --data DIR --arch resnet18 --epochs 10 --out runs/NAME

Replaces the run in --out only if that has the same data, network and number of epochs, as an earlier demo's has.

Ends with 0 only if all of it worked, the accuracy over HTTP is that of metrics.json to within 0.1 point or one image,
and at least --at-least of the images are correct; with 1 if a figure is not as it must be, 2 if a step cannot be done,
and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clients.python.classify import Client
from launcher import Ports, serving

if TYPE_CHECKING:
    from training.options import TrainOptions

SHOWN = 20  # rows of the table; all images are classified


@dataclass(frozen=True)
class Result:
    image: str
    truth: str
    prediction: str
    probability: float
    milliseconds: float

    @property
    def is_correct(self) -> bool:
        return self.prediction == self.truth


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="as train.py's (digits)")
    parser.add_argument("--arch", default="simplecnn", help="as train.py's (simplecnn)")
    parser.add_argument("--epochs", type=int, default=10, help="as train.py's (10)")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="run folder to write (runs/digits)")
    parser.add_argument("--at-least", type=float, default=0.0, help="share of the images that must be right, 0..1")
    options = parser.parse_args(arguments)
    before = os.environ.copy()
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # torch and others leave files there, which end with it
        try:
            return demo(options, Path(folder) / "serve")
        except KeyboardInterrupt:
            print("demo.py: interrupted", file=sys.stderr)
            return 130
        except (ValueError, OSError, RuntimeError) as error:  # the last: a loss of NaN, no parity, no server
            print(f"demo.py: {error}", file=sys.stderr)
            return 2
        finally:
            tempfile.tempdir = None
            os.environ.clear()
            os.environ.update(before)


def demo(options: argparse.Namespace, folder: Path) -> int:
    # Here and not above: torchvision makes a folder in the temporary one as soon as it is imported.
    from dataset.loading import read_split
    from dataset.terminal import printed
    from export.pipeline import export_run, name_of
    from train import train
    from training.options import TrainOptions

    started = time.perf_counter()
    config = TrainOptions(data=options.data, arch=options.arch, epochs=options.epochs, out=str(options.out))
    check_free(options.out, config)
    print("── 1 of 4: train", flush=True)
    with printed("dataset", "training"):
        metrics = train(config, overwrite=True)
    print("\n── 2 of 4: export, prove parity, archive", flush=True)
    with printed("export"):
        rows = export_run(options.out)
    if not all(row.passed for row in rows):
        return 1
    print("\n── 3 of 4: serve", flush=True)
    name = name_of(options.out)
    archive = options.out / "export" / f"{name}.mar"
    with serving([archive], folder, ports=Ports.free()) as server:
        print(f"TorchServe is ready on {server.url}")
        print("\n── 4 of 4: classify the held-out images over HTTP", flush=True)
        results = classify_all(Client(server.url, name, server.key()), read_split(options.data, "test"))
    print_table(results)
    return verdict(results, metrics["test"]["accuracy"], options, time.perf_counter() - started)


def check_free(out: Path, config: TrainOptions) -> None:
    """
    Raises:
        ValueError: the folder holds a run that is not a demo's with these options.
    """
    from training.options import read_config  # as in `demo`
    from training.run_folder import results_in

    if found := results_in(out):
        try:
            made = read_config(out / "config.yaml")
        except ValueError:
            made = {}
        if any(made.get(name) != getattr(config, name) for name in ("data", "arch", "epochs")):
            raise ValueError(f"--out {out}: holds a run that is not this demo's ({found[0]}); pass another --out")


def classify_all(client: Client, images: Iterable[tuple[str, str, bytes]]) -> list[Result]:
    """One request after the other, each timed from the first byte sent to the last byte read."""
    results = []
    for image, truth, body in images:
        started = time.perf_counter()
        probabilities = client.classify(body)
        milliseconds = 1000 * (time.perf_counter() - started)
        label, probability = next(iter(probabilities.items()))  # the best comes first
        results.append(Result(image, truth, label, probability, milliseconds))
    return results


def print_table(results: list[Result]) -> None:
    """The mistakes first, then others, the classes in turn."""
    wrong = [result for result in results if not result.is_correct][: SHOWN // 2]
    turns: dict[str, int] = {}
    ranked = []
    for result in (result for result in results if result.is_correct):
        turns[result.truth] = turns.get(result.truth, 0) + 1
        ranked.append((turns[result.truth], result.truth, result))
    shown = wrong + [result for _, _, result in sorted(ranked, key=lambda r: r[:2])][: SHOWN - len(wrong)]
    width = max(len(result.image) for result in shown)
    labels = max(10, *(len(result.truth) for result in shown), *(len(result.prediction) for result in shown))
    print(f"{'image':{width}}  {'truth':{labels}}  {'prediction':{labels}}  probability      ms")
    for r in shown:
        mark = "" if r.is_correct else "  wrong"
        print(
            f"{r.image:{width}}  {r.truth:{labels}}  {r.prediction:{labels}}  {r.probability:11.4f}  "
            f"{r.milliseconds:6.1f}{mark}"
        )


def verdict(results: list[Result], expected: float, options: argparse.Namespace, seconds: float) -> int:
    right = sum(result.is_correct for result in results)
    accuracy = right / len(results)
    median = sorted(result.milliseconds for result in results)[len(results) // 2]
    print(
        f"\n{right} of {len(results)} right over HTTP: {accuracy:.2%}; metrics.json says {expected:.2%}. "
        f"Median {median:.1f} ms an image. {seconds:.0f} s in all."
    )
    if abs(accuracy - expected) > max(0.001, 1.5 / len(results)):  # the served backend may round one near tie otherwise
        print("FAILED: the same model must have the same accuracy over HTTP")
        return 1
    if accuracy < options.at_least:
        print(f"FAILED: fewer than {options.at_least:.0%} are right")
        return 1
    from export.pipeline import serve_command  # as in `main`

    out, name = options.out, options.out.resolve().name
    print(
        f"""
what lies where
  weights, spec, metrics   {out}/model.pt  spec.json  metrics.json
  report                   {out}/report/index.html
  TorchScript and ONNX     {out}/export/{name}.pt  {name}.onnx  {name}.crops.onnx  {name}.pixels.onnx
  proof of parity          {out}/export/parity.json
  TorchServe archive       {out}/export/{name}.mar
  images to try            {out}/samples/

next
  {serve_command(out):65}  keeps it running
  .venv/bin/python train.py --data YOUR_IMAGES --out runs/NAME       one folder of images for each class
  .venv/bin/python -m export runs/NAME"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
