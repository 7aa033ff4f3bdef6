"""The lengths of a recipe, in px, where another size or another network is asked for than the recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model import registry
from training.size import ImageSize, as_size


def fitted(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe sets, with lengths that suit what is given: they follow another --size.

    Another architecture brings its own size where the recipe starts from trained weights, or where it cannot take the
    recipe's; so do weights that were trained here. Images that the network cannot take are not trained on: ViT and
    Swin, for instance, take one size only.

    Raises:
        ValueError: no such architecture, or weights with a damaged spec.
    """
    values = dict(recipe)
    if "size" not in values:
        return values
    arch, own = given.get("arch", values["arch"]), as_size(values["size"])
    size = as_size(given["size"]) if given.get("size") else None
    weights = Path(given["weights"]) if given.get("weights") else None
    if is_other := arch != values["arch"] or registry.spec_beside(weights):
        registry.check_name(arch)
        values.pop("resize", None)  # the margin is the network's own
        if not size and (weights or values.get("pretrained") or not registry.can_build(arch, own)):
            rule = registry.own_rule(arch, weights)
            size = ImageSize(rule.height, rule.width)
            del values["size"]
    if size and "resize" in values:
        values["resize"] = round(values["resize"] * min(size) / min(own))
    if size and "train_size" in values:
        sides = zip(as_size(values["train_size"]), size, own, strict=True)
        values["train_size"] = ImageSize(*(round(side * new / old) for side, new, old in sides)).typed
    is_new = (size or is_other) and "train_size" in values and not given.get("train_size")
    if is_new and not registry.can_build(arch, size or own, as_size(values["train_size"])):
        del values["train_size"]
    return values
