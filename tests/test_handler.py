"""The handler by itself: out of its archive, with TorchServe's own Context, in batches that we choose."""

import base64
import contextlib
import gc
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from predictor.pillow_preprocessing import crop, decode
from predictor.spec import PixelRule
from tests.conftest import PROJECT, replace_in_archive
from tests.icc import P3
from tests.kinds import BAD, GOOD, LARGE_HEIC, gradient, save

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TorchServe's own modules
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def unpacked(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(exported / "digits.mar") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def ask(unpacked):
    """Sends a batch of requests, as TorchServe would; returns (status, body, headers) of each."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from handler.classifier_handler import ClassifierHandler

    handler = ClassifierHandler()
    handler.initialize(context_of(unpacked, explain=True))

    def send(*requests, headers=None):
        from ts.context import RequestProcessor

        context = context_of(unpacked)
        arrived = [as_they_arrive(request) for request in requests]
        context.request_processor = [RequestProcessor({**types, **(headers or {})}) for _, types in arrived]
        bodies = handler.handle([request for request, _ in arrived], context)
        assert len(bodies) == len(requests)
        return [
            (context.get_response_status(i)[0], value_of(body), context.get_response_headers(i))
            for i, body in enumerate(bodies)
        ]

    send.handler = handler
    return send


def context_of(folder, **settings):
    from ts.context import Context

    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    return Context("digits", str(folder), manifest, 4, None, "0.12.0", True, None, settings)


def as_they_arrive(request):
    """Fields as bytes and TorchServe's headers about them. What is not bytes here was sent as JSON."""
    values = {name: value for name, value in request.items() if not isinstance(value, bytes)}
    fields = {name: json.dumps(value).encode() for name, value in values.items()}
    return request | fields, {name: {"content-type": "application/json"} for name in values}


def value_of(body):
    """What JSON says, or an image's bytes."""
    return body if body.startswith(b"\x89PNG") else json.loads(body)


def b64(body):
    return {"b64": base64.b64encode(body).decode()}


def test_the_archive_holds_what_it_needs_and_no_more(unpacked):
    assert {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()} == {
        "MAR-INF/MANIFEST.json", "classifier_handler.py", "sitecustomize.py",
        "handler/__init__.py", "handler/errors.py", "handler/explanations.py", "handler/prometheus_metrics.py",
        "handler/request_parsing.py", "handler/torchserve_protocol.py", "handler/worker_startup.py",
        "predictor/__init__.py", "predictor/backends.py", "predictor/colour_profiles.py",
        "predictor/decoder_process.py", "predictor/files.py", "predictor/golden_check.py",
        "predictor/image_headers.py", "predictor/pillow_preprocessing.py",
        "predictor/predictor.py", "predictor/spec.py", "predictor/__main__.py",
        "digits.pt", "digits.crops.onnx", "spec.json", "index_to_name.json", "golden.json", "MODEL_CARD.md",
        "model-config.yaml",
    }  # fmt: skip


def first_label(unpacked, sample, *options, **environment):
    """What an unpacked archive answers in a process of its own, which imports nothing of this repository."""
    (unpacked.parent / "seven.png").write_bytes(sample)
    code = f"""
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.append({str(unpacked)!r})
from ts.context import Context, RequestProcessor
from ts.model_loader import TsModelLoader
service = TsModelLoader().load("digits", {str(unpacked)!r}, "classifier_handler.py", None, 1)
context = service.context
context.request_processor = [RequestProcessor({{}})]
body, = service._entry_point([{{"body": open({str(unpacked.parent / "seven.png")!r}, "rb").read()}}], context)
assert not {{"model", "training", "export"}} & set(sys.modules)
for name in ("handler", "predictor"):
    assert sys.modules[name].__file__ == {str(unpacked)!r} + f"/{{name}}/__init__.py", sys.modules[name]
print(next(iter(json.loads(body))))
"""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    line = [sys.executable, *options, "-c", code]
    done = subprocess.run(line, cwd=unpacked.parent, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.anywhere
def test_the_archive_stands_alone(unpacked, sample, label):
    assert first_label(unpacked, sample, "-I") == label


@pytest.mark.anywhere
def test_packages_of_the_archives_names_in_the_callers_path_are_not_run(unpacked, sample, label, tmp_path):
    """TorchServe puts the archive's folder behind the caller's PYTHONPATH."""
    for name in ("handler", "predictor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a trojan was run')")
    assert first_label(unpacked, sample, PYTHONPATH=str(tmp_path)) == label


def test_an_answer_is_the_stock_shape_best_first(ask, sample, label):
    ((status, answer, headers),) = ask({"body": sample})
    assert status == 200
    assert len(answer) == 5
    assert next(iter(answer)) == label
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert sum(answer.values()) <= 1 + 1e-6
    assert headers["content-type"] == "application/json"
    assert headers["x-model-version"] == "1.0"
    assert len(headers["x-model-weights-sha256"]) == 64


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_image_is_answered(ask, name):
    ((status, answer, _),) = ask({"body": GOOD[name][0]})
    assert status == 200
    assert len(answer) == 5


@pytest.mark.parametrize("name", BAD)
def test_every_bad_body_gets_its_status(ask, name):
    from handler.errors import STATUSES

    body, cause = BAD[name]
    ((status, answer, headers),) = ask({"body": body})
    assert (status, answer["code"], answer["type"]) == (STATUSES[cause][0], STATUSES[cause][0], cause)
    assert answer["message"]
    assert headers["content-type"] == "application/json"


def test_every_cause_stands_in_the_table_and_the_table_in_docs_api():
    from handler.errors import STATUSES

    assert {cause for _, cause in BAD.values()} <= set(STATUSES)
    page = (PROJECT / "docs" / "api.md").read_text()
    for cause, (code, _) in STATUSES.items():
        assert f"| `{cause}` | {code} |" in page


def test_one_bad_image_among_31_good_ones_fails_alone(ask, run):
    good = [path.read_bytes() for path in sorted((run / "samples").iterdir())][:31]
    alone = [ask({"body": body})[0] for body in good]
    together = ask(
        *({"body": body} for body in good[:17]), {"body": b"not an image"}, *({"body": b} for b in good[17:])
    )
    assert (together[17][0], together[17][1]["type"]) == (415, "not_an_image")
    for (status, answer, _), (status_alone, answer_alone, _) in zip(together[:17] + together[18:], alone, strict=True):
        assert status == status_alone == 200
        assert answer == pytest.approx(answer_alone, abs=1e-5)


def test_a_batch_of_nothing_but_bad_images_is_answered(ask):
    assert [status for status, _, _ in ask({"body": b""}, {"body": b"x"}, {})] == [400, 415, 400]


requests = st.one_of(
    st.sampled_from([{"body": body} for body, _, _ in GOOD.values()]),
    st.sampled_from([{"body": body} for body, _ in BAD.values()]),
    st.binary(max_size=30).map(lambda body: {"body": body}),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["instances", "b64", "x"]), inner),
        max_leaves=6,
    ).map(lambda value: {"body": value}),
    st.dictionaries(st.text(max_size=3), st.binary(max_size=9) | st.sampled_from([GOOD["png"][0]]), max_size=3),
)


