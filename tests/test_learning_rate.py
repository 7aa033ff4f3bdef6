import pytest

from training.config import TrainConfig
from training.schedule import lr_factor


def config(**options):
    return TrainConfig(data="digits", out="x", **options)


def test_warmup_rises_to_the_peak_and_cosine_falls_to_zero():
    c = config(schedule="cosine", warmup=0.1)
    values = [lr_factor(c, i / 100, 0) for i in range(101)]
    assert values[0] > 0
    assert values[:11] == sorted(values[:11])
    assert values[10] == pytest.approx(1)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0, abs=1e-9)


def test_step_drops_by_gamma_every_step_size_epochs():
    c = config(schedule="step", warmup=0, step_size=3, gamma=0.1)
    assert [round(lr_factor(c, 0.5, epoch), 6) for epoch in range(7)] == [1, 1, 1, 0.1, 0.1, 0.1, 0.01]


def test_constant_stays():
    c = config(schedule="constant", warmup=0)
    assert {lr_factor(c, i / 10, i) for i in range(11)} == {1.0}


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
        config(**options)
