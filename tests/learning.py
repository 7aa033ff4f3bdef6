"""Training without a command or a run folder: a network, its plan and its schedule, for tests of each part."""

import contextlib
from dataclasses import replace
from unittest.mock import patch

import torch

from model import registry
from training.epoch import evaluate_val, make_row, shuffled, train_epoch
from training.freezing import prepare_backbone
from training.learner import make_learner
from training.options import TrainOptions
from training.resolve import resolve, resolve_reading
from training.resume_state import Progress, collect, restore
from training.schedule import Schedule
from training.step import make_batch, train_step


def first(split, count):
    """The first images of a split alone, which are quicker."""
    return replace(split, rows=split.rows[:count], targets=split.targets[:count], names=split.names[:count])


def make_plan(images=1293, flips=False, **options):
    """The plan of these options, for so many training images."""
    asked = TrainOptions(**{"data": "digits", "out": "x", "device": "cpu"} | options)
    return resolve(asked, resolve_reading(asked), images=images, flips=flips, device=torch.device(asked.device))


@contextlib.contextmanager
def before_step(step, do):
    """Calls `do` before that step of the runs in the block, from 0, counted over all their epochs."""
    real, steps = Schedule.before_step, []

    def counted(self, *arguments):
        steps.append(None)
        if len(steps) == step + 1:
            do()
        return real(self, *arguments)

    with patch.object(Schedule, "before_step", counted):
        yield


class Training:
    """What `train.py` puts together before its loop, and the parts of the loop one by one."""

    def __init__(self, data, network=None, **options):
        self.data, self.plan = data, make_plan(len(data.train), **options)
        torch.manual_seed(0)
        network = network or registry.build(self.plan.arch, len(data.labels), *self.plan.size)
        self.scale = tuple(torch.full((3,), value, device=self.plan.device) for value in (0.5, 0.25))
        self.learner = make_learner(network.to(self.plan.device), self.scale, self.plan, data.train.targets)
        self.schedule = Schedule(self.learner.optimizer, self.plan, lambda: False)
        self.progress, self.generator = Progress(), torch.Generator().manual_seed(0)

    @property
    def network(self):
        return self.learner.network

    def batches(self):
        return shuffled(self.generator, self.data.train.targets, self.plan)

    def step(self, indices):
        batch = make_batch(self.learner, self.data.train, indices, self.plan, self.generator)
        return train_step(self.learner, batch, self.plan)

    def epoch(self, on_save=lambda begun: None):
        """`on_save`: as `train_epoch`."""
        done, begun, self.progress.begun = self.progress.epochs, self.progress.begun, None
        prepare_backbone(self.learner, self.data, self.plan, self.schedule, done)
        given = {"begun": begun, "on_save": on_save}
        trained = train_epoch(self.learner, self.data.train, self.plan, self.schedule, done, **given)
        val = {"loss": 0.0, "accuracy": 0.0, "macro": {"f1": 0.0}}
        row = make_row(self.progress.history, trained, val, self.schedule)
        self.progress.history.append(row)
        return trained

    def evaluate(self):
        return evaluate_val(self.learner, self.data, self.plan)

    def state(self, begun=None):
        return collect(self.learner, self.schedule, self.progress, self.data, begun)

    def restore(self, path):
        self.progress = restore(path, self.learner, self.schedule, self.data)
