"""Logits of images that are only looked at; scoring a finished run on images that it may never have seen."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset import splits
from dataset.decoded_images import Split, allocate
from dataset.decoding import decode_all, name_unreadable
from dataset.sources import DataError, Entry, Source, open_source
from model import load_run
from model.tensor_preprocessing import normalise
from predictor.files import write_text
from predictor.spec import PixelRule
from training import distributed
from training.console import image_progress, say_evaluation
from training.metrics import calibrated_score
from training.options import TrainOptions, flag, read_config, scoring
from training.resolve import pick_device, workers_of

log = logging.getLogger(__name__)

SPLITS = ("unseen", *splits.SPLITS, "all")
BATCH = 256  # images; fewer where the GPU has no room for them
CPU_PIXELS = 1 << 20  # of a batch on the CPU, where larger ones take memory and gain nothing


def evaluate(
    network: nn.Module,
    split: Split,
    mean: Tensor,
    std: Tensor,
    *,
    mirrored: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch: int | None = None,
    amp: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of every image, in order: float32 (N, C), on the CPU. Each process looks at its share of them.

    Args:
        mirrored: look at the mirror images.
        progress: told how many images are done, of how many; of several processes, as if all were as far as this one.
        batch: images at a time; by default as many as suit the device.
        amp: the type that autocast computes in; float32 for none.
    """
    network.eval()
    if batch is None:
        pixels = math.prod(split.pixels.shape[1:3])
        batch = min(BATCH, max(1, CPU_PIXELS // pixels)) if mean.device.type == "cpu" else BATCH
    share = distributed.share(len(split))
    logits = []
    try:
        with torch.inference_mode(), torch.autocast(mean.device.type, amp, enabled=amp is not torch.float32):
            for start in range(share.start, share.stop, batch):
                stop = min(start + batch, share.stop)
                crops = split.crops(slice(start, stop)).to(mean.device)
                if stop < share.stop:
                    split.read_ahead(slice(stop, min(stop + batch, share.stop)))
                images = normalise(crops.flip(2) if mirrored else crops, mean, std)
                logits.append(network(images).float().cpu())
                progress((stop - share.start) * len(split) // (share.stop - share.start), len(split))
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
        logits = []
    else:
        return torch.cat([part for parts in distributed.gather(logits) for part in parts])
    return evaluate(network, split, mean, std, mirrored=mirrored, progress=progress, batch=batch // 2, amp=amp)


def show_evaluation(run: Path, split: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """`evaluate_run`, said in a line, and written as JSON where `options` name a file (`out`).

    Raises:
        ValueError: as `evaluate_run`; or, before an image is read, the file cannot be written, or holds something else.
    """
    file = Path(options["out"]) if "out" in options else None
    if file:
        _check_scores_file(file)
    scores = evaluate_run(run, split, options, pick_device(options.get("device", "auto")))
    if file and distributed.rank() == 0:
        write_text(file, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    say_evaluation(scores)
    return scores


def evaluate_run(run: Path, split: str | None, options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Scores `runs/NAME` on a split of any data whose classes are among the run's.

    Args:
        split: one of SPLITS, as `choose_images` takes it; "unseen" without it.
        options: those of the command line, of which `scoring` has the names; they stand for the run's own.

    Returns:
        As `score`, with "run", "data", "split", and "left_out": how many of the run's train and val images are in the
        data and were not scored.

    Raises:
        ValueError: the run, the data or an option cannot be used; the message says why.
    """
    if fixed := sorted(set(options) - {*scoring()}):
        raise ValueError(f"--evaluate {run}: trains nothing; leave {flag(fixed[0])} out")
    spec, network = load_run(run)
    file = run / "config.yaml"
    own = read_config(file) if file.exists() else {}
    if not options.get("data", own.get("data")):
        raise ValueError(f"--evaluate {run}: has no config.yaml that names its data; pass --data")
    config = TrainOptions(**{"out": str(run), **own, **options})
    source, known = open_source(config.data, config.download_dir), splits.read(run)
    wanted = choose_images(source.entries, split or "unseen", known or {}, config)
    left_out = _say_what_is_scored(run, source, known, wanted, split or "unseen")
    images = read_images(source, spec.labels, spec.rule, wanted, config)
    mean, std = torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device)
    with image_progress("scoring") as progress:
        logits = evaluate(network.to(device), images, mean, std, progress=progress)
    result = calibrated_score(logits, images.targets, spec.labels, spec.temperature)
    name = split if split not in (None, "unseen") else _name(source.entries, wanted, known or {})
    return {"run": str(run), "data": config.data, "split": name, "left_out": left_out, **result}


def choose_images(entries: Sequence[Entry], split: str, known: Mapping[str, str], config: TrainOptions) -> list[int]:
    """Indices of the images to score.

    Args:
        split: "unseen": all that the run owes nothing to, which are its test images and those that it has never seen
            (but of these only the test split, where the data brings one). "train", "val", "test": as the run has cut
            them, images that it has never seen as it would cut them. "all".
        known: the run's record, `splits.read`.
    """
    if split == "all":
        return list(range(len(entries)))
    if split == "unseen":
        brings_test = any(entry.split == "test" for entry in entries)
        fresh = ["test" if entry.split == "test" or not brings_test else "" for entry in entries]
        sides = [known.get(entry.key, own) for entry, own in zip(entries, fresh, strict=True)]
        return [index for index, own in enumerate(sides) if own == "test"]
    sides = splits.cut_splits(entries, config.val_fraction, config.test_fraction, config.split_seed, known)
    return [index for index, own in enumerate(sides) if own == split]


def read_images(
    source: Source, labels: tuple[str, ...], rule: PixelRule, wanted: Sequence[int], config: TrainOptions
) -> Split:
    """Decodes the images of the indices `wanted`; their targets are indices in `labels`.

    Raises:
        DataError: no images, a class that is not among `labels`, or an image that cannot be read (unless
            `config.skip_bad`).
    """
    if strange := [label for label in source.labels if label not in labels]:
        raise DataError(
            f"{source.name}: the run does not know {', '.join(map(repr, strange))}; its classes are {', '.join(labels)}"
        )
    rows = {index: row for row, index in enumerate(wanted)}
    processes = distributed.local_world()
    pixels = allocate(len(wanted), rule.height, rule.width, None, processes=processes, say=log.info)
    with image_progress("reading") as progress:
        bad = decode_all(source, rows, pixels, rule, workers=workers_of(config), progress=progress)
    for line in name_unreadable(source.entries, bad):
        if not config.skip_bad:
            raise DataError(f"{line} ({len(bad)} such images); mend them or pass --skip-bad")
        log.info(f"left out {line}")
    kept = [index for index in wanted if index not in bad]
    if not kept:
        raise DataError(f"{source.name}: no images to score in this split; pass --split {' or '.join(SPLITS)}")
    targets = torch.tensor([labels.index(source.entries[index].label) for index in kept])
    names = [source.entries[index].key for index in kept]
    return Split(pixels, torch.tensor([rows[index] for index in kept]), targets, names)


def _check_scores_file(file: Path) -> None:
    """
    Raises:
        ValueError: it cannot be written, or holds something other than an earlier evaluation's scores.
    """
    flag = f"--out {file}"
    if file.exists() and not file.is_file():
        raise ValueError(f"{flag}: is {'a folder' if file.is_dir() else 'a device'}; name a file, e.g. scores.json")
    try:
        tempfile.TemporaryFile(dir=next(folder for folder in file.absolute().parents if folder.exists())).close()
        if not file.exists():
            return
        scores = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag}: cannot be written ({error.strerror}); name another file") from None
    except ValueError:  # neither text nor JSON
        scores = None
    if not isinstance(scores, dict) or not {"run", "split"} <= scores.keys():
        raise ValueError(f"{flag}: holds something other than an evaluation's scores; name another file")


def _say_what_is_scored(
    run: Path, source: Source, known: Mapping[str, str] | None, wanted: Sequence[int], split: str
) -> dict[str, int]:
    """Prints what the run has in common with the data; returns how many images it learned from are not scored."""
    entries = source.entries
    present, scored = splits.overlap(entries, known or {}), splits.overlap((entries[i] for i in wanted), known or {})
    left_out = {name: present[name] - scored[name] for name in splits.LEARNED}
    if known is None:
        log.info(f"{splits.no_record(run)}: images that it was trained on may be among those scored")
    elif present[""] == len(entries):
        log.info(f"none of the {len(entries):,} images has the name of one that the run has seen: all count as new")
    elif split == "unseen" and (words := splits.learned(left_out)):
        log.info(
            f"left out by name: {words}; scored: {scored['test']:,} test and {scored['']:,} new ones (or --split all)"
        )
    elif words := splits.learned(scored):
        log.info(f"among those scored: {words}")
    return left_out


def _name(entries: Sequence[Entry], wanted: Sequence[int], known: Mapping[str, str]) -> str:
    """What the unseen images are: the test split, all, or neither."""
    if all("test" in (known.get(entries[index].key), entries[index].split) for index in wanted):
        return "test"
    return "all" if len(wanted) == len(entries) else "unseen"