@given(st.lists(requests, min_size=1, max_size=6))
@hypothesis_settings(max_examples=60)
def test_no_request_whatever_it_holds_changes_the_answers_of_its_neighbours(ask, batch):
    together = ask(*batch)
    for request, (status, answer, _) in zip(batch, together, strict=True):
        ((alone_status, alone, _),) = ask(request)
        assert status == alone_status
        assert status in (200, 400, 413, 415, 422)
        assert flat(answer) == pytest.approx(flat(alone), abs=1e-5)


def flat(answer, path=()):
    """Every number and text of a JSON value by its path."""
    if not isinstance(answer, (dict, list)):
        return {path: answer}
    pairs = answer.items() if isinstance(answer, dict) else enumerate(answer)
    return {place: leaf for name, value in pairs for place, leaf in flat(value, (*path, name)).items()}


def test_several_fields_are_answered_by_name_and_fail_alone(ask, sample, label):
    ((status, answer, _),) = ask({"left": sample, "right": b"nothing"})
    assert status == 200
    assert next(iter(answer["left"])) == label
    assert (answer["right"]["code"], answer["right"]["type"]) == (415, "not_an_image")
    ((status, answer, _),) = ask({"left": b"", "right": b"nothing"})
    assert (status, answer["type"]) == (400, "empty")


