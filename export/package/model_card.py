"""The model card: what the model is, how well it does, and where it ends, as Hugging Face's hub reads it.

model_card.md.j2 holds its words, this file its numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import yaml

from export import text_table
from predictor.files import write_text
from predictor.golden_check import FILE as GOLDEN
from predictor.spec import ModelSpec

CARD = "MODEL_CARD.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
LISTED = 50  # labels and classes named one by one before the rest is counted
WEAKEST = 3  # classes named as the ones most often missed
Z = 1.959964  # standard deviations on either side of the mean that hold 95% of a normal distribution

# The hub's names of the public data sets that `--data` takes; scikit-learn's digits have none.
HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}

SPLITS = ("train", "val", "test")
GOLDEN_KINDS = {
    "samples": "samples of the data, as the network sees them and without their metadata",
    "synthetic": "synthetic images, none of the data",
}


@dataclass(frozen=True)
class Facts:
    """What the card is made from. `metrics` and `config` are empty where the run has no such file."""

    name: str
    spec: ModelSpec
    metrics: Mapping[str, Any]
    config: Mapping[str, Any]
    parity: Mapping[str, Any]
    golden: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """The data's name, without the number of images."""
        return re.sub(r", [\d,]+ images$", "", self.spec.trained_on) or "data without a name"

    @property
    def test(self) -> Mapping[str, Any]:
        return self.metrics.get("test", {})


