"""Trains an image classifier and writes a run folder: weights, spec, metrics, history, report.

    python train.py --data digits --out runs/digits
    python train.py --data DIR --arch resnet18 --pretrained --freeze --out runs/NAME

DIR holds one folder of images for each class. Ctrl-C ends the training, keeps the best weights and writes everything;
before the first epoch is over there are none, and nothing is written.

    python train.py --resume runs/NAME                         goes on after a kill, as if there had been none
    python train.py --evaluate runs/NAME --data DIR            scores a run on any images
    torchrun --nproc-per-node N train.py --data DIR …          trains the same in N processes
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from dataset import splits
from dataset.image_store import Data
from dataset.loading import load
from dataset.sample_images import save_samples
from dataset.sources import BUILT_IN
from model import checkpoint, registry
from model.fastnet import FastNet
from model.registry import Pretrained
from model.tensor_preprocessing import normalise
from predictor.files import sha256, write_text
from predictor.spec import ModelSpec
from training import distributed, run_folder
from training.augmentation import shrunk
from training.calibration import fit_temperature
from training.config import RECIPES, TrainConfig, add_options, make_config
from training.evaluation import SPLITS, evaluate, evaluate_run
from training.loop import fit
from training.memory import keep_freed
from training.metrics import calibrated_score, one_label_for_all
from training.optimizer import default_lr
from training.progress import reading_bar
from training.report import write_report
from training.resume import RESUMABLE, resumed_config
from training.trainer import Diverged, OutOfMemory, Trainer

WHITENED_BY = 5000  # images of up to 32 px; fewer of larger ones
LARGE = 128  # px: from here on memory is dear, and a step long
SWITCHES = (
    "mixup",
    "cutmix",
    "ema",
    "low_res",
    "clip_grad_norm",
    "accumulate",
    "amp",
    "channels_last",
    "compile",
)  # off by default


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list-archs", action="store_true", help="print the names that --arch takes, and stop")
    parser.add_argument("--list-recipes", action="store_true", help="print what --recipe takes, and stop")
    parser.add_argument("--recipe", metavar="NAME", help="a set of options (--list-recipes); flags override it")
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    changeable = ", ".join(f"--{name.replace('_', '-')}" for name in RESUMABLE)
    parser.add_argument("--resume", metavar="RUN", type=Path, help=f"go on with a run; only {changeable} may be new")
    parser.add_argument(
        "--evaluate", metavar="RUN", type=Path, help="score a run on --data; --out FILE.json keeps the result"
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="what to evaluate (default: unseen, all but what the run was trained and validated on)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON, in the last line")
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    names = ("list_archs", "list_recipes", "recipe", "config", "resume", "evaluate", "split", "overwrite", "json")
    command = argparse.Namespace(**{name: options.pop(name) for name in names})
    if command.list_archs:
        print("\n".join(registry.names()))
        return 0
    if command.list_recipes:
        print(RECIPES.read_text(encoding="utf-8"), end="")
        return 0
    try:
        with distributed.joined():
            summary = run(command, options)
            if command.json:
                print(json.dumps(summary, ensure_ascii=False))
    except (ValueError, OSError, Diverged, OutOfMemory) as error:  # what the user can mend: data, flags, files
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:  # not in a step, where OutOfMemory says what fits
        print(f"train.py: {str(error).splitlines()[0]} Pass a smaller --size, or --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"train.py: {error if error.args else 'interrupted'}", file=sys.stderr)
        return 130  # as the shell has it for a program that SIGINT ended
    return 0


def run(command: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Does what the command line says; returns what --json prints."""
    if command.evaluate:
        if other := [name for name in ("resume", "config", "recipe", "overwrite") if getattr(command, name)]:
            raise ValueError(f"--evaluate {command.evaluate}: trains nothing; leave --{other[0]} out")
        return show_evaluation(command, options)
    if command.split:
        raise ValueError("--split: belongs to --evaluate RUN; --val-fraction and --test-fraction cut the data")
    if command.resume:
        if command.overwrite:
            raise ValueError(f"--resume {command.resume}: goes on with the run that is there; leave --overwrite out")
        source = "config" if command.config else "recipe" if command.recipe else None
        config = resumed_config(command.resume, source, options)
    else:
        config = make_config(command.config, options, command.recipe)
    return {"run": config.out, **train(config, resume=bool(command.resume), overwrite=command.overwrite)}


