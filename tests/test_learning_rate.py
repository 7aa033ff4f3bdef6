import pytest
import torch

from tests.learning import make_plan
from training.options import TrainOptions
from training.schedule import Schedule, lr_factor


def test_warmup_rises_to_the_peak_and_cosine_falls_to_zero():
    plan = make_plan(schedule="cosine", warmup=0.1)
    values = [lr_factor(plan, i / 100, 0) for i in range(101)]
    assert values[0] > 0
    assert values[:11] == sorted(values[:11])
    assert values[10] == pytest.approx(1)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0, abs=1e-9)


def test_step_drops_by_gamma_every_step_size_epochs():
    plan = make_plan(schedule="step", warmup=0, step_size=3, gamma=0.1)
    assert [round(lr_factor(plan, 0.5, epoch), 6) for epoch in range(7)] == [1, 1, 1, 0.1, 0.1, 0.1, 0.01]


def test_constant_stays():
    plan = make_plan(schedule="constant", warmup=0)
    assert {lr_factor(plan, i / 10, i) for i in range(11)} == {1.0}


@pytest.mark.parametrize(
    ("options", "epochs", "seconds", "progress"),
    [
        ({}, 5, 9000, 0.5),  # of 10 epochs
        ({"epochs": 20}, 5, 9000, 0.25),
        ({"minutes": 2.0}, 500, 30, 0.25),
        ({"minutes": 2.0, "epochs": 20}, 5, 60, 0.5),  # a slow machine: the time decides
        ({"minutes": 2.0, "epochs": 20}, 15, 60, 0.75),  # a fast one
        ({"minutes": 2.0, "epochs": 20}, 21, 60, 1),
    ],
)
def test_a_run_ends_by_epochs_or_by_minutes_whichever_is_first(options, epochs, seconds, progress):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = Schedule(optimizer, make_plan(**options, schedule="linear", warmup=0), lambda: False)
    schedule.go_on_from(seconds)
    assert schedule.is_over(epochs) == (progress == 1)
    assert schedule.progress == pytest.approx(progress, abs=0.01)
    schedule.before_step(epochs, 0)
    assert schedule.lr == pytest.approx(1 - progress, abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "--epochs 0: must be from 1"),
        ({"lr": -1.0}, "--lr -1.0: must be above 0"),
        ({"minutes": 0.0}, "--minutes"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"val_fraction": 0.0}, "--val-fraction"),
        ({"optimizer": "lion"}, "must be one of adam, adamw, sgd"),
        ({"schedule": "straight"}, "must be one of cosine, linear, step, constant"),
        ({"jitter": float("nan")}, "--jitter"),
    ],
)
def test_an_option_out_of_its_rule_is_named_as_the_flag(options, words):
    with pytest.raises(ValueError, match=words):
        TrainOptions(data="digits", out="x", **options)
