import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.spec import SPEC_VERSION, ModelSpec, SpecError

GOOD = {
    "arch": "simplecnn",
    "labels": ["cat", "dog"],
    "size": 32,
    "resize": 36,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "spec_version": SPEC_VERSION,
}

text = st.text(st.characters(min_codepoint=32, exclude_categories=("C", "Z")), min_size=1, max_size=12)
number = st.floats(-4, 4)
specs = st.builds(
    ModelSpec,
    arch=text,
    labels=st.lists(text, min_size=2, max_size=6, unique=True).map(tuple),
    size=st.integers(1, 512),
    resize=st.integers(512, 600),
    mean=st.tuples(number, number, number),
    std=st.tuples(*[st.floats(1e-3, 4)] * 3),
    temperature=st.floats(0.01, 100),
    trained_on=st.text(max_size=20),
    metrics=st.dictionaries(text, number, max_size=3),
    weights_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    versions=st.dictionaries(text, text, max_size=3),
)


@given(specs)
def test_a_spec_survives_the_round_trip_through_json(spec):
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_a_spec_survives_the_round_trip_through_a_file(tmp_path):
    spec = ModelSpec(**GOOD)
    spec.save(tmp_path / "spec.json")
    assert ModelSpec.load(tmp_path) == ModelSpec.load(tmp_path / "spec.json") == spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": ["cat", "cat"]}, ["'labels'", "'cat' twice", "rename"]),
        ({"labels": ["cat"]}, ["'labels'", "at least 2"]),
        ({"labels": ["cat", " "]}, ["'labels'", "not blank"]),
        ({"labels": ["cat", "do\ng"]}, ["'labels'", "printable"]),
        ({"labels": 7}, ["int"]),
        ({"size": 0}, ["'size'", "from 1 to 4096"]),
        ({"size": True}, ["'size'"]),
        ({"size": "32"}, ["'size'", "whole number"]),
        ({"resize": 31}, ["'resize'", "from 32"]),
        ({"mean": [0, 0]}, ["'mean'", "three numbers"]),
        ({"std": [1, 1, 0]}, ["'std'", "above 0"]),
        ({"std": [1, 1, float("nan")]}, ["'std'", "three numbers"]),
        ({"temperature": 0}, ["'temperature'", "above 0"]),
        ({"metrics": {"accuracy": "good"}}, ["'metrics'", "finite numbers"]),
        ({"weights_sha256": "abc"}, ["'weights_sha256'", "64"]),
        ({"versions": {"torch": 2}}, ["'versions'", "texts"]),
        ({"colour": 1}, ["unknown field 'colour'", "known are"]),
        ({"arch": ""}, ["'arch'"]),
        ({"spec_version": SPEC_VERSION + 1}, ["'spec_version'", "reads up to", "newer"]),
        ({"spec_version": 0}, ["'spec_version'"]),
    ],
)
def test_a_broken_rule_is_named_with_file_field_and_fix(tmp_path, change, words):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(SpecError) as caught:
        ModelSpec.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("field", ["arch", "labels", "size", "spec_version"])
def test_a_missing_field_is_named(field):
    with pytest.raises(SpecError, match=f"'{field}' is missing"):
        ModelSpec.from_json(json.dumps({k: v for k, v in GOOD.items() if k != field}))


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(SpecError, match=r"runs/x/spec\.json"):
        ModelSpec.from_json(text, source="runs/x/spec.json")


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(SpecError, match=r"no such file.*train\.py"):
        ModelSpec.load(tmp_path / "spec.json")