def write_card(run: Path, name: str, folder: Path) -> None:
    """Writes folder/MODEL_CARD.md from the run's spec.json, metrics.json and config.yaml, and from the folder's
    parity.json and golden.json.

    A run without metrics.json or config.yaml (weights from elsewhere) gets a card without what stands in them.

    Raises:
        ValueError: a file cannot be read, or lacks a field.
    """
    facts = Facts(
        name,
        ModelSpec.load(run),
        metrics=_read(run / "metrics.json", json.loads),
        config=_read(run / "config.yaml", yaml.safe_load),
        parity=_read(folder / "parity.json", json.loads),
        golden=_read(folder / GOLDEN, json.loads),
    )
    try:
        card = _template().render(_values(facts))
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise ValueError(
            f"{run}: metrics.json, config.yaml or export/parity.json is not as train.py and the export write it "
            f"({type(error).__name__}: {error}); re-run train.py, or fix the file"
        ) from None
    write_text(folder / CARD, card)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` trials (Wilson 1927); it stays within 0..1 near the ends."""
    centre = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def escape(text: Any) -> str:
    """`text` as one line of Markdown that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]()<>!|~&$:@])", r"\\\1", " ".join(str(text).split()))


def _header(facts: Facts) -> str:
    """The hub's metadata. No `license`: it depends on rights in the images, which no file of the run knows."""
    values: dict[str, Any] = {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "onnx", "torchscript", "torchserve", facts.spec.arch],
    }
    if dataset := HUB_DATASETS.get(facts.config.get("data", "")):
        values["datasets"] = [dataset]
    if facts.test:
        values["metrics"] = ["accuracy", "f1"]
        values["model-index"] = [{"name": facts.name, "results": [_result(facts)]}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _result(facts: Facts) -> dict[str, Any]:
    test = facts.test
    scores = [
        ("accuracy", "Accuracy", test["accuracy"]),
        *([("accuracy", "Top-5 accuracy", test["top5"])] if len(facts.spec.labels) > 5 else []),
        ("f1", "Macro F1", test["macro"]["f1"]),
        ("expected_calibration_error", "Expected calibration error", test["ece"]),
    ]
    return {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {
            "name": facts.data,
            "type": HUB_DATASETS.get(facts.config.get("data", ""), "imagefolder"),
            "split": "test",
        },
        "metrics": [{"type": kind, "value": value, "name": name} for kind, name, value in scores],
    }


def _template() -> jinja2.Template:
    """MODEL_CARD.md, as a function of `_values`. Text of the user's goes through the filter `md`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Markdown: `md` escapes, HTML's entities would be shown
    )
    environment.filters |= {"md": escape, "thousands": "{:,}".format, "percent": "{:.2%}".format, "numbers": _numbers}
    environment.globals["table"] = partial(text_table.markdown, escape=escape)
    return environment.get_template(TEMPLATE.name)


def _values(facts: Facts) -> dict[str, Any]:
    """What the template names. Tables are rows of cells; what a run does not have is empty."""
    spec, test, metrics = facts.spec, facts.test, facts.metrics
    return {
        **vars(facts),
        "header": _header(facts),
        "data": facts.data,
        "labels": list(enumerate(spec.labels[:LISTED])),
        "listed": LISTED,
        "test": test,
        "scores": _scores(test, len(spec.labels)) if test else [],
        "classes": _classes(test["per_class"]) if test else [],
        "splits": [(split, f"{metrics[split]['images']:,}") for split in SPLITS] if metrics else [],
        "settings": _settings(metrics["train"].get("options", {})) if metrics else [],
        "compared": [_parity_cells(row) for row in facts.parity.get("rows", [])],
        "smaller": [_smaller_cells(row) for row in facts.parity.get("reduced", [])],
        "golden_kinds": GOLDEN_KINDS,
        "interval": wilson(test["accuracy"], test["images"]) if test else (),
        "weakest": _weakest(test["per_class"]) if test else [],
        "unseen": [label for label, scores in test["per_class"].items() if not scores["images"]] if test else [],
    }


def _scores(test: Mapping[str, Any], labels: int) -> list[tuple[str, str]]:
    return [
        ("accuracy", f"{test['accuracy']:.2%}"),
        *([("top-5 accuracy", f"{test['top5']:.2%}")] if labels > 5 else []),
        ("macro F1", f"{test['macro']['f1']:.2%}"),
        ("expected calibration error, 15 bins", f"{test['ece']:.2%}"),
    ]


def _classes(per_class: Mapping[str, Any]) -> list[Sequence[Any]]:
    """A row for each class, unless there are too many to be read."""
    if len(per_class) > LISTED:
        return []
    return [
        (label, *(f"{scores[key]:.2%}" for key in ("precision", "recall", "f1")), scores["images"])
        for label, scores in per_class.items()
    ]


def _weakest(per_class: Mapping[str, Any]) -> list[tuple[float, str, int]]:
    """Recall, label and test images of the classes that are missed most."""
    seen = {label: scores for label, scores in per_class.items() if scores["images"]}
    return sorted((s["recall"], label, s["images"]) for label, s in seen.items() if s["recall"] < 1)[:WEAKEST]


def _smaller_cells(row: Mapping[str, Any]) -> Sequence[str]:
    low, high = row["interval"]
    verdict = "kept" if row["kept"] else "not written"
    return (
        *(row["file"], f"{row['images']:,}", f"{row['accuracy_fp32']:.2%}", f"{row['accuracy']:.2%}"),
        f"{row['loss_points']:+.2f} ({low:+.2f} to {high:+.2f})",
        "not measured" if row["speedup"] is None else f"×{row['speedup']:.2f}",
        f"{verdict}: {row['reason']}" if row["reason"] else verdict,
    )


def _read(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}); re-run train.py, or restore the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not named values; re-run train.py")
    return values


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _settings(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Those that train.py names in metrics.json as worth showing."""
    return [(key, _setting(key, value)) for key, value in options.items()]


def _setting(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "weights":
        return Path(value).name if value else "none"
    return "default" if value is None else str(value)


def _parity_cells(row: Mapping[str, Any]) -> Sequence[str]:
    if row.get("skipped"):
        return (row["graph"], row["runtime"], *[""] * 5, f"not run: {row['skipped']}")
    return (
        *(row["graph"], row["runtime"], row["version"], f"{row['images']:,}"),
        *(f"{row['max_difference']:.1e}", f"{row['tolerance']:.1e}"),
        "" if row["graph"] == "resize" else f"{row['top1_agreement']:.1%}",
        "ok" if row["passed"] else "FAILED",
    )