def show_evaluation(command: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Scores a run, prints a line, and writes the JSON that --out names."""
    device = pick_device(options.get("device", "auto"))
    scores = evaluate_run(command.evaluate, command.split, options, device)
    if "out" in options and distributed.rank() == 0:
        write_text(options["out"], json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    print(
        f"{scores['data']}, {scores['split']}: {scores['accuracy']:.2%} of {scores['images']:,} images "
        f"({beside_accuracy(scores)}, macro F1 {scores['macro']['f1']:.4f})"
    )
    return scores


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains as `config` says and writes the run folder `config.out`; returns what metrics.json holds.

    Args:
        resume: go on from the run folder's last.ckpt, if the run came so far.
        overwrite: replace a run that the folder holds.

    Raises:
        ValueError: the folder, the data, the architecture or an option cannot be used; nothing has been written then.
            Or the disk is full.
        Interrupted: by Ctrl-C before there were weights to keep.
        Diverged: the loss is no number any more.
        OutOfMemory: of the GPU.
    """
    if config.freeze and not (resume or config.pretrained or config.weights):
        raise ValueError(
            "--freeze: without trained weights the head would learn from random features; "
            "pass --pretrained or --weights FILE, or leave --freeze out"
        )
    first = distributed.rank() == 0
    out = Path(config.out)
    with run_folder.claimed(out, config.data, resume=resume, overwrite=overwrite) if first else nullcontext():
        return train_into(out, config, resume)


def train_into(out: Path, config: TrainConfig, resume: bool) -> dict[str, Any]:
    """As `train`, in a run folder that is ready for it."""
    device = pick_device(config.device)
    config = resolve_size(config)
    pretrained = read_weights(config)  # before the data: what cannot be downloaded is said at once

    # Data
    started = time.perf_counter()
    known = recorded_splits(out) if resume else None
    data = read_data(config, known)
    data_seconds = time.perf_counter() - started
    config = resolve_defaults(config, data)
    announce(config, data, device, data_seconds)

    # Network
    if device.type == "cpu" and (config.size or 0) < LARGE:
        keep_freed()
    torch.manual_seed(config.seed)
    network, mean, std = make_network(config, data, pretrained)
    network.to(device)
    if distributed.rank() > 0:
        torch.manual_seed(config.seed + distributed.rank())  # dropout draws differently in each process
    scale = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    # Loop
    trainer: Trainer | None = None
    with interruptible(lambda: trainer is not None and bool(trainer.history)) as interrupted:
        trainer = Trainer(network, data, config, scale, interrupted)
        begin(trainer, out, resume)
        if distributed.rank() == 0:
            splits.write(out, {name: getattr(data, name).names for name in splits.SPLITS}, known)
        fit(trainer, out)
    best, seconds = trainer.best, trainer.schedule.seconds + trainer.features_seconds

    # Results
    checkpoint.load_into(network, best["network"])
    if distributed.rank() == 0:
        checkpoint.save(best["network"], out / "model.pt")
    val = evaluate(network, data.val, *scale)
    test = evaluate(network, data.test, *scale)
    temperature = fit_temperature(val, data.val.targets)
    metrics = {
        "test": calibrated_score(test, data.test.targets, data.labels, temperature),
        "val": calibrated_score(val, data.val.targets, data.labels, temperature),
        "train": {
            "seconds": round(seconds, 2),
            "data_seconds": round(data_seconds, 2),
            "images_per_second": round(trainer.images_per_second, 1),
            "epochs": trainer.history[-1]["epoch"],
            "best_epoch": best["epoch"],
            "images": len(data.train),
            "parameters": sum(p.numel() for p in network.parameters()),
            "device": str(device),
        },
    }
    if distributed.rank() == 0:
        spec = make_spec(config, data, mean, std, temperature, metrics["test"], sha256(out / "model.pt"))
        spec.save(out / "spec.json")
        write_text(out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        save_samples(data.samples, out / "samples", say=print)
        write_report(out / "report", spec, metrics, out / "history.csv", data, test / temperature)
        summarise(out, metrics)
    return metrics


def begin(trainer: Trainer, out: Path, resume: bool) -> None:
    """Takes the run folder: its checkpoint, or a new beginning in which no weights of an earlier run are left."""
    last = out / run_folder.CHECKPOINT
    if resume and last.exists():
        trainer.restore(last)
        print(f"going on after epoch {trainer.history[-1]['epoch']:g}, {trainer.schedule.seconds:.0f} s")
    if distributed.rank() == 0:
        if not resume:
            run_folder.begin(out)
        trainer.config.save(out / "config.yaml")


def recorded_splits(out: Path) -> dict[str, str] | None:
    """The splits of a run that goes on, so that no image changes its side; None if it has not come to a checkpoint.

    Raises:
        ValueError: it has none.
    """
    known = splits.read(out)
    if known is None and (out / "last.ckpt").exists():
        raise ValueError(f"--resume {splits.no_record(out)}; start a new run")
    return known


def read_weights(config: TrainConfig) -> Pretrained | None:
    """The weights to start from, if there are to be some. Whether they fit the architecture is found here too."""
    if not (config.pretrained or config.weights):
        return None
    file = Path(config.weights) if config.weights else None
    network = registry.build(config.arch, 2, config.size or 0)
    with nullcontext() if file else distributed.first_alone():  # they may be downloaded
        pretrained = registry.read_pretrained(config.arch, file)
    registry.load_pretrained(network, config.arch, pretrained)
    return pretrained


def read_data(config: TrainConfig, known: dict[str, str] | None = None) -> Data:
    """The images, decoded; see dataset.loading.load. A size that the network cannot take is found before."""
    size = config.size or 0
    network = registry.build(config.arch, 2, size)
    if config.low_res and not registry.takes(network, 2, shrunk(size)):
        raise ValueError(
            f"--low-res {config.low_res}: {config.arch} of {size} px cannot take {shrunk(size)} px; pass --low-res 0"
        )
    out = Path(config.out).absolute()
    alone = distributed.first_alone() if config.data in BUILT_IN else nullcontext()  # it may be downloaded
    with alone, reading_bar() as progress:
        return load(
            config.data,
            size=size,
            resize=config.resize or 0,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            split_seed=config.split_seed,
            skip_bad=config.skip_bad,
            workers=config.workers,
            download_dir=config.download_dir,
            scratch=next(folder for folder in (out, *out.parents) if folder.is_dir()),
            processes=distributed.local_world(),
            known=known,
            say=print,
            progress=progress,
        )


def make_network(
    config: TrainConfig, data: Data, pretrained: Pretrained | None
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The network, with trained weights where there are some, and the mean and std that its pixels need."""
    network = registry.build(config.arch, len(data.labels), config.size or 0)
    mean: tuple[float, ...] = registry.IMAGENET_MEAN
    std: tuple[float, ...] = registry.IMAGENET_STD
    if pretrained:
        mean, std = pretrained.mean, pretrained.std
        fresh = registry.load_pretrained(network, config.arch, pretrained)
        print(f"weights: {pretrained.source}; from scratch: {', '.join(fresh) or 'nothing'}")
    elif isinstance(network, FastNet):
        wanted = max(100, WHITENED_BY * 32**2 // max(32, config.size or 0) ** 2)  # each has a patch for each pixel
        some = data.train.crops(slice(None, None, -(-len(data.train) // wanted)))  # of every class
        network.whiten(normalise(some, torch.tensor(mean), torch.tensor(std)))
    return network, mean, std


def make_spec(
    config: TrainConfig,
    data: Data,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    temperature: float,
    test: dict[str, Any],
    weights_sha256: str,
) -> ModelSpec:
    import torchvision  # late, as in model.registry

    return ModelSpec(
        arch=config.arch,
        labels=tuple(data.labels),
        size=config.size or 0,
        resize=config.resize or 0,
        mean=mean,
        std=std,
        temperature=temperature,
        trained_on=f"{data.name}, {len(data.train):,} images",
        metrics={name: test[name] for name in ("accuracy", "top5", "ece", "images")},
        weights_sha256=weights_sha256,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    )


@contextmanager
def interruptible(something_to_keep: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only makes the function that is given return True; the second one stops the program."""
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)
        if something_to_keep():
            print("interrupted: the best weights so far are kept; Ctrl-C again stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def pick_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU, else Apple's, else the CPU.

    Raises:
        ValueError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and distributed.world() > 1:
        gpus, processes = torch.cuda.device_count(), distributed.local_world()
        if gpus and processes > gpus:
            raise ValueError(f"{processes} processes for {gpus} GPUs; pass --nproc-per-node {gpus}, or --device cpu")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; pass --device auto or cpu") from None
    return device


def resolve_size(config: TrainConfig) -> TrainConfig:
    """Fills in what depends on the architecture."""
    if config.arch not in registry.names():
        registry.build(config.arch, 2, 32)  # raises, naming the close ones
    own_size, own_resize = registry.default_size(config.arch)
    size = config.size or own_size
    resize = config.resize or round(size * own_resize / own_size)
    if resize < size:
        raise ValueError(f"--resize {resize}: must be at least --size {size}")
    padding = config.crop_padding
    if padding is None:
        padding = 0 if config.flips_only else size // 8
    if padding >= size:
        raise ValueError(f"--crop-padding {padding}: must be below --size {size}")
    return replace(config, size=size, resize=resize, crop_padding=padding)


def resolve_defaults(config: TrainConfig, data: Data) -> TrainConfig:
    """Fills in what depends on the data."""
    return replace(
        config,
        flip=data.flips if config.flip is None else config.flip,
        lr=config.lr or default_lr(config),
        batch_size=config.batch_size or (64 if len(data.train) >= 10_000 and (config.size or 0) < LARGE else 32),
    )


def announce(config: TrainConfig, data: Data, device: torch.device, seconds: float) -> None:
    if data.skipped:
        print(f"left out {len(data.skipped)} unreadable images:", *data.skipped, sep="\n  ")
    print(
        f"{data.name}: {len(data.labels)} classes, {len(data.train):,} train, {len(data.val):,} val, "
        f"{len(data.test):,} test images, read in {seconds:.1f} s"
    )
    lengths = [f"{config.epoch_limit:g} epochs"] if math.isfinite(config.epoch_limit) else []
    lengths += [f"{config.minutes:g} minutes"] if config.minutes else []
    print(
        f"{config.arch} at {config.size} px for {' or '.join(lengths)} on {device}; batches of {config.batch_size}, "
        f"flip {'on' if config.flip else 'off'}, shift {config.crop_padding} px, jitter {config.jitter:g}",
        flush=True,
    )
    chosen = {name: getattr(config, name) for name in SWITCHES if getattr(config, name) != getattr(TrainConfig, name)}
    extras = [name.replace("_", " ") + ("" if value is True else f" {value}") for name, value in chosen.items()]
    if distributed.world() > 1:
        extras.append(f"{distributed.world()} processes")
    if extras:
        print("with " + ", ".join(extras), flush=True)


def summarise(out: Path, metrics: dict[str, Any]) -> None:
    test, trained = metrics["test"], metrics["train"]
    print(
        f"test: {test['accuracy']:.2%} of {test['images']:,} images ({beside_accuracy(test)}); "
        f"best epoch {trained['best_epoch']:g}, {trained['seconds']:.0f} s, "
        f"{trained['images_per_second']:,.0f} images/s"
    )
    if label := one_label_for_all(test):
        print(f"the network gives '{label}' to nearly all test images; train longer, or with a smaller --lr")
    print(f"report: {out / 'report' / 'index.html'}\nnext:   {export_command(out)}")


def beside_accuracy(scores: dict[str, Any]) -> str:
    """What an accuracy is to be read with; of five classes or fewer all are among the top five."""
    top5 = f"top-5 {scores['top5']:.2%}, " if len(scores["per_class"]) > 5 else ""
    return f"the largest class alone {scores['baseline']:.2%}, {top5}calibration error {scores['ece']:.3f}"


def export_command(out: Path) -> str:
    """The next command, to be pasted as it is; with a name where export refuses the folder's own."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", out.resolve().name).lstrip("-._") or "model"
    return shlex.join(["python", "-m", "export", str(out)] + (["--name", name] if name != out.resolve().name else []))


if __name__ == "__main__":
    sys.exit(main())
