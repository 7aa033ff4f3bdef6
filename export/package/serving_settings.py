"""How the archive's CPU workers run, measured with the handler's own code: the fastest backend, batches that fit it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from export import text_table
from export.proof import clock
from predictor.backends import FILES, load
from predictor.files import write_text
from predictor.spec import ModelSpec

CONFIG = Path(__file__).resolve().parents[2] / "handler" / "model-config.yaml"
CONFIG_FILE = "model-config.yaml"
CHOSEN = ("backend", "batchSize")  # what an export sets in it
BATCHES = (1, 8)  # images: a worker with little to do, and with much
ROUNDS, SECONDS = 15, 2.0  # of each backend and batch size; whichever is reached first, but at least 3 rounds
THREADS = 1  # of a worker
# A batch saves what each call costs, about a millisecond, and takes the images that another worker could have had:
# of 16 clients of ResNet-18 at 224 px one worker took all, and the other core was idle.
LONGEST_BATCH = 70  # ms
LARGEST_BATCH = 32  # images


@dataclass(frozen=True)
class BackendRow:
    """How fast one backend answers on this machine."""

    backend: str  # one of predictor.backends.FILES
    milliseconds: dict[str, float]  # for an image, by the batch size; medians
    chosen: bool


def backends_of(folder: Path, name: str) -> list[str]:
    """Those whose file was exported."""
    return [backend for backend, file in FILES.items() if (folder / file.format(name)).is_file()]


def measure(folder: Path, name: str, spec: ModelSpec, wanted: str = "auto") -> list[BackendRow]:
    """Times each backend on random crops, taking turns, on one thread.

    Args:
        wanted: the backend to choose; `auto`: the one with the least time over all batch sizes (geometric mean).

    Raises:
        ValueError: the wanted backend's file is not there.
    """
    found = backends_of(folder, name)
    if wanted != "auto" and wanted not in found:
        raise ValueError(f"--backend {wanted}: {FILES[wanted].format(name)} was not written; choose another, or auto")
    workers = {backend: load(backend, folder, name, threads=THREADS) for backend in found}
    shape = (spec.height, spec.width, 3)
    random = np.random.default_rng(0)
    times: dict[str, dict[str, float]] = {backend: {} for backend in found}
    for batch in BATCHES:
        crops = random.integers(0, 256, (batch, *shape), np.uint8)
        calls = {backend: partial(worker, crops) for backend, worker in workers.items()}
        for backend, milliseconds in clock.milliseconds(calls, rounds=ROUNDS, seconds=SECONDS * len(calls)).items():
            times[backend][str(batch)] = milliseconds / batch
    chosen = wanted if wanted != "auto" else min(found, key=lambda one: statistics.geometric_mean(times[one].values()))
    return [BackendRow(backend, times[backend], backend == chosen) for backend in found]


def chosen(rows: list[BackendRow]) -> BackendRow:
    return next(row for row in rows if row.chosen)


def batch_size(row: BackendRow) -> int:
    """The power of 2 whose batch a worker answers within LONGEST_BATCH, from 1 to LARGEST_BATCH."""
    fitting = LONGEST_BATCH / row.milliseconds[str(max(BATCHES))]
    return 2 ** math.floor(math.log2(min(max(fitting, 1), LARGEST_BATCH)))


def write_config(rows: list[BackendRow], path: Path) -> None:
    """handler/model-config.yaml with the chosen backend and its batch size in it."""
    row = chosen(rows)
    values: dict[str, str | int] = dict(zip(CHOSEN, (row.backend, batch_size(row)), strict=True))
    write_text(path, with_values(CONFIG.read_text(encoding="utf-8"), values))


def backend_of(path: Path) -> str:
    """What an archive's CPU workers run, by its settings.

    Raises:
        ValueError: they name none of predictor.backends.FILES.
        yaml.YAMLError, KeyError, TypeError: they are not as `write_config` writes them.
    """
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["backend"]
    if not isinstance(found, str) or found not in FILES:
        raise ValueError(f"{path.name} names {found!r} as backend, not one of {', '.join(FILES)}")
    return found


def is_this_checkouts(path: Path) -> bool:
    """Whether settings are those of handler/model-config.yaml, but for what an export chooses.

    Raises:
        KeyError, yaml.YAMLError: as `with_values`.
    """
    default = CONFIG.read_text(encoding="utf-8")
    values = {key: yaml.safe_load(default)[key] for key in CHOSEN}
    return with_values(path.read_text(encoding="utf-8"), values) == with_values(default, values)


def with_values(text: str, values: Mapping[str, str | int]) -> str:
    """A YAML mapping with other values for some of its keys; its comments stay.

    Raises:
        KeyError: it lacks one of the keys.
        yaml.YAMLError: it is no YAML.
    """
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    assert isinstance(root, yaml.MappingNode), "settings by name"
    found = {key.value: value for key, value in root.value}
    for key in sorted(values, key=lambda key: found[key].start_mark.index, reverse=True):  # so that the marks hold
        start, end = found[key].start_mark.index, found[key].end_mark.index
        text = text[:start] + _scalar(values[key]) + text[end:]
    assert yaml.safe_load(text) == loader.construct_document(root) | values
    return text


def _scalar(value: str | int) -> str:
    return yaml.safe_dump(value, width=math.inf).removesuffix("\n").removesuffix("\n...")


def table(rows: list[BackendRow]) -> str:
    """The rows as text, for the terminal."""
    lines = [("backend", *(f"ms an image, batch of {batch}" for batch in BATCHES), "")]
    for row in rows:
        numbers = (f"{row.milliseconds[str(batch)]:.3f}" for batch in BATCHES)
        lines.append((row.backend, *numbers, f"in the archive, batchSize {batch_size(row)}" * row.chosen))
    return text_table.aligned(lines)
