"""When there is no use in more epochs."""

from __future__ import annotations

from collections.abc import Sequence

from training.resolve import Plan

_COLUMNS = {"accuracy": "val_accuracy", "macro-f1": "val_macro_f1"}  # of the history


def is_out_of_patience(history: Sequence[dict[str, float]], plan: Plan) -> bool:
    """Whether the measure of `plan.select` has not improved for `plan.patience` epochs.

    With accuracy or macro F1, a lower loss alone is no gain.

    What is yet to come counts: a backbone that is frozen still.

    Args:
        history: a row for each epoch, as in history.csv.
    """
    if not plan.patience:
        return False
    values = [-row["val_loss"] if plan.select == "loss" else row[_COLUMNS[plan.select]] for row in history]
    gain = values.index(max(values)) + 1  # the last epoch with one
    return len(history) - max(gain, plan.unfreeze_at) >= plan.patience
