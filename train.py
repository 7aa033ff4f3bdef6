"""Trains an image classifier and writes a run folder: weights, spec, metrics, history, report.

    python train.py --data digits --out runs/digits
    python train.py --data DIR --arch resnet18 --pretrained --freeze --out runs/NAME

DIR holds one folder of pictures for each class. Ctrl-C ends the training, keeps the best weights and writes everything.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from model import architectures, checkpoint
from model.files import sha256, write_text
from model.spec import ModelSpec
from training import data as training_data
from training.config import TrainConfig, add_options, read_config
from training.data import Data
from training.loop import Diverged, evaluate, make_optimizer, train_one_epoch
from training.metrics import score
from training.report import write_report
from training.schedule import Schedule


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list-archs", action="store_true", help="print the names that --arch takes, and stop")
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    list_archs, file = options.pop("list_archs"), options.pop("config")
    if list_archs:
        print("\n".join(architectures.names()))
        return 0
    try:
        train(make_config(file, options))
    except (ValueError, Diverged) as error:  # the user's mistakes: data, flags, files
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def make_config(file: str | None, flags: dict[str, Any]) -> TrainConfig:
    """The options of the file, the flags over them, the defaults under them."""
    options = (read_config(file) if file else {}) | flags
    if missing := [f"--{name}" for name in ("data", "out") if name not in options]:
        raise ValueError(f"{' and '.join(missing)}: needed, as a flag or in --config FILE")
    return TrainConfig(**options)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains as `config` says and writes the run folder `config.out`; returns what metrics.json holds.

    Raises:
        ValueError: the data, the architecture or an option cannot be used. Nothing has been written then.
        Diverged: the loss is no number any more.
    """
    out, started = Path(config.out), time.perf_counter()
    device = pick_device(config.device)
    config = resolve_size(config)

    # Data
    data = read_data(config)
    data_seconds = time.perf_counter() - started
    config = resolve_defaults(config, data)
    announce(config, data, device, data_seconds)

    # Network
    torch.manual_seed(config.seed)
    network, mean, std = make_network(config, len(data.labels))
    network.to(device)
    scale = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    # Loop
    out.mkdir(parents=True, exist_ok=True)
    with interruptible() as interrupted:
        config.save(out / "config.yaml")
        best, history = fit(network, data, config, scale, out, interrupted)

    # Results
    network.load_state_dict(best["network"])
    val = evaluate(network, data.val, *scale)
    test = evaluate(network, data.test, *scale)
    metrics = {
        "test": score(test, data.test.targets, data.labels),
        "val": score(val, data.val.targets, data.labels),
        "train": {
            "seconds": history[-1]["seconds"],
            "data_seconds": round(data_seconds, 2),
            "epochs": len(history),
            "best_epoch": best["epoch"],
            "pictures": len(data.train),
            "parameters": sum(p.numel() for p in network.parameters()),
            "device": str(device),
        },
    }
    checkpoint.save(best["network"], out / "model.pt")
    spec = make_spec(config, data, mean, std, metrics["test"], sha256(out / "model.pt"))
    spec.save(out / "spec.json")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    training_data.save_samples(data.samples, out / "samples")
    write_report(out / "report", spec, metrics, out / "history.csv", data.test, test)
    summarise(out, metrics)
    return metrics


