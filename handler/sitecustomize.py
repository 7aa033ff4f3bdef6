"""Python runs this file when a worker starts, before TorchServe: PyTorch is then loaded when it is first used.

TorchServe's protocol imports torch for the sake of one `isinstance`, which the answers of this handler never reach. A
worker that runs ONNX Runtime saves half a gigabyte and over a second by that; one that runs PyTorch loads it as ever.

It is for TorchServe 0.12, the last release; of another it says in the log that it does nothing. `patch_worker: false`
in model-config.yaml, which lies beside this file in the archive, switches it off.

Python runs one file of this name, the first on its path. One in the caller's PYTHONPATH goes before this one, and
PyTorch is then loaded at once; one in the environment's own packages goes after it and is not run in workers.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

TORCHSERVE = "0.12."  # as in handler/worker_startup.py, which is too early to import
OFF = re.compile(r"^patch_worker:[ \t]*(false|no|off)\b", re.MULTILINE | re.IGNORECASE)  # as YAML has it


class LazyTorch:
    """Finds `torch` once, for the first import of it, and gives it a loader that waits for the first use."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(LazyTorch)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def is_wanted(folder: Path) -> bool:
    """Whether the settings in the archive's folder leave it on, and TorchServe is the one that it was written for."""
    config = folder / "model-config.yaml"
    if config.is_file() and OFF.search(config.read_text(encoding="utf-8", errors="replace")):
        return False
    version = _torchserve_version()
    if version.startswith(TORCHSERVE):
        return True
    if version:  # on stderr: an import of `logging` would use up TorchServe's own set-up of it
        print(f"PyTorch is loaded at once: TorchServe {version} is not {TORCHSERVE}x, for which "
              "sitecustomize.py was written", file=sys.stderr)  # fmt: skip
    return False


def _torchserve_version() -> str:
    """Of the installed package, without importing it; "" if there is none."""
    found = importlib.util.find_spec("ts")
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / "version.txt"
        if file.is_file():
            return file.read_text(encoding="utf-8").strip()
    return ""


if is_wanted(Path(__file__).resolve().parent):
    sys.meta_path.insert(0, LazyTorch)
