"""Trains an image classifier and writes a run folder: weights, spec, metrics, history, report.

    python train.py --data DIR --out runs/NAME
    python train.py --data DIR --arch resnet18 --pretrained --freeze --out runs/NAME

DIR holds one folder of images for each class. Where no network is named, the images decide. Ctrl-C ends the training,
keeps the best weights and writes everything; before the first epoch is over, or the head fitted, there are none, and
nothing is written. SIGTERM does the same, but first saves the state, so that --resume goes on at that very step.

    python train.py --resume runs/NAME                         goes on after a kill, as if there had been none
    python train.py --evaluate runs/NAME --data DIR            scores a run on any images
    torchrun --nproc-per-node N train.py --data DIR …          trains the same in N processes
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dataset import splits
from dataset.decoded_images import Data
from dataset.sources import Source
from model import checkpoint, registry
from training import console, distributed, resume_state, run_folder
from training.command_line import check_flags, parse, training_options
from training.early_stopping import is_out_of_patience
from training.epoch import PartialEpoch, evaluate_val, make_row, train_epoch
from training.evaluation import show_evaluation
from training.failures import Diverged, Interrupted, OutOfMemory, check_loss, explained, has_finite_weights
from training.freezing import prepare_backbone
from training.head_fit import fit_head
from training.interruption import interruptible
from training.learner import Learner, make_learner
from training.metrics import score
from training.options import RECIPES, TrainOptions
from training.preview import first_batch
from training.report import write_report
from training.resolve import Plan, pick_device, recorded, resolve, resolve_reading
from training.results import score_splits, training_facts, write_results
from training.resume_state import Progress
from training.run_folder import EpochFiles
from training.schedule import Schedule
from training.selection import MEASURES, is_better, snapshot
from training.start import check_weights, make_network, near, read_data, read_weights
from training.suggestion import choose_options

log = logging.getLogger("training.command")


def main(arguments: Sequence[str] | None = None) -> int:
    command, options = parse(arguments, __doc__)
    if command.list_archs is not None:
        print("\n".join(registry.matching(command.list_archs)))
        return 0
    if command.list_recipes:
        print(RECIPES.read_text(encoding="utf-8"), end="")
        return 0
    try:
        with distributed.joined(), console.on_terminal():
            summary = run(command, options)
            if command.json:
                print(json.dumps(summary, ensure_ascii=False))
    except (ValueError, OSError, Diverged, OutOfMemory) as error:  # what the user can mend: data, flags, files
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:  # not in a step, where OutOfMemory says what to halve
        print(f"train.py: {str(error).splitlines()[0]} Pass a smaller --size, or --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"train.py: {error if error.args else 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)  # as the shell has it for a program that a signal ended
    return 0


def run(command: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """Does what the command line says; returns what --json prints."""
    check_flags(command)
    if command.evaluate:
        return show_evaluation(command.evaluate, command.split, given)
    options = training_options(command, given)
    is_open = not (command.resume or command.config or command.recipe)
    metrics = train(options, bool(command.resume), command.overwrite, given if is_open else None)
    return {"run": options.out, **metrics}


def train(
    options: TrainOptions, resume: bool = False, overwrite: bool = False, given: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains as `options` say and writes the run folder `options.out`; returns what metrics.json holds.

    Args:
        resume: go on from the run folder's last.ckpt, if the run came so far.
        overwrite: replace a run that the folder holds.
        given: the options of the command line, where the images may decide the others.

    Raises:
        ValueError: the folder, the data, the architecture or an option cannot be used; nothing has been written then.
            Or the disk is full.
        Interrupted: by Ctrl-C or SIGTERM before there were weights to keep.
        Diverged: the loss became infinite or NaN.
        OutOfMemory: of the GPU.
    """
    first = distributed.rank() == 0
    out = Path(options.out)
    with run_folder.claimed(out, options.data, resume=resume, overwrite=overwrite) if first else nullcontext():
        options, source = choose_options(options, given) if given else (options, None)
        if not resume:
            check_weights(options)
        return train_into(out, options, resume, source)


