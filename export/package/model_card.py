"""The model card: what the model is, how well it does, and where it ends, as Hugging Face's hub reads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from predictor.files import write_text
from predictor.golden_check import FILE as GOLDEN
from predictor.spec import ModelSpec

CARD = "MODEL_CARD.md"
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

SETTINGS = (
    *("optimizer", "lr", "weight_decay", "momentum", "batch_size", "label_smoothing", "schedule", "warmup"),
    *("flip", "crop_padding", "jitter", "pretrained", "weights", "freeze", "seed"),
)  # of config.yaml; its paths stay out of a file that is made to be published
# Named where they are not this.
OFF = {
    **{"unfreeze_at": 0, "mixup": 0, "cutmix": 0, "ema": 0, "low_res": 0, "clip_grad_norm": 0, "accumulate": 1},
    "amp": "off",
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
        parts = [part(facts) for part in PARTS]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run}: metrics.json, config.yaml or export/parity.json is not as train.py and the export write it "
            f"({type(error).__name__}: {error}); re-run train.py, or fix the file"
        ) from None
    write_text(folder / CARD, "\n\n".join(filter(None, parts)) + "\n")


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
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


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


def _introduction(facts: Facts) -> str:
    spec = facts.spec
    margin = "largest centred square" if spec.resize == spec.size else "centred square"
    side = "" if spec.resize == spec.size else f" of round(min(W, H) × {spec.size} / {spec.resize}) px"
    divided = "" if spec.temperature == 1 else f" divided by {spec.temperature:g}"
    return f"""# {escape(facts.name)}

An image classifier: `{spec.arch}` at {spec.size}×{spec.size} px, {len(spec.labels)} labels, trained on \
{escape(spec.trained_on or facts.data)}.

The pixel rule, inside `{facts.name}.pixels.onnx`, `{facts.name}.pt` and `{facts.name}.mar`: the \
{margin}{side} of an image of W×H px is resized to \
{spec.size}×{spec.size} px with Pillow's antialiased bilinear filter, divided by 255 and normalised with mean \
({_numbers(spec.mean)}) and std ({_numbers(spec.std)}), and the network's logits{divided} go through softmax."""


def _usage(facts: Facts) -> str:
    name = facts.name
    return f"""## How to use it

With ONNX Runtime, from an image of any size, upright and on white:

```python
import json, numpy, onnxruntime
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession("{name}.pixels.onnx")
upright = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGBA")
on_white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
(probabilities,) = session.run(["probabilities"], {{"images": numpy.asarray(on_white)[None]}})
print(json.loads(session.get_modelmeta().custom_metadata_map["spec"])["labels"][probabilities[0].argmax()])
```

With TorchServe, which writes the key that a request must carry into `key_file.json`:

