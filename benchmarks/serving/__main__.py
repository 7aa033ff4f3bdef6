"""Our archive against stock TorchServe, LitServe and BentoML: same models, images, machine and load, results checked.

    make bench-serving
    python -m benchmarks.serving --peers .venv-peers/bin/python
    python -m benchmarks.serving --only small,latency --rounds 1

All servers are started before a comparison and rest, stopped, while another one is measured; they take turns, and the
figures are medians of the rounds. The load comes from the same machine. Every prediction is compared with the one
that the image gets alone, and that with the crop graph in this process; only correct ones count. Peers run the same
ONNX crop graph with Pillow before it (benchmarks/peers), with batching on, once for each of two numbers of workers.
Writes benchmarks/results/serving.json and serving.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, save
from benchmarks.serving.parts import PARTS
from benchmarks.serving.report import plot, table
from benchmarks.serving.workload import make_large, make_small

ALL = [part for part in PARTS if part != "gpu"]  # which runs only if it is named
OF_LARGE = {"large", "gpu"}  # parts that measure the large model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="python of the environment of benchmarks/peers/requirements.lock")
    parser.add_argument("--only", default=",".join(ALL), help=f"parts, of {','.join(PARTS)} (all but gpu)")
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison (3)")
    parser.add_argument("--seconds", type=float, default=5, help="of each load; twice that for the large model (5)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (benchmarks/results)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="    %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left, resting
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"--only: no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    options.peers = options.peers and options.peers.absolute()
    results: dict[str, Any] = {"machine": _machine(options.peers)}
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "serving.json"
    results = results | _earlier(kept, results["machine"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = make_small(folder) if set(wanted) - OF_LARGE else folder
        large = make_large(folder) if set(wanted) & OF_LARGE else folder
        for part in wanted:
            print(f"{part} …", flush=True)
            work = folder / f"part-{part}"
            work.mkdir()
            results[part] = PARTS[part](large if part in OF_LARGE else small, work, options)
            save(kept, results)  # at once: a run takes half an hour
            print(table({part: results[part]}), flush=True)
    print(json.dumps(results["machine"]))
    if "growth" in wanted:
        plot(results, options.out / "serving.png")
    return 0


def _earlier(path: Path, machine: dict[str, str]) -> dict[str, Any]:
    """The parts that the file holds already, if they are of the same machine and versions, as far as both are known."""
    found = json.loads(path.read_text()) if path.exists() else {}
    known = found.get("machine", {})
    if any(known[key] != machine[key] for key in known.keys() & machine.keys()):
        return {}
    return found | {"machine": known | machine} if known else {}


def _machine(peers: Path | None) -> dict[str, str]:
    found = describe("torchserve", "torch", "onnxruntime", "pillow")
    if peers:
        code = "import importlib.metadata as m; print(*(m.version(p) for p in ('litserve', 'bentoml', 'onnxruntime')))"
        said = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        found |= dict(zip(("litserve", "bentoml", "onnxruntime of the peers"), said, strict=True))
    return found


if __name__ == "__main__":
    sys.exit(main())