def train_into(out: Path, options: TrainOptions, resume: bool, source: Source | None) -> dict[str, Any]:
    """As `train`, in a run folder that is ready for it."""
    # TrainOptions and data: a plan
    device, pretrained = pick_device(options.device), read_weights(options)
    reading = resolve_reading(options, pretrained)
    started, known = time.perf_counter(), run_folder.recorded_splits(out) if resume else None
    data = read_data(options, reading, known, source)
    data_seconds = time.perf_counter() - started
    plan = resolve(options, reading, images=len(data.train), flips=data.flips, device=device)
    chosen = recorded(options, plan)
    console.announce(options, plan, data, data_seconds)

    # Network
    network, mean, std = make_network(plan, data, pretrained)
    scale = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    # Loop
    progress = Progress()
    with interruptible(lambda number: console.say_what_is_kept(number, bool(progress.history))) as interrupted:
        learner = make_learner(network, scale, plan, data.train.targets)
        schedule = Schedule(learner.optimizer, plan, interrupted)
        if resume and (out / resume_state.FILE).exists():
            progress = resume_state.restore(out / resume_state.FILE, learner, schedule, data)
        if distributed.rank() == 0:
            run_folder.begin(out, resume=resume)
            chosen.save(out / "config.yaml")
            splits.write(out, {name: getattr(data, name).names for name in splits.SPLITS}, known)
        learn(learner, near(device, data), plan, schedule, progress, out)

    # Results
    seconds = schedule.seconds + progress.features_seconds  # without the evaluation that follows
    checkpoint.load_into(network, progress.best.network)
    scores, temperature, calibrated = score_splits(network, data, scale)
    metrics = scores | {"train": training_facts(chosen, progress, network, data, device, seconds, data_seconds)}
    if distributed.rank() == 0:
        checkpoint.save(progress.best.network, out / "model.pt")
        spec = write_results(out, plan, data, mean, std, temperature, metrics)
        shown = first_batch(learner, data.train, plan, data.labels)
        write_report(out / "report", spec, metrics, out / "history.csv", data, calibrated, shown)
        console.summarise(out, metrics)
    return metrics


def learn(learner: Learner, data: Data, plan: Plan, schedule: Schedule, progress: Progress, out: Path) -> None:
    """Epoch after epoch until the schedule, a signal or `plan.patience` ends it.

    Writes last.ckpt after each epoch, and within it where the schedule says so.

    Ctrl-C and SIGTERM leave the epoch that they cut short out. The end of the time does not: what there is of its last
    epoch is evaluated, and stands in the history as a part of one.

    Raises:
        ValueError, Interrupted, Diverged, OutOfMemory: as `train`.
    """
    history, last, images = progress.history, out / resume_state.FILE, len(data.train)
    files = EpochFiles(out, history) if distributed.rank() == 0 else None

    def save(begun: PartialEpoch) -> None:
        if files and has_finite_weights(learner.network):  # else the next step's loss says so
            files.save(resume_state.collect(learner, schedule, progress, data, begun))
        schedule.saved()

    stuck = begin_with_head(learner, data, plan, schedule, progress, files)  # on this label
    for epoch in itertools.count(progress.epochs):
        begun, progress.begun = progress.begun, None
        if history and not begun and is_finished(progress, plan, schedule):
            break

        # Train
        with explained(last, plan, epoch, images):
            progress.features_seconds += prepare_backbone(learner, data, plan, schedule, epoch)
            with console.epoch_progress(epoch, images, plan, schedule, begun.seen if begun else 0) as show:
                trained = train_epoch(learner, data.train, plan, schedule, epoch, show, begun, save)
        if history and (schedule.interrupted or not trained.steps):
            break
        if schedule.interrupted:
            raise Interrupted(schedule.interrupted, last)
        if not trained.steps:
            raise ValueError(f"--minutes {plan.seconds / 60:g}: over before the first step; give it more")

        # Evaluate
        val = score(evaluate_val(learner, data, plan), data.val.targets, data.labels)
        row = make_row(history, trained, val, schedule)
        check_loss(val["loss"], row["epoch"], last, epoch)
        progress.add(row, trained.images, trained.seconds)
        stuck = console.say_epoch(row, val, stuck)

        # Keep the best, save
        if is_better(val, progress.best, plan.select):
            progress.best = snapshot(row["epoch"], val, learner.averaged)
        if files:  # in the first process
            files.write(resume_state.collect(learner, schedule, progress, data), history)
        schedule.saved()


def begin_with_head(
    learner: Learner, data: Data, plan: Plan, schedule: Schedule, progress: Progress, files: EpochFiles | None
) -> str:
    """The head alone, before anything else learns, where the plan wants that: the first result, which epochs have to
    beat. Returns as `console.say_epoch`."""
    is_new = not progress.history and not progress.begun
    fitted = fit_head(learner, data, plan, schedule) if plan.head_first and is_new else None
    stuck = ""
    if fitted:
        row, val = fitted
        progress.add(row, images=0, seconds=0)
        progress.best = snapshot(0, val, learner.averaged)
        if files:
            files.write(resume_state.collect(learner, schedule, progress, data), progress.history)
        stuck = console.say_epoch(row, val, "")
    schedule.head_seconds = progress.head_seconds
    return stuck


def is_finished(progress: Progress, plan: Plan, schedule: Schedule) -> bool:
    """Whether no other epoch begins."""
    if schedule.is_over(progress.epochs):
        return True
    if stuck := is_out_of_patience(progress.history, plan):
        log.info(f"no better {MEASURES[plan.select]} for {plan.patience} epochs: stopping early")
    return stuck


if __name__ == "__main__":
    sys.exit(main())