```sh
torchserve --start --ncs --model-store . --models {name}={name}.mar
KEY=$(python -c 'import json; print(json.load(open("key_file.json"))["inference"]["key"])')
curl -H "Authorization: Bearer $KEY" http://127.0.0.1:8080/predictions/{name} -T image.jpg
```"""


def _labels(facts: Facts) -> str:
    labels = facts.spec.labels
    rest = len(labels) - LISTED
    more = f"\n\nand {rest:,} more, in `labels` of the spec that every file carries." if rest > 0 else ""
    return f"## Labels\n\n{_table(('output', 'label'), enumerate(labels[:LISTED]))}{more}"


def _metrics(facts: Facts) -> str:
    if not (test := facts.test):
        return ""
    rows = [
        ("accuracy", f"{test['accuracy']:.2%}"),
        *([("top-5 accuracy", f"{test['top5']:.2%}")] if len(facts.spec.labels) > 5 else []),
        ("macro F1", f"{test['macro']['f1']:.2%}"),
        ("expected calibration error, 15 bins", f"{test['ece']:.2%}"),
    ]
    text = f"## Metrics\n\nOn the {test['images']:,} images of the test split:\n\n{_table(('metric', 'value'), rows)}"
    if len(test["per_class"]) > LISTED:
        return text
    classes = [
        (label, f"{s['precision']:.2%}", f"{s['recall']:.2%}", f"{s['f1']:.2%}", s["images"])
        for label, s in test["per_class"].items()
    ]
    return f"{text}\n\n{_table(('class', 'precision', 'recall', 'F1', 'images'), classes)}"


def _data(facts: Facts) -> str:
    if not facts.metrics:
        return ""
    rows = [(split, f"{facts.metrics[split]['images']:,}") for split in ("train", "val", "test")]
    text = f"## Data\n\nTrained and tested on {escape(facts.data)}.\n\n{_table(('split', 'images'), rows)}"
    if not facts.config:
        return text
    val, test, seed = (facts.config[key] for key in ("val_fraction", "test_fraction", "split_seed"))
    return (
        f"{text}\n\nSplits that the data does not bring itself are cut by a hash of seed {seed}, class and file name: "
        f"about {val:.0%} for val, {test:.0%} for test."
    )


def _training(facts: Facts) -> str:
    if not facts.metrics:
        return ""
    train = facts.metrics["train"]
    text = (
        f"## Training\n\n{train['epochs']} epochs in {train['seconds']:,.0f} s on `{train['device']}`; the weights are "
        f"those of epoch {train['best_epoch']}, the best on val. {train['parameters']:,} parameters."
    )
    keys = [key for key in SETTINGS if key in facts.config]
    keys += [key for key, off in OFF.items() if facts.config.get(key, off) != off]
    rows = [(key, _setting(key, facts.config[key])) for key in keys]
    return f"{text}\n\n{_table(('setting', 'value'), rows)}" if rows else text


def _parity(facts: Facts) -> str:
    if not (rows := facts.parity.get("rows")):
        return ""
    head = ("graph", "runtime", "version", "images", "largest difference", "tolerance", "top-1 agreement", "verdict")
    return (
        f"## Parity\n\nEach file, reloaded, against {escape(facts.parity['reference'])} on real images. Differences "
        "are absolute: of a logit for the network, of a probability for crops and pixels, in grey levels for the "
        f"resize.\n\n{_table(head, map(_parity_cells, rows))}"
    )


def _smaller(facts: Facts) -> str:
    if not (rows := facts.parity.get("reduced")):
        return ""
    head = ("file", "test images", "accuracy of fp32", "its accuracy", "loss, points (95%)", "speed", "verdict")
    return f"## Smaller files\n\n{_table(head, map(_smaller_cells, rows))}"


def _smaller_cells(row: Mapping[str, Any]) -> Sequence[str]:
    low, high = row["interval"]
    verdict = "kept" if row["kept"] else "not written"
    return (
        *(row["file"], f"{row['images']:,}", f"{row['accuracy_fp32']:.2%}", f"{row['accuracy']:.2%}"),
        f"{row['loss_points']:+.2f} ({low:+.2f} to {high:+.2f})",
        "not measured" if row["speedup"] is None else f"×{row['speedup']:.2f}",
        f"{verdict}: {row['reason']}" if row["reason"] else verdict,
    )


def _archive(facts: Facts) -> str:
    """Which images go along, since whoever has the archive can look at them."""
    if not (images := facts.golden.get("images")):
        return ""
    kind = {
        "samples": "samples of the data, as the network sees them and without their metadata",
        "synthetic": "synthetic images, none of the data",
    }[facts.golden["source"]]
    return (
        f"## The archive's images\n\n`{facts.name}.mar` holds {len(images)} golden images, in `{GOLDEN}`, that a "
        f"worker must answer rightly before it serves: {kind}. (`--golden {facts.golden['source']}`)"
    )


def _limits(facts: Facts) -> str:
    spec = facts.spec
    limits = [
        f"It knows {len(spec.labels)} labels and no other. An image of anything else gets one of them all the same, "
        "often with a high probability: a high probability does not say that the image is of its kind.",
        f"Images of another kind than {escape(facts.data)} (camera, lighting, distance, drawing) were not measured.",
        f"It sees the centre of an image at {spec.size}×{spec.size} px: what lies at the ends of a long image, or "
        "is lost at that size, has no influence.",
        *(
            _measured_limits(facts.test)
            if facts.test
            else ["It comes without metrics: nothing here says how good it is."]
        ),
    ]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _measured_limits(test: Mapping[str, Any]) -> Iterable[str]:
    low, high = wilson(test["accuracy"], test["images"])
    yield (
        f"The accuracy of {test['accuracy']:.2%} comes from {test['images']:,} test images: its 95% interval "
        f"(Wilson) is {low:.2%} to {high:.2%}, for images of the same kind."
    )
    seen = {label: scores for label, scores in test["per_class"].items() if scores["images"]}
    weakest = sorted((s["recall"], label, s["images"]) for label, s in seen.items() if s["recall"] < 1)[:WEAKEST]
    if weakest:
        named = "; ".join(f"{escape(label)}, {recall:.2%} of {count:,}" for recall, label, count in weakest)
        yield f"The classes that it misses most often, by recall on the test split: {named}."
    if unseen := [label for label in test["per_class"] if label not in seen]:
        named = ", ".join(map(escape, unseen[:LISTED])) + (
            f" and {len(unseen) - LISTED:,} more" * (len(unseen) > LISTED)
        )
        yield f"No test image shows: {named}. Nothing is known about them."
    yield f"Its confidence differs from its accuracy by {test['ece']:.2%} on average (expected calibration error)."


def _provenance(facts: Facts) -> str:
    spec = facts.spec
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in spec.versions.items())
    pretrained = " and in the weights that it started from" if facts.config.get("pretrained") else ""
    return f"""## Provenance

- Weights (`model.pt`), SHA-256: `{spec.weights_sha256 or "not recorded"}`
- Trained with: {versions or "not recorded"}
- Exported, and compared, with: {escape(facts.parity.get("reference", "not recorded"))}
- Licence: none is stated, since it depends on the rights in the training images{pretrained}. Add `license` to the \
header before you publish."""


PARTS: tuple[Callable[[Facts], str], ...] = (
    *(_header, _introduction, _usage, _labels, _metrics),
    *(_data, _training, _parity, _smaller, _archive, _limits, _provenance),
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


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


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
