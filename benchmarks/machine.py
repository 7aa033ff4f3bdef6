"""What a figure was measured on, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.files import write_text


def describe(*packages: str) -> dict[str, str]:
    """Processor, cores, memory, the GPU if there is one, Python, and the versions of `packages`."""
    import psutil
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        **gpu,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def keep(path: Path, machine: Mapping[str, str], key: str, rows: Mapping[str, Any]) -> None:
    """Puts the rows beside those that the file holds already, if these are of the same machine and versions."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if earlier.get("machine") != machine:
        earlier = {}
    found = {"machine": machine, **earlier, key: {**earlier.get(key, {}), **rows}}
    write_text(path, json.dumps(found, indent=2) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
