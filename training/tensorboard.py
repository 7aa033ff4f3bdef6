"""The history as TensorBoard events, where `tensorboard` is installed; nothing elsewhere."""

from __future__ import annotations

import math
from pathlib import Path


class Board:
    """Writes each epoch's row of the history. A resumed run takes the place of what was written after `epoch`."""

    def __init__(self, folder: Path, epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
            return
        self._writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def write(self, row: dict[str, float]) -> None:
        if self._writer is None:
            return
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, math.ceil(row["epoch"]))
        self._writer.flush()
