import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.spec import COLOURS, INTERPOLATIONS, SPEC_VERSION, ModelSpec, PixelRule, SpecError

GOOD = {
    "arch": "simplecnn",
    "labels": ["cat", "dog"],
    "height": 32,
    "width": 48,
    "resize": 36,
    "interpolation": "bicubic",
    "fit": "crop",
    "fill": [0, 0, 0],
    "colour": "srgb",
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
    height=st.integers(1, 512),
    width=st.integers(1, 512),
    resize=st.integers(512, 600),
    interpolation=st.sampled_from(INTERPOLATIONS),
    fill=st.tuples(*[st.integers(0, 255)] * 3),
    colour=st.sampled_from(COLOURS),
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
        ({"height": 0}, ["'height'", "from 1 to 4096"]),
        ({"width": True}, ["'width'"]),
        ({"width": "32"}, ["'width'", "whole number"]),
        ({"resize": 31}, ["'resize'", "from 32"]),
        ({"interpolation": "nearest"}, ["'interpolation'", "bilinear, bicubic, lanczos"]),
        ({"fit": "stretch"}, ["'fit'", "crop, squash, pad"]),
        ({"fit": "pad"}, ["'resize' is 36", "'pad'", "must be 32"]),
        ({"fit": ["pad"]}, ["'fit'", "one of"]),
        ({"fill": [0, 0]}, ["'fill'", "three"]),
        ({"fill": [0, 0, 256]}, ["'fill'", "from 0 to 255"]),
        ({"fill": 0}, ["int"]),
        ({"colour": "adobe"}, ["'colour'", "srgb, as-stored"]),
        ({"size": 32}, ["unknown field 'size'", "known are"]),
        ({"mean": [0, 0]}, ["'mean'", "three numbers"]),
        ({"std": [1, 1, 0]}, ["'std'", "above 0"]),
        ({"std": [1, 1, float("nan")]}, ["'std'", "three numbers"]),
        ({"temperature": 0}, ["'temperature'", "above 0"]),
        ({"metrics": {"accuracy": "good"}}, ["'metrics'", "finite numbers"]),
        ({"weights_sha256": "abc"}, ["'weights_sha256'", "64"]),
        ({"versions": {"torch": 2}}, ["'versions'", "texts"]),
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


@pytest.mark.parametrize("field", ["arch", "labels", "height", "fit", "colour", "spec_version"])
def test_a_missing_field_is_named(field):
    with pytest.raises(SpecError, match=f"'{field}' is missing"):
        ModelSpec.from_json(json.dumps({k: v for k, v in GOOD.items() if k != field}))


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(SpecError, match=r"runs/x/spec\.json"):
        ModelSpec.from_json(text, source="runs/x/spec.json")


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(SpecError, match=f"no such file.*`python train.py --data DIR --out '{tmp_path / 'my run'}'`"):
        ModelSpec.load(tmp_path / "my run" / "spec.json")


VERSION_1 = {key: value for key, value in GOOD.items() if key not in PixelRule.__dataclass_fields__}
VERSION_1 |= {"size": 32, "resize": 36, "spec_version": 1}


def test_version_1_is_read_as_what_it_meant():
    spec = ModelSpec.from_json(json.dumps(VERSION_1))
    assert spec.rule == PixelRule(
        height=32, width=32, resize=36, interpolation="bilinear", fit="crop", colour="as-stored"
    )
    assert spec.spec_version == SPEC_VERSION
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 0}, "'size' is 0; it must be a whole number from 1"),
        ({"resize": 31}, "'resize' is 31"),
        ({"fit": "crop"}, "unknown field 'fit'"),
    ],
)
def test_what_version_1_did_not_allow_is_refused(change, words):
    with pytest.raises(SpecError, match=f"spec.json: {words}"):
        ModelSpec.from_json(json.dumps(VERSION_1 | change))


def test_a_missing_field_of_version_1_is_named():
    with pytest.raises(SpecError, match="'size' is missing"):
        ModelSpec.from_json(json.dumps({key: value for key, value in VERSION_1.items() if key != "size"}))


def test_a_rule_can_be_read_by_people():
    rule = ModelSpec(**GOOD | {"fit": "pad", "resize": 32, "fill": [1, 2, 3]}).rule
    assert rule.in_words() == "48×32 px, whole image, padded with RGB 1, 2, 3, bicubic, colours converted to sRGB"
