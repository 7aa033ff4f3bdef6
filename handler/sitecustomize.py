"""Python runs this file when a worker starts, before TorchServe: PyTorch is then loaded when it is first used.

TorchServe's protocol imports torch for the sake of one `isinstance`, which the answers of this handler never reach. A
worker that runs ONNX Runtime saves half a gigabyte and over a second by that; one that runs PyTorch loads it as ever.

Python runs one file of this name, the first on its path. One in the caller's PYTHONPATH goes before this one, and
PyTorch is then loaded at once; one in the environment's own packages goes after it and is not run in workers.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any


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


sys.meta_path.insert(0, LazyTorch)
