import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from export.package.model_card import CARD, escape, wilson, write_card
from predictor.spec import ModelSpec

ODD = ("a|b", "*x*", "日本", "yes", '"q"', "<b>", "`c`", "[l](u)", "\\|", "\\(m\\)", "_u_", "&amp;", "1. one", "null")


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def cells(text):
    """The tables' cells as a reader sees them. Whatever is not plain text, such as emphasis, is a failure."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found = []
    for before, token in pairwise(tokens):
        if before.type == "td_open":
            assert {child.type for child in token.children} <= {"text"}, token.content
            found.append("".join(child.content for child in token.children))
    return found


@pytest.fixture
def copy(run, exported, tmp_path):
    """A run of its own, with the files that a card is made from."""
    folder = tmp_path / "digits"
    (folder / "export").mkdir(parents=True)
    for name in ("spec.json", "metrics.json", "config.yaml"):
        shutil.copy(run / name, folder)
    for name in ("parity.json", "golden.json"):
        shutil.copy(exported / name, folder / "export")
    return folder


@pytest.fixture
def card(copy):
    """A function that writes the card of the copy, as it is now, and gives its text."""

    def write(name="digits"):
        write_card(copy, name, copy / "export")
        return (copy / "export" / CARD).read_text(encoding="utf-8")

    return write


def change(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values, ensure_ascii=False), encoding="utf-8")


def with_labels(copy, labels):
    """The run as if it had been trained on these labels, with one wrong image of each but the first."""
    change(copy / "spec.json", labels=list(labels))
    metrics = json.loads((copy / "metrics.json").read_text())
    scores = {"precision": 1.0, "recall": 0.9, "f1": 0.95, "images": 10}
    test = metrics["test"] | {"per_class": {label: dict(scores) for label in labels}}
    test["per_class"][labels[0]]["recall"] = 1.0
    change(copy / "metrics.json", test=test)


def test_the_header_is_what_the_hub_asks_for_and_carries_the_metrics(card, run):
    values = header(card())
    test = json.loads((run / "metrics.json").read_text())["test"]
    assert (values["library_name"], values["pipeline_tag"]) == ("pytorch", "image-classification")
    assert "license" not in values
    assert "datasets" not in values  # the hub has none of scikit-learn's digits
    (entry,) = values["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "digits"
    assert result["task"]["type"] == "image-classification"
    assert (result["dataset"]["name"], result["dataset"]["split"]) == ("digits", "test")
    assert {(m["type"], m["name"]): m["value"] for m in result["metrics"]} == {
        ("accuracy", "Accuracy"): test["accuracy"],
        ("accuracy", "Top-5 accuracy"): test["top5"],
        ("f1", "Macro F1"): test["macro"]["f1"],
        ("expected_calibration_error", "Expected calibration error"): test["ece"],
    }


def test_the_text_carries_the_numbers_of_the_run(card, run):
    text = card()
    metrics = json.loads((run / "metrics.json").read_text())
    for value in (metrics["test"]["accuracy"], metrics["test"]["macro"]["f1"], metrics["test"]["ece"]):
        assert f"| {value:.2%} |" in text
    for split in ("train", "val", "test"):
        assert f"| {split} | {metrics[split]['images']:,} |" in text
    for label, scores in metrics["test"]["per_class"].items():
        assert f"| {label} | {scores['precision']:.2%} | {scores['recall']:.2%} | {scores['f1']:.2%} |" in text
    assert f"{metrics['train']['parameters']:,} parameters" in text
    assert ModelSpec.load(run).weights_sha256 in text


def test_the_limits_give_the_interval_of_the_accuracy_and_name_the_classes_that_are_missed_most(card, copy):
    test = json.loads((copy / "metrics.json").read_text())["test"]
    for label, scores in test["per_class"].items():
        scores["recall"] = {"4": 0.5, "7": 0.25}.get(label, 1.0)
    test["per_class"]["3"]["images"] = 0
    change(copy / "metrics.json", test=test | {"accuracy": 0.9, "images": 100})
    limits = card().split("## Limits")[1]
    assert "82.56% to 94.48%" in limits
    missed = next(line for line in limits.splitlines() if "misses most often" in line)
    assert re.findall(r"(\d), (\d+\.\d\d%) of", missed) == [("7", "25.00%"), ("4", "50.00%")]
    assert "No test image shows: 3." in limits


def test_the_interval_is_wilsons():
    """The values that a statistics table gives for 5 of 10, 0 of 10 and 10 of 10."""
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_python_in_the_card_works_beside_the_files(card, exported, run, label, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", card(), flags=re.DOTALL)
    shutil.copy(exported / "digits.pixels.onnx", tmp_path)
    shutil.copy(run / "samples" / "7-0.png", tmp_path / "image.jpg")  # Pillow looks at the content
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == label, done.stderr


@pytest.mark.parametrize(("source", "words"), [("samples", "samples of the data"), ("synthetic", "none of the data")])
def test_the_card_says_which_images_the_archive_holds(card, copy, source, words):
    change(copy / "export" / "golden.json", source=source)
    section = card().split("## The archive's images")[1].split("##")[0]
    assert "holds 8 golden images" in section
    assert words in section


def test_every_row_of_the_parity_report_is_in_the_card_and_a_skipped_one_says_why(card, copy):
    report = json.loads((copy / "export" / "parity.json").read_text())
    skipped = {"graph": "network", "runtime": "TensorRT", "passed": False, "skipped": "no GPU here", "unknown": 1}
    change(copy / "export" / "parity.json", rows=[*report["rows"], skipped], reduced=[])
    section = card().split("## Parity")[1].split("##")[0]
    for row in report["rows"]:
        assert f"| {row['graph']} | {row['runtime']} | {row['version']} |" in section
    assert section.count("| ok |") == len(report["rows"])
    assert cells(section)[-1] == "not run: no GPU here"


def test_smaller_files_are_in_the_card_with_what_they_cost_and_those_that_were_not_kept(card, copy):
    row = {"file": "digits.crops.int8.onnx", "images": 360, "accuracy_fp32": 0.98, "accuracy": 0.975, "kept": True}
    row |= {"loss_points": 0.5, "interval": [-0.25, 1.25]}
    rows = [{**row, "speedup": 3.21, "reason": ""}, {**row, "kept": False, "speedup": None, "reason": "too slow"}]
    change(copy / "export" / "parity.json", reduced=rows)
    section = card().split("## Smaller files")[1].split("##")[0]
    assert cells(section)[2:7] == ["98.00%", "97.50%", "+0.50 (-0.25 to +1.25)", "×3.21", "kept"]
    assert cells(section)[-2:] == ["not measured", "not written: too slow"]


def test_odd_labels_are_shown_as_they_are(card, copy):
    with_labels(copy, ODD)
    text = card()
    found = cells(text)
    for place, label in enumerate(ODD):
        assert found[2 * place : 2 * place + 2] == [str(place), label]
        assert found.count(label) >= 2  # in the table of classes too
    assert header(text)["model-index"][0]["name"] == "digits"


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1).filter(str.strip))
def test_any_printable_text_survives_markdown(label):
    found = cells(f"| {escape('head')} |\n| --- |\n| {escape(label)} |")
    assert found == [" ".join(label.split())]


@pytest.mark.parametrize("name", ["yes", "1.0", "null", "a-b_c.d"])
def test_names_that_yaml_would_take_for_something_else_stay_names(card, name):
    assert header(card(name))["model-index"][0]["name"] == name


def test_a_data_set_with_an_odd_name_keeps_it(card, copy):
    change(copy / "spec.json", trained_on='"q": *x* # ü, 1,295 images')
    assert header(card())["model-index"][0]["results"][0]["dataset"]["name"] == '"q": *x* # ü'


def test_a_public_data_set_is_named_as_the_hub_names_it(card, copy):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"data": "cifar10"}))
    values = header(card())
    assert values["datasets"] == ["uoft-cs/cifar10"]
    assert values["model-index"][0]["results"][0]["dataset"]["type"] == "uoft-cs/cifar10"


def test_paths_of_the_machine_that_trained_stay_there(card, copy):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    private = {"data": "/home/ann/secret/cats", "out": "/home/ann/runs/cats", "weights": "/home/ann/resnet.pt"}
    (copy / "config.yaml").write_text(yaml.safe_dump(config | private))
    with_options(copy, weights=private["weights"])
    text = card()
    assert "/home" not in text
    assert "resnet.pt" in text


def with_options(copy, **options):
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["train"]["options"] |= options
    (copy / "metrics.json").write_text(json.dumps(metrics))


def test_the_options_that_the_run_names_are_listed(card, copy):
    text = card()
    assert "| optimizer | adamw |" in text
    assert "| pretrained | no |" in text
    assert "cutmix" not in text  # it was off
    with_options(copy, cutmix=1.0, accumulate=4)
    text = card()
    assert "| cutmix | 1" in text
    assert "| accumulate | 4 |" in text
    assert "| mixup |" not in text


def test_of_many_labels_the_first_are_named_and_the_rest_counted(card, copy):
    labels = [f"class {i}" for i in range(1000)]
    with_labels(copy, labels)
    text = card()
    assert "| 49 | class 49 |" in text
    assert "class 50 " not in text.split("## Limits")[0]
    assert "and 950 more" in text
    assert "| precision |" not in text


def test_with_five_labels_or_fewer_top_5_says_nothing_and_is_left_out(card, copy):
    with_labels(copy, ["a", "b"])
    assert "top-5" not in card().lower()


def test_weights_from_elsewhere_get_a_card_without_metrics(card, copy):
    (copy / "metrics.json").unlink()
    (copy / "config.yaml").unlink()
    text = card()
    assert "model-index" not in header(text)
    assert "without metrics" in text
    assert "## Training" not in text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.json", "{", r"metrics\.json: cannot be read"),
        ("metrics.json", "[]", r"metrics\.json: holds a list"),
        ("metrics.json", '{"test": {}}', "not as train.py and the export write it"),
        ("config.yaml", "a: [", r"config\.yaml: cannot be read"),
        ("spec.json", "{}", r"spec\.json: field 'arch' is missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line_and_leaves_no_card(card, copy, file, content, words):
    (copy / file).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        card()
    assert "\n" not in str(caught.value)
    assert not (copy / "export" / CARD).exists()
