"""Our trainer: `train.py` as a user starts it, and the probabilities that its run folder gives to the test images.

    python -m benchmarks.photographs.ours --data DIR --minutes 3 --out predictions.npz
    python -m benchmarks.photographs.ours --data DIR --out predictions.npz -- --epochs 3 --ema 0.99

Seconds are those that the run reports: reading the images, those of the test split too, and training. Test images are
read by the spec's pixel rule and classified by the crop graph, as the endpoint does it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.photographs.shared import make_parser, make_task
from model import Classifier, load_run
from predictor.pillow_preprocessing import read

TRAIN = ("train.py",)  # with the options that the comparison is about: none, so its defaults
BATCH = 32  # images


def classify(run: Path, files: Sequence[Path]) -> tuple[tuple[str, ...], np.ndarray]:
    """The labels, and float32 (N, C) probabilities."""
    spec, network = load_run(run)
    classifier = Classifier(network, spec).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            crops = [read(path.read_bytes(), spec.rule) for path in files[start : start + BATCH]]
            found.append(classifier.classify_crops(torch.from_numpy(np.stack(crops))))
    return spec.labels, torch.cat(found).numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("options", nargs="*", help="of train.py, in the place of --minutes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    task = make_task(options)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as temporary:
        run = Path(temporary) / "run"
        length = options.options or ["--minutes", f"{options.minutes:g}"]
        given = ["--data", str(options.data), "--out", str(run), "--seed", str(options.seed), *length]
        subprocess.run([sys.executable, *TRAIN, *given], check=True)
        labels, probabilities = classify(run, task.test)
        metrics = json.loads((run / "metrics.json").read_text())
    if list(labels) != task.labels:
        raise ValueError(f"{options.data}: train.py found the classes {list(labels)}, the comparison {task.labels}")
    trained = metrics["train"]
    reported = metrics["test"]["accuracy"]  # a check of the comparison itself: it must find the same
    task.save(probabilities, trained["data_seconds"] + trained["seconds"], epochs=trained["epochs"], reported=reported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
