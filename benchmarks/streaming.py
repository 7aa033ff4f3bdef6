"""What a training takes whose images do not fit in memory: memory, the first start, the second, and two processes.

    python -m benchmarks.streaming

Makes JPEG files of 500×375 px, each a file of its own, of SOME different images. Trains ResNet-18 on them with
`python train.py`, on random crops of 224 px, as a user would: with a new store, again, and by torchrun. Watches the
resident memory of each process. IN_MEMORY of them, which fit, are trained on beside that, for the speed. Writes
benchmarks/results/streaming.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
TRAINING = ["--arch=resnet18", "--size=224", "--crop-scale=0.35", "--val-fraction=0.01", "--test-fraction=0.01"]

# The images, processes, and where they are kept; in this order, as one finds what the one before it has stored.
RUNS = {
    "in memory": ("some", 1, "memory"),
    "first start": ("all", 1, "store"),
    "second start": ("all", 1, "store"),
    "two processes": ("all", 2, "store"),
}


def make_images(folder: Path, count: int) -> None:
    """`count` files in two classes: cuts of scikit-learn's two photographs, enlarged, with a comment of their own."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    chance = np.random.default_rng(0)
    bodies: list[bytes] = []
    for index in range(count):
        path = folder / f"class-{index % 2}" / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        comment = b"\xff\xfe\x00\x0a%08d" % index
        if index >= SOME:
            body = bodies[index % SOME]
            path.write_bytes(body[:2] + comment + body[2:])
            continue
        width = int(chance.integers(200, 500))
        height = width * 3 // 4
        x, y = int(chance.integers(0, 640 - width + 1)), int(chance.integers(0, 427 - height + 1))
        cut = photographs[index % 2].crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC)
        cut.save(path, "JPEG", quality=85)
        bodies.append(path.read_bytes())


def watch(arguments: Sequence[str], processes: int) -> dict[str, Any]:
    """Runs train.py; its summary, and the resident memory of the largest process at its highest."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else ()), "train.py", "--json", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        child = psutil.Popen(command, cwd=PROJECT, stdout=said)
        peak = 0
        while child.poll() is None:
            with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
                family = child.children(recursive=True) if processes > 1 else [child]
                peak = max((peak, *(one.memory_info().rss for one in family)))
            time.sleep(0.05)
        if child.wait():
            raise subprocess.CalledProcessError(child.returncode, command)
        said.seek(0)
        lines = said.read().splitlines()
    trained = json.loads(lines[-1])["train"]
    return {"mebibytes": peak / 2**20, **trained}


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
            data, processes, where = RUNS[name]
            store = "memory" if where == "memory" else str(folder / where)
            given = ["--data", str(folder / data), "--store", store, "--minutes", f"{options.minutes:g}"]
            row = watch([*given, *TRAINING, "--out", str(folder / "run"), "--overwrite"], processes)
            results[name] = row
            keep(options.json, machine, f"{options.images:,} images", results)
            print(f"{name}: {json.dumps(row)}", flush=True)
    print(json.dumps(machine))
    for name, row in results.items():
        read = f"{row['data_seconds']:.1f} s until training, {row['images_per_second']:.1f} images/s trained"
        print(f"{name:15} {row['mebibytes']:6.0f} MiB resident; {read}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
