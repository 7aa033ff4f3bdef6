"""How much memory a training run takes whose images do not fit, and what it costs in speed.

    python -m benchmarks.streaming

Makes JPEG files of 500×375 px, SOME different ones; the rest are further names of theirs. Trains on them with
`python train.py` as a user would, and watches the resident memory of the process. At 224 px 100,000 of them are 15 GB
decoded, which has to be over half of the machine's free memory. IN_MEMORY of them, which fit, are trained on beside
that, for the speed. Writes benchmarks/results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.machine import describe, keep

PROJECT = Path(__file__).resolve().parent.parent
SOME = 1000
IN_MEMORY = 10_000  # images of the run that it is compared with
CUTS = ["--val-fraction", "0.01", "--test-fraction", "0.01", "--size", "224"]


RUNS = {
    "simplecnn, in memory": ("some", "simplecnn"),
    "simplecnn, streamed": ("all", "simplecnn"),
    "resnet18, in memory": ("some", "resnet18"),
    "resnet18, streamed": ("all", "resnet18"),
}


def make_images(folder: Path, count: int) -> None:
    """`count` files in two classes: cuts of scikit-learn's two photographs, enlarged."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    chance = np.random.default_rng(0)
    files: list[Path] = []
    for index in range(count):
        path = folder / f"class-{index % 2}" / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index >= SOME:
            os.link(files[index % SOME], path)
            continue
        width = int(chance.integers(200, 500))
        height = width * 3 // 4
        x, y = int(chance.integers(0, 640 - width + 1)), int(chance.integers(0, 427 - height + 1))
        cut = photographs[index % 2].crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC)
        cut.save(path, "JPEG", quality=85)
        files.append(path)


def watch(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs train.py; its summary, the resident memory at its highest, and whether it said that the images stream."""
    command = [sys.executable, "train.py", "--json", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        child = psutil.Popen(command, cwd=PROJECT, stdout=said)
        peak = 0
        while child.poll() is None:
            try:
                peak = max(peak, child.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.02)
        if child.wait():
            raise subprocess.CalledProcessError(child.returncode, command)
        said.seek(0)
        lines = said.read().splitlines()
    trained = json.loads(lines[-1])["train"]
    return {"mebibytes": peak / 2**20, "streams": any("they stream from" in line for line in lines), **trained}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="(100,000)")
    parser.add_argument("--minutes", type=float, default=1, help="of each training (1)")
    parser.add_argument("--only", help=f"one of: {'; '.join(RUNS)}")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/streaming.json"))
    options = parser.parse_args(arguments)
    wanted = [options.only] if options.only else [*RUNS]
    if options.only and options.only not in RUNS:
        parser.error(f"--only: nothing is called {options.only!r}; there are {'; '.join(RUNS)}")
    machine = describe("torch", "torchvision", "pillow")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_images(folder / "all", options.images)
        make_images(folder / "some", IN_MEMORY)
        for name in wanted:
            data, arch = RUNS[name]
            given = ["--data", str(folder / data), "--arch", arch, "--minutes", f"{options.minutes:g}"]
            row = watch([*given, *CUTS, "--out", str(folder / "run"), "--overwrite"])
            row["reading_per_second"] = row["images"] / row["data_seconds"]
            results[name] = row
            keep(options.json, machine, "results", results)
            print(f"{name}: {json.dumps(row)}", flush=True)
    print(json.dumps(machine))
    for name, row in results.items():
        rates = f"{row['reading_per_second']:.0f}/s read, {row['images_per_second']:.0f}/s trained"
        print(f"{name:22} {row['mebibytes']:6.0f} MiB resident; {rates}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