def test_json_with_base64_one_or_many(ask, sample):
    raw = ask({"body": sample})[0][1]
    assert ask({"body": b64(sample)})[0][1] == raw
    assert ask({"body": json.dumps(b64(sample)).encode()})[0][1] == raw  # as bytes: another content type
    ((status, answer, _),) = ask({"body": {"instances": [b64(sample), {"b64": "?"}, b64(b"x"), 7]}})
    assert status == 200
    assert answer["predictions"][0] == pytest.approx(raw, abs=1e-5)
    assert [p["type"] for p in answer["predictions"][1:]] == ["bad_base64", "not_an_image", "bad_json"]
    wrapped = base64.encodebytes(sample).decode()  # with line breaks
    assert ask({"body": {"b64": wrapped}})[0][1] == raw


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (b"{", "bad_json"),
        (b' \n {"b64": 1}', "bad_json"),
        (b'{"instances": 7}', "bad_json"),
        ({"instances": []}, "empty"),
        (None, "bad_json"),
        (7, "bad_json"),
        ([], "bad_json"),
        ("text", "not_an_image"),
        (b"[" * 100_000, "bad_json"),
        ({"b64": "data:image/png;base64,AAAA"}, "bad_base64"),
        ({"b64": 7}, "bad_json"),
        ({"url": "http://127.0.0.1/x.png"}, "bad_json"),
        ({"id": "x" * 2000, "inputs": []}, "bad_json"),
    ],
)
def test_bad_json_has_its_cause(ask, value, cause):
    ((status, answer, _),) = ask({"body": value})
    assert (status, answer["type"]) == (400 if cause != "not_an_image" else 415, cause)


def test_what_an_answer_would_repeat_is_bounded(ask, sample):
    long = "x" * 2000
    for request in ({long: sample}, {long: sample, "b": sample}, {"body": v2("BYTES", [1], ["AAAA"], id=[1] * 1000)}):
        ((status, answer, _),) = ask(request)
        assert (status, answer["type"]) == (400, "bad_json")
        assert "more than 1,000 characters" in answer["message"]


def test_an_image_without_memory_costs_its_neighbours_nothing(ask, sample, label, monkeypatch):
    read = ask.handler.predictor.decode

    def full(body, *arguments):
        if body == b"large":
            raise MemoryError
        return read(body, *arguments)

    monkeypatch.setattr(ask.handler.predictor, "decode", full)
    large, good = ask({"body": b"large"}, {"body": sample})
    assert (large[0], large[1]["type"]) == (413, "too_many_pixels")
    assert (good[0], next(iter(good[1]))) == (200, label)


