"""What a figure was measured on, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from predictor.files import write_text

LINE = 118  # characters of a line of JSON


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
    save(path, found)


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Writes JSON for people and for `git diff`: numbers of five digits, and lines that are filled."""
    write_text(path, _filled(_rounded(results)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _filled(value: Any, indent: int = 0) -> str:
    """JSON whose lines are filled: what fits on one stands on one."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) + indent <= LINE or not isinstance(value, (dict, list)):
        return text
    if isinstance(value, dict):
        start, end = "{}"
        items = [f"{json.dumps(key, ensure_ascii=False)}: {_filled(one, indent + 1)}" for key, one in value.items()]
    else:
        start, end = "[]"
        items = [_filled(one, indent + 1) for one in value]
    lines = [items[0]]
    for item in items[1:]:
        if "\n" not in lines[-1] + item and len(lines[-1]) + len(item) + indent + 4 <= LINE:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    inside = ",\n".join(" " * (indent + 1) + line for line in lines)
    return f"{start}\n{inside}\n{' ' * indent}{end}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