def fit(
    network: nn.Module,
    data: Data,
    config: TrainConfig,
    scale: tuple[Tensor, Tensor],
    out: Path,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Trains epoch by epoch; after each, writes history.csv and last.ckpt.

    Args:
        scale: mean and std, each (3,), on the network's device.
        interrupted: asked before each step; once true, the run ends there, with the best epoch before. The first
            epoch counts even if it was cut short.

    Returns:
        The best epoch (its number, val accuracy and state_dict), and the history.
    """
    optimizer = make_optimizer(network, config)
    schedule = Schedule(optimizer, config, interrupted)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, float]] = []
    best: dict[str, Any] = {"epoch": 0, "accuracy": -1.0}
    for epoch in itertools.count():
        with progress_bar(epoch, len(data.train), config) as show:
            loss, accuracy = train_one_epoch(
                network,
                data.train,
                optimizer,
                config,
                *scale,
                generator=generator,
                before_step=partial(schedule.before_step, epoch),
                on_step=show,
            )
        if history and interrupted():
            break
        val = score(evaluate(network, data.val, *scale), data.val.targets, data.labels)
        history.append(
            {
                "epoch": epoch + 1,
                "lr": schedule.lr,
                "train_loss": loss,
                "train_accuracy": accuracy,
                "val_loss": val["loss"],
                "val_accuracy": val["accuracy"],
                "seconds": round(schedule.seconds, 2),
            }
        )
        print(
            f"epoch {epoch + 1:3}  loss {loss:.4f}  train {accuracy:.2%}  val {val['accuracy']:.2%}  "
            f"{schedule.seconds:.0f} s",
            flush=True,
        )
        if val["accuracy"] > best["accuracy"]:
            best = {"epoch": epoch + 1, "accuracy": val["accuracy"], "network": snapshot(network)}
        write_history(history, out / "history.csv")
        checkpoint.save(
            {
                "epoch": epoch + 1,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "torch_generator": torch.get_rng_state(),
                "best": best,
                "history": history,
            },
            out / "last.ckpt",
        )
        if config.patience and epoch + 1 - best["epoch"] >= config.patience:
            print(f"no better val accuracy for {config.patience} epochs: stopping early")
            break
        if schedule.is_over(epoch + 1):
            break
    return best, history


def read_data(config: TrainConfig) -> Data:
    """The pictures, decoded; see training.data.load. A size that the network cannot take is found before."""
    architectures.build(config.arch, 2, config.size or 0)
    out = Path(config.out).absolute()
    return training_data.load(
        config.data,
        size=config.size or 0,
        resize=config.resize or 0,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        split_seed=config.split_seed,
        skip_bad=config.skip_bad,
        download_dir=config.download_dir,
        scratch=next(folder for folder in (out, *out.parents) if folder.is_dir()),
        progress=sys.stderr.isatty(),
    )


def make_network(config: TrainConfig, classes: int) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The network, with trained weights and frozen where asked for, and the mean and std that its pixels need."""
    network = architectures.build(config.arch, classes, config.size or 0)
    mean: tuple[float, ...] = architectures.IMAGENET_MEAN
    std: tuple[float, ...] = architectures.IMAGENET_STD
    if config.pretrained or config.weights:
        mean, std = architectures.pretrained_normalisation(config.arch)
        weights = Path(config.weights) if config.weights else None
        fresh = architectures.load_pretrained(network, config.arch, weights)
        print(f"weights: {weights or 'torchvision'}; from scratch: {', '.join(fresh) or 'nothing'}")
    if config.freeze:
        architectures.freeze_backbone(network)
    return network, mean, std


def make_spec(
    config: TrainConfig,
    data: Data,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    test: dict[str, Any],
    weights_sha256: str,
) -> ModelSpec:
    return ModelSpec(
        arch=config.arch,
        labels=tuple(data.labels),
        size=config.size or 0,
        resize=config.resize or 0,
        mean=mean,
        std=std,
        trained_on=f"{data.name}, {len(data.train):,} pictures",
        metrics={name: test[name] for name in ("accuracy", "top5", "ece", "pictures")},
        weights_sha256=weights_sha256,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    )


@contextmanager
def progress_bar(epoch: int, pictures: int, config: TrainConfig) -> Iterator[Callable[[float, int], None]]:
    """A bar on a terminal and nothing elsewhere; gives a function of the loss and the pictures seen that moves it."""
    length = "" if config.minutes else f"/{config.epochs}"
    with tqdm(
        total=pictures,
        desc=f"epoch {epoch + 1}{length}",
        unit="pictures",
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:

        def show(loss: float, seen: int) -> None:
            bar.update(seen - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        yield show


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only makes the function that is given return True; the second one stops the program."""
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)
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
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; pass --device auto or cpu") from None
    return device


def resolve_size(config: TrainConfig) -> TrainConfig:
    """Fills in what depends on the architecture."""
    if config.arch not in architectures.names():
        architectures.build(config.arch, 2, 32)  # raises, naming the close ones
    own_size, own_resize = architectures.default_size(config.arch)
    size = config.size or own_size
    resize = config.resize or round(size * own_resize / own_size)
    if resize < size:
        raise ValueError(f"--resize {resize}: must be at least --size {size}")
    padding = size // 8 if config.crop_padding is None else config.crop_padding
    if padding >= size:
        raise ValueError(f"--crop-padding {padding}: must be below --size {size}")
    return replace(config, size=size, resize=resize, crop_padding=padding)


def resolve_defaults(config: TrainConfig, data: Data) -> TrainConfig:
    """Fills in what depends on the data."""
    return replace(
        config,
        flip=data.flips if config.flip is None else config.flip,
        batch_size=config.batch_size or (32 if len(data.train) < 10_000 else 64),
    )


def announce(config: TrainConfig, data: Data, device: torch.device, seconds: float) -> None:
    if data.skipped:
        print(f"left out {len(data.skipped)} unreadable pictures:", *data.skipped, sep="\n  ")
    print(
        f"{data.name}: {len(data.labels)} classes, {len(data.train):,} train, {len(data.val):,} val, "
        f"{len(data.test):,} test pictures, read in {seconds:.1f} s"
    )
    length = f"{config.minutes:g} minutes" if config.minutes else f"{config.epochs} epochs"
    print(
        f"{config.arch} at {config.size} px for {length} on {device}; batches of {config.batch_size}, "
        f"flip {'on' if config.flip else 'off'}, shift {config.crop_padding} px, jitter {config.jitter:g}",
        flush=True,
    )


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def write_history(history: list[dict[str, float]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    write_text(path, text.getvalue())


def summarise(out: Path, metrics: dict[str, Any]) -> None:
    test, trained = metrics["test"], metrics["train"]
    print(
        f"test: {test['accuracy']:.2%} of {test['pictures']:,} pictures (top-5 {test['top5']:.2%}, "
        f"calibration error {test['ece']:.3f}); best epoch {trained['best_epoch']}, {trained['seconds']:.0f} s\n"
        f"report: {out / 'report' / 'index.html'}\nnext:   python -m export {out}"
    )


if __name__ == "__main__":
    sys.exit(main())
