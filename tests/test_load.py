"""The load of the benchmarks counts correct predictions only."""

import json
import shutil
from base64 import b64encode
from dataclasses import replace

import pytest

from benchmarks import load
from benchmarks.load import Request, ask, best_of
from benchmarks.servers import multipart

pytestmark = pytest.mark.server

RUNS = [
    pytest.param(
        load._wrk,
        id="wrk",
        marks=pytest.mark.skipif(not shutil.which("wrk"), reason="without wrk: apt-get install wrk"),
    ),
    pytest.param(load._threads, id="threads"),
]


@pytest.fixture
def wanted(server, run):
    """An image, several in fields, several instances: with their answers."""
    bodies = [path.read_bytes() for path in sorted((run / "samples").iterdir())][::10]
    instances = json.dumps({"instances": [{"b64": b64encode(body).decode()} for body in bodies]}).encode()
    sent = [
        Request(bodies[0], "image/png"),
        multipart({f"{i:02}": body for i, body in enumerate(bodies)}),
        Request(instances, "application/json"),
    ]
    known = [replace(one, best=ask(f"{server.url}/predictions/digits", server.key(), one)) for one in sent]
    assert [len(one.best) for one in known] == [1, len(bodies), len(bodies)]
    assert [label for label, _ in known[1].best] == [label for label, _ in known[2].best]
    return known


@pytest.mark.parametrize("run_load", RUNS)
def test_correct_predictions_count_in_every_shape(server, wanted, run_load):
    found = run_load(f"{server.url}/predictions/digits", server.key(), wanted, 6, 1)
    assert found.requests_per_second > 1
    assert (found.wrong, found.failed, found.said) == (0, 0, "")
    assert 0 < found.p50 <= found.p99


@pytest.mark.parametrize("run_load", RUNS)
@pytest.mark.parametrize("change", ["label", "probability", "count", "key"])
def test_wrong_predictions_do_not(server, wanted, run_load, change):
    key = "wrong" if change == "key" else server.key()
    (label, value), *rest = wanted[1].best
    best = {
        "label": (("none of them", value), *rest),
        "probability": ((label, value - 0.01), *rest),
        "count": ((label, value), *rest, (label, value)),
        "key": wanted[1].best,
    }[change]
    found = run_load(f"{server.url}/predictions/digits", key, [replace(wanted[1], best=best)], 2, 1)
    assert found.requests_per_second == 0
    assert found.wrong > 0
    assert found.said


def test_the_best_label_is_found_in_each_shape_of_answers():
    one = b'{"cat": 0.75, "dog": 0.2}'
    assert best_of(one) == (("cat", 0.75),)
    assert best_of(b'{"a": ' + one + b', "b": {"dog": 1e-05}}') == (("cat", 0.75), ("dog", 1e-05))
    assert best_of(b'{"predictions": [' + one + b", " + one + b"]}") == (("cat", 0.75),) * 2
    assert best_of(b"[" + one + b"]") == (("cat", 0.75),)
    assert best_of(b'{"code": 415, "type": "not_an_image"}') == (("code", 415.0),)