def test_a_refused_image_keeps_none_of_its_memory(ask, sample, monkeypatch):
    """Its error once held the decoder, and with it the pixels, until the whole batch was answered."""
    infer, held = ask.handler.predictor.infer, []

    def look(crops):
        images = (one for one in gc.get_objects() if issubclass(type(one), Image.Image))  # no question to a dead proxy
        held.extend(one for one in images if one.size == (900, 700))
        return infer(crops)

    monkeypatch.setattr(ask.handler.predictor, "infer", look)
    whole = save(gradient(900, 700), "JPEG")
    cut = {"body": whole[: len(whole) // 2]}
    *refused, good = ask(*[cut] * 3, {"body": sample})
    assert {answer["type"] for _, answer, _ in refused} == {"truncated"}
    assert (good[0], held) == (200, [])


def test_what_is_not_plain_is_decoded_in_another_process(ask, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened in the worker"))
    for name in ("bmp", "gif animation", "tiff lzw", "png grey 16", "jpeg cmyk"):
        ((status, answer, _),) = ask({"body": GOOD[name][0]})
        assert (status, len(answer)) == (200, 5), name


def test_the_photographs_of_phones_are_answered_a_batch_at_a_time(ask):
    apple = save(gradient(4_032, 3_024), "JPEG", icc_profile=P3)
    replies = ask({"body": LARGE_HEIC}, {"body": apple}, {"body": apple})
    assert [(status, len(answer)) for status, answer, _ in replies] == [(200, 5)] * 3


def test_an_image_that_is_too_slow_has_its_status(ask, sample, monkeypatch):
    from handler.errors import STATUSES
    from predictor.decoder_process import DecoderProcess
    from predictor.pillow_preprocessing import ImageError

    def slow(*_):
        raise ImageError("too_slow", "decoding this image takes over 1 s")

    monkeypatch.setattr(DecoderProcess, "read", slow)
    first, good = ask({"body": GOOD["bmp"][0]}, {"body": sample})
    assert (first[0], first[1]["type"]) == (STATUSES["too_slow"][0], "too_slow")
    assert good[0] == 200


def test_halves_of_utf_16_pairs_in_json_cost_nobody_an_answer(ask, sample, label):
    image = v2("BYTES", [1], [base64.b64encode(sample).decode()], id="\ud800")
    alone, several, answered, good = ask(
        {"body": "\ud800"}, {"body": {"instances": ["\udfff"]}}, {"body": image}, {"body": sample}
    )
    assert [alone[0], several[0]] == [415, 415]
    assert (answered[0], answered[1]["id"]) == (200, "?")
    assert (good[0], next(iter(good[1]))) == (200, label)


def test_more_images_in_a_request_than_a_chunk_holds(ask, sample, label):
    ((_, answer, _),) = ask({"body": {"instances": [b64(sample)] * 150}})
    assert len(answer["predictions"]) == 150
    assert all(next(iter(p)) == label for p in answer["predictions"])
    ((status, answer, _),) = ask({"body": {"instances": [b64(sample)] * 257}})
    assert (status, answer["type"]) == (413, "too_many_images")


@pytest.fixture(scope="module")
def threaded(unpacked):
    """A handler that decodes in threads, as GPU workers do, and runs ONNX Runtime."""
    from handler.classifier_handler import ClassifierHandler

    handler = ClassifierHandler()
    handler.initialize(context_of(unpacked, backend="onnx", decode_threads=3))
    return handler


KINDS = [body for body, *_ in (*GOOD.values(), *BAD.values())]


@given(picked=st.lists(st.sampled_from(range(len(KINDS))), min_size=1, max_size=150))
@hypothesis_settings(max_examples=15)
def test_an_answer_depends_on_nothing_but_its_image(ask, threaded, picked):
    """Not on its neighbours, the size of the batch, the backend or the threads; errors included."""
    alone = {i: ask.handler._classify([(KINDS[i], False)], Counter())[0] for i in set(picked)}
    for handler, tolerance in (
        (ask.handler, 1e-5),
        (threaded, 1e-4),
    ):  # of a probability: export/proof/parity.py's for crops
        for i, got in zip(picked, handler._classify([(KINDS[i], False) for i in picked], Counter()), strict=True):
            expected = alone[i]
            if isinstance(expected, dict):
                every = dict.fromkeys(expected.keys() ^ got.keys(), 0.0)  # near ties at the end of the five
                assert {**every, **got} == pytest.approx({**every, **expected}, abs=0.05 if every else tolerance)
            else:
                assert (type(got), got.cause) == (type(expected), expected.cause)


def test_describe_answers_with_the_spec_and_the_card(ask, run, exported):
    ((status, answer, _),) = ask({}, headers={"describe": "True"})
    assert status == 200
    assert answer.pop("card") == (exported / "MODEL_CARD.md").read_text()
    assert answer == json.loads((run / "spec.json").read_text())


def v2(datatype, shape, data, **more):
    return {"id": "seven", "inputs": [{"name": "images", "datatype": datatype, "shape": shape, "data": data}], **more}


def test_kserve_v2_bodies_are_answered_as_v2(ask, sample):
    raw = ask({"body": sample})[0][1]
    text = base64.b64encode(sample).decode()
    ((status, answer, _),) = ask({"body": v2("BYTES", [2], [text, text])})
    assert status == 200
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("digits", "1.0", "seven")
    labels, probabilities = answer["outputs"]
    assert (labels["name"], labels["datatype"], labels["shape"]) == ("labels", "BYTES", [2, 5])
    assert labels["data"] == list(raw) * 2
    assert (probabilities["name"], probabilities["datatype"], probabilities["shape"]) == (
        "probabilities",
        "FP32",
        [2, 5],
    )
    assert probabilities["data"] == pytest.approx(list(raw.values()) * 2, abs=1e-5)


def test_kserve_v2_takes_pixels_flat_or_nested(ask):
    pixels = np.asarray(gradient(21, 17))
    expected = list(ask({"body": save(gradient(21, 17), "PNG")})[0][1].values())
    for data in (pixels.ravel().tolist(), [pixels.tolist()]):
        ((status, answer, _),) = ask({"body": v2("UINT8", [1, 17, 21, 3], data)})
        assert status == 200
        assert answer["outputs"][1]["data"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "code", "cause"),
    [
        (v2("BYTES", [0], []), 400, "empty"),
        (v2("BYTES", [1], ["?"]), 400, "bad_base64"),
        (v2("BYTES", [2], [base64.b64encode(next(iter(GOOD.values()))[0]).decode(), "AAAA"]), 415, "not_an_image"),
        (v2("BYTES", [1], [7]), 400, "bad_json"),
        (v2("FP32", [1, 3, 2, 2], [0.5] * 12), 400, "bad_json"),
        (v2("UINT8", [1, 2, 2, 3], [1] * 11), 400, "bad_json"),
        (v2("UINT8", [1, 2, 2, 3], [256] * 12), 400, "bad_json"),
        (v2("UINT8", [1, 2, 2, 3], [-1] * 12), 400, "bad_json"),
        (v2("UINT8", [1, 2, 2, 3], [0.5] * 12), 400, "bad_json"),
        (v2("UINT8", [1, 2, 2, 3], [[1, 2], [3]]), 400, "bad_json"),
        (v2("UINT8", [1, 2, 2, 3], [True] * 12), 400, "bad_json"),
        (v2("UINT8", [1, 2, 2, 3], [10**40] * 12), 400, "bad_json"),
        (v2("UINT8", [0, 2, 2, 3], []), 400, "bad_json"),
        ({"inputs": []}, 400, "bad_json"),
        ({"inputs": [7]}, 400, "bad_json"),
    ],
)
def test_a_bad_kserve_v2_body_fails_as_a_whole(ask, inputs, code, cause):
    ((status, answer, _),) = ask({"body": inputs})
    assert (status, answer["type"]) == (code, cause)
    if cause != "empty":
        assert answer["error"] == answer["message"]  # where v2 clients look


def test_only_the_management_port_describes(ask, sample):
    """A header is not enough: of all requests only the management port's hold no field, but for forms without one."""
    ((_, answer, _),) = ask({"body": sample}, headers={"describe": "True"})
    assert answer == ask({"body": sample})[0][1]
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for request, headers in (({"body": b""}, {}), ({}, form), ({}, {"content-TYPE": "multipart/form-data"})):
        ((status, answer, _),) = ask(request, headers={"describe": "True", **headers})
        assert (status, answer["type"]) == (400, "empty")


def test_a_header_asks_for_health_and_an_empty_request_is_a_mistake(ask):
    for name, value in (("health", "True"), ("Health", "true")):
        ((status, answer, headers),) = ask({"body": b""}, headers={name: value, "content-length": "0"})
        assert (status, answer) == (200, {"status": "Healthy", "model": "digits", "version": "1.0"})
        assert headers["x-model-version"] == "1.0"
    for empty in ({"Content-Length": "0"}, {}, {"content-length": "0"}, {"content-length": "0", "health": "False"}):
        ((status, answer, _),) = ask({"body": b""}, headers=empty)
        assert (status, answer["type"]) == (400, "empty")
        assert "health: True" in answer["message"]


def test_a_request_that_is_too_large_a_table_of_values_is_counted_and_not_built(ask):
    """10 MB of JSON; the memory is that of this process and holds what Python and NumPy take at most."""
    many, length = 3_000_000, {"content-length": "1"}
    zeros, texts, empty = b"0," * many + b"0", b'"",' * many + b'""', b"{}," * many + b"{}"
    v2_of = b'{"inputs":[{"datatype":"%s","shape":[%d,1,1,3],"data":[%s]}]}'
    for body in (
        *(b'{"instances":[' + values + b"]}" for values in (zeros, texts, empty)),
        v2_of % (b"BYTES", many + 1, texts),
        v2_of % (b"UINT8", (many + 1) // 3, zeros + b",0,0"),
    ):
        tracemalloc.start()
        ((status, answer, _),) = ask({"body": body}, headers=length)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (status, answer["type"]) == (413, "too_many_images")
        assert most < 4 * len(body)


@pytest.mark.anywhere
def test_one_long_text_among_numbers_does_not_make_each_as_long(ask):
    for count, expected in ((1_000_000, (413, "too_many_images")), (1_000, (400, "bad_json"))):
        tracemalloc.start()
        ((status, answer, _),) = ask(
            {"body": json.dumps(v2("UINT8", [1, 2, 2, 3], ["a" * 4_000_000, *[1] * count])).encode()}
        )
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (status, answer["type"]) == expected
        assert most < 100 * 2**20


def test_white_space_in_base64_takes_no_memory_of_its_own(ask):
    body = b'{"b64": "' + b"AA " * 2_000_000 + b'"}'
    tracemalloc.start()
    ((status, answer, _),) = ask({"body": body})
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (status, answer["type"]) == (415, "not_an_image")
    assert most < 5 * len(body)


def test_explanations_are_off_unless_they_are_switched_on(unpacked, sample):
    from ts.context import RequestProcessor

    from handler.classifier_handler import ClassifierHandler

    handler, context = ClassifierHandler(), context_of(unpacked)
    handler.initialize(context)
    context.request_processor = [RequestProcessor({"explain": "True"})]
    answer = json.loads(handler.handle([{"body": sample}], context)[0])
    assert (context.get_response_status(0)[0], answer["type"]) == (403, "explanations_off")
    assert "explain: true" in answer["message"]


def test_the_network_gets_batches_of_the_configured_size_and_stops_when_time_is_up(ask, sample, monkeypatch):
    """Of a clock that each batch moves by 9 s: the third begins within FORWARD_SECONDS, the fourth does not."""
    from handler import classifier_handler

    now, sizes = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(classifier_handler, "time", clock)
    monkeypatch.setattr(classifier_handler, "DECODE_SECONDS", 1_000)

    def infer(crops):
        sizes.append(len(crops))
        now[0] += 9
        return [{"7": 1.0} for _ in crops]

    monkeypatch.setattr(ask.handler.predictor, "infer", infer)
    ((status, answer, _),) = ask({"body": {"instances": [b64(sample)] * 18}})
    assert ask.handler.batch == 4
    assert sizes == [4, 4, 4]
    assert status == 200
    assert [answer.get("type") for answer in answer["predictions"]] == [None] * 12 + ["no_time"] * 6
    ((status, answer, _),) = ask({"body": sample})
    assert (status, sizes[-1]) == (200, 1)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        *(({}, "false"), ({"content-length": {"content-type": ""}}, "false")),  # the second a field of that name
        *(({"content-length": "9"}, None), ({"CONTENT-Length": "9"}, None)),
    ],
)
def test_the_end_of_a_stream_is_told_over_grpc_and_never_over_rest(ask, sample, headers, expected):
    for body in (sample, b"nothing", b""):
        ((_, _, told),) = ask({"body": body}, headers=headers)
        assert told.get("ts_stream_next") == expected


def test_each_explanation_of_a_batch_is_of_its_own_image(ask, run):
    bodies = [(run / "samples" / f"{name}-0.png").read_bytes() for name in "7384"]
    replies = ask(*({"body": body} for body in bodies), headers={"explain": "True"})
    for (status, png, headers), body in zip(replies, bodies, strict=True):
        label, probability = next(iter(ask({"body": body})[0][1].items()))
        assert (status, headers["content-type"], headers["x-label"]) == (200, "image/png", label)
        assert float(headers["x-probability"]) == pytest.approx(probability, abs=1e-5)
        assert png == ask({"body": body}, headers={"explain": "True"})[0][1]
        assert Image.open(io.BytesIO(png)).size == (224, 224)
    assert len({png for _, png, _ in replies}) == 4


def test_explanations_of_several_images_are_json_and_fail_alone(ask, sample, label):
    png = ask({"body": sample}, headers={"explain": "True"})[0][1]
    for request, place in (
        ({"a": sample, "b": b"nothing"}, lambda answer: (answer["a"], answer["b"])),
        ({"body": {"instances": [b64(sample), b64(b"nothing")]}}, lambda answer: answer["predictions"]),
    ):
        ((status, answer, _),) = ask(request, headers={"explain": "True"})
        good, bad = place(answer)
        assert (status, good["label"], bad["type"]) == (200, label, "not_an_image")
        assert base64.b64decode(good["png"]) == png
    ((status, answer, _),) = ask({"body": {"instances": [b64(sample)] * 9}}, headers={"explain": "True"})
    assert (status, answer["type"]) == (413, "too_many_images")
    ((status, answer, _),) = ask({"body": b"nothing"}, headers={"explain": "True"})
    assert (status, answer["type"]) == (415, "not_an_image")


def test_explanations_that_take_too_long_are_put_off(ask, sample, monkeypatch):
    from handler import explanations

    monkeypatch.setattr(explanations, "SECONDS", -1)
    ((status, answer, _),) = ask({"body": sample}, headers={"explain": "True"})
    assert (status, answer["type"]) == (503, "no_time")


def test_an_explanation_without_memory_costs_its_neighbours_nothing(ask, sample, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(ask.handler.explainer, "attributions", full)
    ((status, answer, _),) = ask({"body": sample}, headers={"explain": "True"})
    assert (status, answer["type"]) == (503, "no_time")


def test_giants_in_a_request_of_several_do_not_keep_their_neighbours_waiting(ask, sample, label, monkeypatch):
    """256 files of 50 kB, of 16 megapixels each, would take it half a minute.

    Here by a clock on which each decoding takes a second.
    """
    names, clock = ask.handler._decode.__globals__, SimpleNamespace(now=0.0, perf_counter=time.perf_counter)
    clock.monotonic, read = lambda: clock.now, ask.handler.predictor.decode

    def slow(*arguments):
        clock.now += 1
        return read(*arguments)

    monkeypatch.setattr(ask.handler.predictor, "decode", slow)
    for name, value in (("time", clock), ("SEVERAL_SECONDS", 3.5)):
        monkeypatch.setitem(names, name, value)
    early, giants, late = ask({"body": sample}, {"body": {"instances": [b64(sample)] * 256}}, {"body": sample})
    assert (early[0], next(iter(early[1]))) == (200, label)
    assert [answer.get("type") for answer in giants[1]["predictions"]] == [None] * 3 + ["no_time"] * 253
    assert (late[0], next(iter(late[1]))) == (200, label)  # the only one of its request is not put off
    monkeypatch.setitem(names, "DECODE_SECONDS", -1)  # but for the time after which TorchServe gives up
    ((status, answer, _),) = ask({"body": sample})
    assert (status, answer["type"]) == (503, "no_time")
    monkeypatch.setitem(names, "DECODE_SECONDS", 12)
    assert ask({"body": sample})[0][0] == 200  # the next batch has its own time


def test_the_pixels_are_those_of_the_spec(ask, monkeypatch):
    seen = []
    monkeypatch.setattr(ask.handler.predictor, "infer", lambda crops: seen.append(crops) or [{"7": 1.0} for _ in crops])
    body = save(gradient(61, 45), "PNG")
    ask({"body": body})
    np.testing.assert_array_equal(seen[0][0], crop(decode(body), PixelRule.square(32)))


def test_topk_is_a_setting_and_never_more_than_the_labels(unpacked, sample):
    from ts.context import RequestProcessor

    from handler.classifier_handler import ClassifierHandler

    for topk, expected in ((1, 1), (3, 3), (99, 10)):
        handler, context = ClassifierHandler(), context_of(unpacked, topk=topk)
        handler.initialize(context)
        context.request_processor = [RequestProcessor({})]
        assert len(json.loads(handler.handle([{"body": sample}], context)[0])) == expected


@pytest.mark.parametrize(
    "settings",
    [
        *({"topk": 0}, {"topk": "5"}, {"max_pixels": -1}, {"threads": True}, {"explain": "yes"}),
        *({"backend": "x"}, {"backend": "pt2"}),
    ],
)
def test_a_setting_out_of_its_rule_is_named(unpacked, settings):
    from handler.classifier_handler import ClassifierHandler

    with pytest.raises(ValueError, match=rf"model-config.yaml: '{next(iter(settings))}'"):
        ClassifierHandler().initialize(context_of(unpacked, **settings))


@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_golden_difference_over_its_tolerance_is_told_right_or_wrong(exported, tmp_path, caplog, is_wrong):
    """An archive that answers wrongly does not serve, so the alert has nothing but what is told before."""
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    from handler.classifier_handler import ClassifierHandler

    with zipfile.ZipFile(exported / "digits.mar") as archive:
        archive.extractall(tmp_path)
    golden = json.loads((tmp_path / "golden.json").read_text())
    if is_wrong:
        golden["probabilities"][0].reverse()
        (tmp_path / "golden.json").write_text(json.dumps(golden))
    cache = MetricsCacheYamlImpl(str(PROJECT / "metrics.yaml"))
    cache.initialize_cache()
    context, handler = context_of(tmp_path), ClassifierHandler()
    context.metrics = cache
    caplog.set_level(logging.INFO, "ts.metrics")
    with pytest.raises(ValueError, match="golden image") if is_wrong else contextlib.nullcontext():
        handler.initialize(context)
    handler.measures._metrics = None  # ends its thread
    told = [float(found[1]) for found in re.finditer(r"golden_difference_ratio.\w+:([^|]+)", caplog.text)]
    assert len(told) == 1
    assert (told[0] > 1) == is_wrong


def test_without_this_project_s_metrics_the_handler_starts_and_says_so_once(unpacked, caplog):
    """TorchServe's own metrics.yaml lists none of ours."""
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    from handler.classifier_handler import ClassifierHandler

    cache = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    cache.initialize_cache()
    context, handler = context_of(unpacked), ClassifierHandler()
    context.metrics = cache
    handler.initialize(context)
    handler._check_golden()
    assert caplog.text.count("no metrics of the handler") == 1


def test_labels_that_disagree_are_refused(exported, tmp_path):
    from handler.classifier_handler import ClassifierHandler

    replace_in_archive(exported / "digits.mar", tmp_path / "x.mar", {"index_to_name.json": '{"0": "zero"}'})
    with zipfile.ZipFile(tmp_path / "x.mar") as archive:
        archive.extractall(tmp_path / "x")
    with pytest.raises(ValueError, match="name other labels"):
        ClassifierHandler().initialize(context_of(tmp_path / "x"))
