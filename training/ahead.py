"""What an epoch's coming batches need before their step, made while the network is at work on an earlier one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dataset.decoded_images import Split
from dataset.frames import BATCHES_AHEAD
from training.augmentation import Draws, random_boxes
from training.learner import Learner
from training.randomness import crop_generator
from training.resolve import Plan
from training.step import share_of


class Ahead:
    """Has the images of coming batches read, and their random crops cut out, before they are asked for."""

    def __init__(self, learner: Learner, split: Split, batches: Sequence[Tensor], plan: Plan, epoch: int) -> None:
        self._split, self._batches, self._plan, self._epoch = split, batches, plan, epoch
        self._reads = not learner.features

    def boxes(self, step: int) -> Tensor | None:
        """float32 (n, 4): the random crops of this process's share of a batch; None where there are none."""
        if not self._reads:
            return None
        indices = self._batches[step]
        return draw_boxes(self._split, indices, share_of(len(indices)), self._plan, self._epoch, step)

    def prepare(self, step: int) -> None:
        """Begins to read what is needed after this step."""
        if not self._reads:
            return
        if not (self._split.frames and self._plan.crop_scale):
            if step + 1 < len(self._batches):
                self._split.read_ahead(self._chosen(step + 1))
            return
        for coming in range(step + 1, min(step + 1 + BATCHES_AHEAD, len(self._batches))):
            boxes = self.boxes(coming)
            assert boxes is not None
            self._split.frames.prepare(self._split.rows[self._chosen(coming)], boxes, self._plan.train_size)

    def _chosen(self, step: int) -> Tensor:
        indices = self._batches[step]
        return indices[share_of(len(indices))]


def draw_boxes(split: Split, indices: Tensor, rows: Tensor, plan: Plan, epoch: int, step: int) -> Tensor | None:
    """The random crops of some rows of a batch, float32 (n, 4), as `Frames.crops` takes them; the same however early
    they are drawn. None without `plan.crop_scale`.

    Args:
        indices: int64 (B,), of the images in `split`; rows: int64 (n,), of the batch.
    """
    if not (split.frames and plan.crop_scale):
        return None
    draws = Draws(crop_generator(plan.seed, epoch, step), len(indices), rows)
    shape = plan.train_size.width / plan.train_size.height
    ratio = shape / plan.crop_ratio, shape * plan.crop_ratio
    return random_boxes(split.frames.shapes(split.rows[indices[rows]]), plan.crop_scale, ratio, draws)
