"""Logits of pictures that are only looked at; scoring a finished run on pictures that it may never have seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import load_run
from model.preprocessing import normalise
from training import distributed
from training.config import TrainConfig, read_config
from training.data import Split, allocate, cut_splits, decode_all
from training.metrics import calibrated_score
from training.sources import DataError, Source, open_source

SPLITS = ("train", "val", "test", "all")
OPTIONS = (
    "data",
    "out",
    "download_dir",
    "val_fraction",
    "test_fraction",
    "split_seed",
    "skip_bad",
    "workers",
    "device",
)
BATCH = 256  # pictures; fewer where the GPU has no room for them
CPU_PIXELS = 1 << 20  # of a batch on the CPU, where larger ones take memory and gain nothing


def evaluate(
    network: nn.Module,
    split: Split,
    mean: Tensor,
    std: Tensor,
    *,
    mirrored: bool = False,
    shown: str = "",
    batch: int | None = None,
) -> Tensor:
    """Logits of every picture, in order: float32 (N, C), on the CPU. Each process looks at its share of them.

    Args:
        mirrored: look at the mirror images.
        shown: name of a progress bar; none without it.
        batch: pictures at a time; by default as many as suit the device.
    """
    network.eval()
    if batch is None:
        batch = min(BATCH, max(1, CPU_PIXELS // split.pixels.shape[1] ** 2)) if mean.device.type == "cpu" else BATCH
    share = distributed.share(len(split))
    hidden = not shown or distributed.rank() > 0 or not sys.stderr.isatty()
    starts = tqdm(range(share.start, share.stop, batch), desc=shown, unit="batches", leave=False, disable=hidden)
    logits = []
    try:
        with torch.inference_mode():
            for start in starts:
                crops = split.crops(slice(start, min(start + batch, share.stop))).to(mean.device)
                if mirrored:
                    crops = crops.flip(2)
                logits.append(network(normalise(crops, mean, std)).cpu())
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
        logits = []
    else:
        return torch.cat([part for parts in distributed.gather(logits) for part in parts])
    return evaluate(network, split, mean, std, mirrored=mirrored, shown=shown, batch=batch // 2)


def evaluate_run(run: Path, split: str | None, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Scores `runs/NAME` on a split of any data whose classes are among the run's.

    Args:
        split: one of SPLITS. Without it, the test split if the data has one or is the run's own; else all pictures.
        options: those of the command line; `data` and the others of OPTIONS stand for the run's own.

    Returns:
        As `score`, with "run", "data" and "split".

    Raises:
        ValueError: the run, the data or an option cannot be used; the message says why.
    """
    if fixed := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"--evaluate {run}: trains nothing; leave --{fixed[0].replace('_', '-')} out")
    spec, network = load_run(run)
    file = run / "config.yaml"
    own = read_config(file) if file.exists() else {}
    if not options.get("data", own.get("data")):
        raise ValueError(f"--evaluate {run}: has no config.yaml that names its data; pass --data")
    config = TrainConfig(**{"out": str(run), **own, **options})
    source = open_source(config.data, config.download_dir)
    if split is None:
        has_test = any(entry.split == "test" for entry in source.entries)
        split = "test" if has_test or config.data == own.get("data") else "all"
    pictures = read_pictures(source, spec.labels, spec.size, spec.resize, split, config)
    mean, std = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
    logits = evaluate(network.to(device), pictures, mean, std)
    result = calibrated_score(logits, pictures.targets, spec.labels, spec.temperature)
    return {"run": str(run), "data": config.data, "split": split, **result}


def read_pictures(
    source: Source, labels: tuple[str, ...], size: int, resize: int, split: str, config: TrainConfig
) -> Split:
    """Decodes the pictures of one split; its targets are places in `labels`.

    Raises:
        DataError: no pictures, a class that is not among `labels`, or a picture that cannot be read (unless
            `config.skip_bad`).
    """
    if strange := [label for label in source.labels if label not in labels]:
        raise DataError(
            f"{source.name}: the run does not know {', '.join(map(repr, strange))}; its classes are {', '.join(labels)}"
        )
    cuts = config.val_fraction, config.test_fraction, config.split_seed
    splits = ["all"] * len(source.entries) if split == "all" else cut_splits(source.entries, *cuts)
    wanted = [place for place, own in enumerate(splits) if own == split]
    rows = {place: row for row, place in enumerate(wanted)}
    pixels = allocate(len(wanted), size, None)
    bad = decode_all(source, rows, pixels, size, resize, workers=config.workers, progress=sys.stderr.isatty())
    for place, reason in sorted(bad.items()):
        if not config.skip_bad:
            raise DataError(
                f"{source.entries[place].name}: {reason} ({len(bad)} such pictures); mend them or pass --skip-bad"
            )
        print(f"left out {source.entries[place].name}: {reason}")
    kept = [place for place in wanted if place not in bad]
    if not kept:
        raise DataError(f"{source.name}: no pictures in its {split} split; pass --split {' or '.join(SPLITS)}")
    targets = torch.tensor([labels.index(source.entries[place].label) for place in kept])
    names = [source.entries[place].name for place in kept]
    return Split(pixels, torch.tensor([rows[place] for place in kept]), targets, names)
