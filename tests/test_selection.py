"""Which epoch is kept, and when there is no use in more of them, by each measure of --select."""

import pytest
from torch import nn

from tests.learning import make_plan
from training.early_stopping import is_out_of_patience
from training.selection import MEASURES, Best, is_better, snapshot

# Three epochs, each the best by another measure.
EPOCHS = [
    {"accuracy": 0.9, "loss": 0.6, "macro": {"f1": 0.5}},
    {"accuracy": 0.8, "loss": 0.5, "macro": {"f1": 0.7}},
    {"accuracy": 0.7, "loss": 0.4, "macro": {"f1": 0.6}},
]


@pytest.mark.parametrize("select", MEASURES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_the_epoch_that_is_kept_is_the_best_by_the_measure_that_was_named(select, order):
    best = Best()
    for epoch in order:
        if is_better(EPOCHS[epoch], best, select):
            best = snapshot(epoch + 1, EPOCHS[epoch], nn.Linear(1, 1))
    assert best.epoch == {"accuracy": 1, "macro-f1": 2, "loss": 3}[select]


def test_the_head_that_was_fitted_first_stays_the_best_until_an_epoch_beats_it():
    head = Best(epoch=0, accuracy=0.9, loss=0.4, macro_f1=0.9)
    worse, better = ({"accuracy": a, "loss": 0.4, "macro": {"f1": a}} for a in (0.8, 0.95))
    assert not is_better(worse, head, "accuracy")
    assert is_better(better, head, "accuracy")
    assert is_better(worse, Best(), "accuracy")


@pytest.mark.parametrize("select", MEASURES)
def test_the_first_epoch_is_better_than_none_however_bad(select):
    val = {"accuracy": 0.0, "loss": 99.0, "macro": {"f1": 0.0}}
    assert is_better(val, Best(), select)
    assert not is_better(val, snapshot(1, val, nn.Linear(1, 1)), select)


def test_with_equal_macro_f1_the_lower_loss_is_kept_and_with_equal_loss_the_higher_accuracy():
    best = Best(1, accuracy=0.8, loss=0.5, macro_f1=0.7)
    for select, accuracy, loss, better in (
        ("macro-f1", 0.1, 0.4, True),
        ("macro-f1", 0.9, 0.6, False),
        ("loss", 0.9, 0.5, True),
        ("loss", 0.7, 0.5, False),
    ):
        assert is_better({"accuracy": accuracy, "loss": loss, "macro": {"f1": 0.7}}, best, select) == better


@pytest.mark.parametrize(("select", "over"), [("accuracy", True), ("macro-f1", False), ("loss", True)])
def test_patience_counts_by_the_measure_that_was_named(select, over):
    columns = ("val_accuracy", "val_macro_f1", "val_loss")
    rows = [(0.9, 0.5, 0.1), (0.8, 0.4, 0.2), (0.8, 0.6, 0.3)]
    history = [dict(zip(columns, row, strict=True)) for row in rows]
    assert is_out_of_patience(history, make_plan(patience=2, select=select)) is over
    assert not is_out_of_patience(history[:2], make_plan(patience=2, select=select))
