"""One step, one epoch, and everything that changes while a network learns, so that a killed run can go on from it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dataset.image_store import Data, on_device
from model import checkpoint, registry
from model.checkpoint import CheckpointError, load_into
from model.registry import train_mode
from model.tensor_preprocessing import normalise
from training import distributed
from training.amp import amp_dtype
from training.augmentation import Draws, Mix, draw_mix, flip_and_shift, jitter, shrink
from training.batchnorm import estimate_statistics, slow_norms
from training.config import TrainConfig
from training.ema import Ema
from training.evaluation import evaluate
from training.features import Features, compute_features
from training.optimizer import BACKBONE_RATE, make_optimizer
from training.schedule import Schedule

STATE_VERSION = 3  # of last.ckpt, and of what the options mean
STEPS_A_LOOK = 50  # between two looks at the loss: reading it waits for the device
SECONDS_A_LOOK = 10  # after which one process alone looks before that


class Diverged(RuntimeError):
    """The loss is no number any more. The message has the step and the learning rate."""


class OutOfMemory(RuntimeError):
    """The GPU's memory is too small. The message has the batch size and one that fits."""


class Trainer:
    """A network, its data, and what changes while it learns; `state` and `restore` carry all of that over a kill.

    network: the weights that are trained; `averaged` is what is evaluated and kept: their EMA if there is one.
    features: what the head sees of the images, while that is all that learns; else None. The time that they took
        is no part of the schedule's.
    history: a row for each completed epoch, as in history.csv.
    best: the best epoch so far: its number, val accuracy and loss, and state_dict.
    """

    _learner: Callable[[Tensor], Tensor]  # what a batch goes through in training
    _ddp: DistributedDataParallel | None

    def __init__(
        self,
        network: nn.Module,
        data: Data,
        config: TrainConfig,
        scale: tuple[Tensor, Tensor],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            scale: mean and std, each (3,), on the network's device.
            interrupted: asked before each step; once true, the run ends there.

        Raises:
            ValueError: the device or the number of images does not suit the options.
        """
        self.network, self.config, self.scale = network, config, scale
        self.device = scale[0].device
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        self.data = on_device(data, self.device, free)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy": -1.0, "loss": 0.0}
        self._batch = config.batch_size or 64
        self._check_parts()
        self._dtype = amp_dtype(config.amp, self.device)
        if config.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._frozen = registry.freeze_backbone(network) if config.freeze else []
        self.features: Features | None = None
        self.features_seconds = 0.0
        self._cache_wanted = config.cache_features
        self.ema = Ema(network, config.ema) if config.ema else None
        self.optimizer = make_optimizer(network, config, self._frozen if config.unfreeze_at else ())
        self._slow_norms = slow_norms(network)
        self.schedule = Schedule(self.optimizer, config, interrupted)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._dtype is torch.float16)
        self.generator = torch.Generator().manual_seed(config.seed)  # of the order and the augmentation
        self._seen, self._seconds = 0, 0.0
        self._learn(network, config.compile)

    @property
    def images_per_second(self) -> float:
        """Of training alone, without evaluation; since the run began or went on."""
        return self._seen / max(self._seconds, 1e-9)

    @property
    def averaged(self) -> nn.Module:
        return self.ema.network if self.ema else self.network

    def train_one_epoch(self, on_step: Callable[[float, int], None] = lambda loss, seen: None) -> dict[str, float]:
        """Trains on every image once, in a new order; ends earlier where the schedule says that the run is over.

        Args:
            on_step: called after each step with a recent loss and the images seen, to show progress.

        Returns:
            "loss" (mean, nats) and "accuracy" (0..1) over the images seen, augmented as they were; "steps", and
            the "share" of the epoch's that they are, 0..1.

        Raises:
            Diverged: the loss became infinite or no number.
        """
        self._freeze_or_thaw()
        started = time.perf_counter()
        train_mode(self.network)
        batches = self._batches()
        losses = torch.zeros(len(batches), device=self.device)  # of this process's share of each batch
        correct = torch.zeros((), device=self.device)
        rates: list[float] = []
        shown, looked, count = math.nan, started, 0
        for step, places in enumerate(batches):
            if not self.schedule.before_step(len(self.history), step / len(batches)):
                break
            losses[step], right = self.step(places, batches[step + 1] if step + 1 < len(batches) else None)
            correct += right
            rates.append(self.schedule.lr)
            count += len(places)
            now = time.perf_counter()
            slow = distributed.world() == 1 and now - looked >= SECONDS_A_LOOK  # several would have to agree on it
            if step % STEPS_A_LOOK == 0 or slow:
                shown, looked = self._check(losses, rates)[step], now
            on_step(shown, count)
        values = self._check(losses, rates)
        seen = [len(places) for places in batches[: len(rates)]]
        self._seen, self._seconds = self._seen + sum(seen), self._seconds + time.perf_counter() - started
        return {
            "loss": sum(value * count for value, count in zip(values, seen, strict=True)) / max(sum(seen), 1),
            "accuracy": float(distributed.total(correct)) / max(sum(seen), 1),
            "steps": len(rates),
            "share": len(rates) / len(batches),
        }

    def step(self, places: Tensor, coming: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of the optimizer on a batch; this process takes its share of it, in `accumulate` parts.

        The gradient is that of the mean loss over the whole batch, however it is cut.

        Args:
            places: int64 (B,), of the images in the train split; the same in every process.
            coming: those of the next step, which can be read meanwhile.

        Returns:
            Loss and right answers of the share; the losses of all shares add up to the batch's mean loss.
        """
        config, batch = self.config, len(places)
        rows = _own_rows(batch)
        draws = Draws(self.generator, batch, rows)
        inputs, mix = self._inputs(places[rows], draws)
        if coming is not None and not self.features:
            self.data.train.read_ahead(coming[_own_rows(len(coming))])
        targets = self.data.train.targets[places[rows]].to(self.device)
        losses = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for i in range(config.accumulate):
            part = distributed.cut(len(inputs) - 1, i, config.accumulate)
            part = slice(part.start, part.stop + 1)  # with the neighbour in front
            waits = self._ddp is not None and i < config.accumulate - 1  # only the last part sums over the processes
            with self._ddp.no_sync() if self._ddp and waits else contextlib.nullcontext():
                loss, right = self._forward(inputs[part], targets[part], mix)
                loss = loss / batch
                # DistributedDataParallel takes the mean of the gradients, where the sum is wanted.
                self.scaler.scale(loss * distributed.world()).backward()
            losses += loss.detach()
            correct += right
        if config.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.network)
        return losses, correct

    def estimate_statistics(self) -> None:
        """Brings BatchNorm's statistics up to the weights before they are evaluated, where they would lag behind."""
        if self._slow_norms:
            batch = max(2, self._largest_part())
            estimate_statistics(self.averaged, self._slow_norms, self.data.train, self.scale, batch)

    def evaluate(self) -> Tensor:
        """Logits of the val split: float32 (M, C), on the CPU."""
        if not self.features:
            return evaluate(self.averaged, self.data.val, *self.scale)
        with torch.inference_mode():
            return _head(self.averaged)(self.features.val.to(self.device)).cpu()

    def state(self) -> dict[str, Any]:
        """What last.ckpt holds: with it and the same data, `restore` goes on as if nothing had happened.

        Every process must call it, since each has random states of its own.
        """
        return {
            "version": STATE_VERSION,
            "epoch": len(self.history),
            "seconds": self.schedule.seconds,
            "network": self.network.state_dict(),
            "ema": {"network": self.ema.network.state_dict(), "steps": self.ema.steps} if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "random": distributed.gather(_random_states(self.device)),
            "best": self.best,
            "history": self.history,
            "labels": self.data.labels,
            "images": self._fingerprint(),
        }

    def restore(self, path: Path) -> None:
        """Goes on from last.ckpt.

        Raises:
            CheckpointError: the file cannot be used, or is of other classes.
        """
        state = checkpoint.load(path)
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(f"{path}: written by another version of train.py; start the run anew")
        if state["labels"] != self.data.labels:
            raise CheckpointError(
                f"{path}: {_differences(state['labels'], self.data.labels)}; give the run's own --data"
            )
        if state["images"] != self._fingerprint():
            print("the images are not those that the run began with: it goes on with the new ones")
        load_into(self.network, state["network"])
        if self.ema:
            load_into(self.ema.network, state["ema"]["network"])
            self.ema.steps = state["ema"]["steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        if distributed.rank() < len(state["random"]):  # else: more processes than before
            _set_random_states(state["random"][distributed.rank()], self.device)
        self.schedule.go_on_from(state["seconds"])
        self.best, self.history = state["best"], state["history"]

    def part_that_fits(self) -> int:
        """How many images at a time the memory has room for, by trying ever smaller parts; 0 for not even 2."""
        # without the other processes, which may wait
        self._learner, self.features, part = self.network, None, self._largest_part()
        self.schedule.progress = 1.0  # with images of their full size
        while part > 3:
            part //= 2
            try:
                crops = torch.zeros(part + 1, self.config.size or 0, self.config.size or 0, 3, dtype=torch.uint8)
                targets = torch.zeros(part + 1, dtype=torch.int64)
                self._forward(crops.to(self.device), targets.to(self.device), None)[0].backward()
                return part
            except torch.OutOfMemoryError:
                continue
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
        return 0

    def out_of_memory(self) -> str:
        """What to do about it, in one line."""
        batch, part, fits = self._batch, self._largest_part(), self.part_that_fits()
        if not fits:
            return f"{self.device}: out of memory with --batch-size {batch}, even with 2 images; pass a smaller --size"
        total = fits * distributed.world()
        return (
            f"{self.device}: out of memory with --batch-size {batch}, {part} images at a time; {fits} fit: pass "
            f"--accumulate {-(-batch // total)}, which learns the same (but for BatchNorm), or --batch-size {total}"
        )

    def _learn(self, module: nn.Module, compiled: bool = False) -> None:
        """From now on a batch goes through `module`, which is self.network or its head."""
        self._ddp = None
        if distributed.world() > 1:
            gpus = [self.device.index] if self.device.index is not None else None
            self._ddp = DistributedDataParallel(module, gpus)
        self._learner = self._ddp or module
        if compiled:
            self._learner = torch.compile(self._learner)

    def _freeze_or_thaw(self) -> None:
        """Sees to it, before an epoch, that a frozen backbone's features are there, or that it learns again."""
        config = self.config
        if self._frozen and config.unfreeze_at and len(self.history) >= config.unfreeze_at:
            print(f"the backbone learns too from here, at {BACKBONE_RATE:g} times the learning rate", flush=True)
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self._frozen, self.features = [], None
            self._slow_norms = slow_norms(self.network)
            self._learn(self.network, config.compile)
        elif self._frozen and self._cache_wanted:
            self._cache_wanted, started = False, time.perf_counter()
            found = compute_features(self.network, self.data, self.scale, bool(config.flip))
            if isinstance(found, str):
                print(f"the backbone sees all images in each epoch: {found}", flush=True)
                return
            self.features, self.features_seconds = found, time.perf_counter() - started
            self.schedule.go_on_from(self.schedule.seconds - self.features_seconds)
            views = "images and mirror images" if config.flip else "images"
            print(f"features of the {views} computed in {self.features_seconds:.1f} s", flush=True)
            self._learn(_head(self.network))

    def _inputs(self, places: Tensor, draws: Draws) -> tuple[Tensor, Mix | None]:
        """What `_forward` takes: the images at `places`, augmented, uint8 (n, S, S, 3), and how to mix them; or
        their features, float32 (n, D)."""
        config = self.config
        if self.features:
            return self.features.choose(places, draws).to(self.device), None
        crops = self.data.train.crops(places).to(self.device)
        crops = flip_and_shift(crops, bool(config.flip), config.crop_padding or 0, draws)
        crops = jitter(crops, config.jitter, draws)
        return crops, draw_mix(config.mixup, config.cutmix, crops.shape[1], self.generator)

    def _forward(self, inputs: Tensor, targets: Tensor, mix: Mix | None) -> tuple[Tensor, Tensor]:
        """Summed loss and right answers of n images, given n + 1: the first is only the second's neighbour."""
        own, wanted = inputs[1:], [(1.0, targets[1:])]
        if not self.features:
            own = normalise(own, *self.scale)
        if mix:
            own = mix(own, normalise(inputs[:-1], *self.scale))
            wanted = [(mix.kept, targets[1:]), (1 - mix.kept, targets[:-1])]
        if not self.features and self.schedule.progress < self.config.low_res:
            own = shrink(own)
        if self.config.channels_last and not self.features:
            own = own.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            logits = self._learner(own)
        answers = logits.detach().argmax(dim=1)
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for weight, labels in wanted:
            smoothing = self.config.label_smoothing
            loss = loss + weight * cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="sum")
            correct = correct + weight * (answers == labels).sum()
        return loss, correct

    def _batches(self) -> tuple[Tensor, ...]:
        """Places in the train split, in a new order, by batches. A last batch too small to be cut is left out."""
        order = torch.randperm(len(self.data.train), generator=self.generator)
        batches = order.split(self._batch)
        if len(batches) > 1 and len(batches[-1]) < 2 * self._parts():  # BatchNorm has no variance of one image
            batches = batches[:-1]
        return batches

    def _check(self, losses: Tensor, rates: list[float]) -> list[float]:
        """The loss of each step so far, one for each of `rates`, over all processes.

        Raises:
            Diverged: one of them is no number.
        """
        values: list[float] = distributed.total(losses[: len(rates)]).tolist()
        for step, value in enumerate(values):
            if not abs(value) < float("inf"):
                raise Diverged(
                    f"the loss is {value} at step {step + 1} of {len(losses)} in epoch {len(self.history) + 1}, "
                    f"at a learning rate of {rates[step]:.2g}"
                )
        return values

    def _parts(self) -> int:
        """In how many parts a batch is cut."""
        return distributed.world() * self.config.accumulate

    def _largest_part(self) -> int:
        return -(-min(self._batch, len(self.data.train)) // self._parts())

    def _check_parts(self) -> None:
        smallest = min(self._batch, len(self.data.train))
        if self._parts() > 1 and smallest < 2 * self._parts():
            raise ValueError(
                f"--batch-size {smallest}: must be at least {2 * self._parts()}, 2 images for each of "
                f"{distributed.world()} processes × {self.config.accumulate} --accumulate"
            )

    def _fingerprint(self) -> str:
        names = "\n".join((*self.data.train.names, "", *self.data.val.names))
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def _own_rows(batch: int) -> Tensor:
    """This process's places in a batch, int64, and one more in front: the first one's neighbour."""
    share = distributed.share(batch)
    return torch.arange(share.start - 1, share.stop) % batch


def _head(network: nn.Module) -> nn.Module:
    return network.get_submodule(registry.head_name(network))


def _random_states(device: torch.device) -> dict[str, Any]:
    """The generators that dropout draws from."""
    return {"cpu": torch.get_rng_state(), "gpu": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and states["gpu"] is not None:
        torch.cuda.set_rng_state(states["gpu"], device)


def _differences(before: list[str], now: list[str]) -> str:
    """How two lists of classes differ, class by class."""
    parts = []
    if gone := [label for label in before if label not in now]:
        parts.append(f"the run has {', '.join(map(repr, gone))}, which the data has not")
    if new := [label for label in now if label not in before]:
        parts.append(f"the data has {', '.join(map(repr, new))}, which the run has not")
    return "; ".join(parts) or f"the run's classes are in the order {', '.join(before)}, the data's in another"
