"""Nothing that a request holds costs its neighbours an answer, the server a worker, or the machine its memory."""

import base64
import json
import socket
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.probes import workers_of
from launcher import Ports, serving
from predictor.pillow_preprocessing import ImageError, decode, read
from predictor.spec import PixelRule
from tests.conftest import label_of, replace_in_archive
from tests.hostile import BODIES, FILES, JSON, MIB
from tests.hostile_images import IMAGES
from tests.kinds import save

CLIENTS = 8
ATTEMPTS = 20  # at a body that was put off, as the answer says
LEAK = 64 * MIB  # that a worker may grow by in a second round
LARGE = 200 * MIB
COSTLY = 400 * MIB  # that all processes together may grow by while such an image is looked at


@pytest.fixture(scope="module")
def lonely(exported, tmp_path_factory):
    """A server of one worker that waits a little for its batches, so that what is bad and what is good share them."""
    store = tmp_path_factory.mktemp("hostile")
    with zipfile.ZipFile(exported / "digits.mar") as archive:
        config = archive.read("model-config.yaml").decode()
    assert "maxBatchDelay: 1\n" in config
    config = config.replace("maxBatchDelay: 1\n", "maxBatchDelay: 5\nminWorkers: 1\nmaxWorkers: 1\n")
    replace_in_archive(exported / "digits.mar", store / "digits.mar", {"model-config.yaml": config})
    with serving([store / "digits.mar"], store / "server", ports=Ports.free()) as server:
        yield server


@pytest.fixture(scope="module")
def post(lonely):
    with requests.Session() as session:  # of urllib3's pools, which threads may share
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CLIENTS))
        session.headers["Authorization"] = f"Bearer {lonely.key()}"

        def send(body, headers=None):
            return session.post(f"{lonely.url}/predictions/digits", data=body, headers=headers, timeout=60)

        yield send


@pytest.fixture(scope="module")
def good(run, post):
    """Images and their answers."""
    bodies = [path.read_bytes() for path in sorted((run / "samples").iterdir())]
    answers = [post(body).json() for body in bodies]
    assert [next(iter(answer)) for answer in answers] == [label_of(run, body) for body in bodies]
    assert len({next(iter(answer)) for answer in answers}) >= 5  # so that another's answer would be noticed
    return list(zip(bodies, answers, strict=True))


def wrong(kind, reply):
    """What is wrong with the reply to a hostile body, or None."""
    status = reply.status_code
    if kind == "any" and status == 200:
        return None
    if not (status == 500 if kind == "broken" else 400 <= status < 500):
        return f"status {status}: {reply.text[:200]}"
    try:
        error = reply.json()
    except ValueError:
        return f"{status} without JSON: {reply.text[:200]}"
    reasons = error.get("code") == status and error.get("type") and error.get("message")
    return None if reasons else f"{status} without a reason: {error}"


@pytest.mark.server
def test_every_hostile_body_is_refused_alone_and_the_worker_lives_and_does_not_grow(lonely, post, good):
    (worker,), java = workers_of(lonely), lonely.process.pid

    def looked_at(hostile):
        """The reply to a body that is sent again while the time of its batch, on a busy machine, was not enough."""
        for _ in range(ATTEMPTS):
            reply = post(hostile.body, hostile.headers)
            if reply.status_code != 503 or reply.json()["type"] != "no_time":
                break
        return reply

    def attack(number):
        hostile, (body, expected) = BODIES[number], good[number % len(good)]
        complaint = wrong(hostile.kind, looked_at(hostile))
        reply = post(body)
        is_right = reply.status_code == 200 and reply.json() == pytest.approx(expected, abs=1e-5)
        neighbour = None if is_right else f"its neighbour got {reply.status_code} {reply.text[:200]}"
        return [f"{hostile.name}: {what}" for what in (complaint, neighbour) if what]

    def attack_all():
        with ThreadPoolExecutor(CLIENTS) as pool:
            complaints = [line for lines in pool.map(attack, range(len(BODIES))) for line in lines]
        assert not complaints, "\n".join(complaints)
        return worker.memory_info().rss

    first, second = attack_all(), attack_all()
    assert workers_of(lonely) == [worker]  # psutil compares when they started, too
    assert lonely.process.poll() is None
    assert lonely.process.pid == java
    assert "died" not in (lonely.folder / "logs" / "model_log.log").read_text()
    assert second - first < LEAK, f"{first / MIB:.0f} MiB, then {second / MIB:.0f} MiB"


def family_memory(server):
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


@pytest.mark.server
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_of_200_mb_is_refused_or_cut_off_and_fills_no_memory(lonely, post, good, framing):
    """Over a bare socket: the server may answer and close before it has been told everything."""
    workers, piece = workers_of(lonely), bytes(MIB)
    framed = piece if framing == "length" else f"{MIB:x}\r\n".encode() + piece + b"\r\n"
    header = f"Content-Length: {LARGE}" if framing == "length" else "Transfer-Encoding: chunked"
    address = urlsplit(lonely.url)
    before, most, sent, answer = family_memory(lonely), 0, 0, b""
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        lines = [
            "POST /predictions/digits HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {lonely.key()}",
            header,
            "",
            "",
        ]
        try:
            connection.sendall("\r\n".join(lines).encode())
            for _ in range(LARGE // MIB):
                connection.sendall(framed)
                sent += MIB
                most = max(most, family_memory(lonely))
            connection.sendall(b"0\r\n\r\n")
        except OSError:  # it has closed
            most = max(most, family_memory(lonely))
        try:
            answer = connection.recv(1_000)
        except OSError:
            answer = b""
    assert answer.startswith(b"HTTP/1.1 413 ") or (not answer and sent < LARGE)
    assert most - before < LEAK, f"{before / MIB:.0f} MiB, then {most / MIB:.0f} MiB"
    body, expected = good[0]
    assert post(body).json() == pytest.approx(expected, abs=1e-5)
    assert workers_of(lonely) == workers


@pytest.mark.server
def test_a_request_of_256_giants_is_answered_in_time_and_the_worker_lives(lonely, post, good):
    workers, (body, expected) = workers_of(lonely), good[0]
    giant = base64.b64encode(save(Image.new("L", (4_000, 4_000)), "PNG")).decode()
    giants = json.dumps({"instances": [{"b64": giant}] * 256})
    assert len(giants) < 10_000_000
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = pool.submit(post, giants, JSON)
        neighbours = list(pool.map(post, [body] * 20))
        reply = asked.result()
    assert reply.status_code == 200
    assert {answer.get("type") for answer in reply.json()["predictions"]} <= {None, "no_time"}
    for neighbour in neighbours:
        assert neighbour.json() == pytest.approx(expected, abs=1e-5)
    assert post(body).json() == pytest.approx(expected, abs=1e-5)
    assert workers_of(lonely) == workers


@pytest.mark.server
@pytest.mark.parametrize("name", sorted(IMAGES))
def test_an_image_that_costs_a_decoder_much_costs_its_neighbours_nothing(lonely, post, good, name):
    """Four at once: each is answered, refused or put off; all processes stay small; neighbours are correct."""
    workers = workers_of(lonely)
    before, most, over = family_memory(lonely), [0], threading.Event()

    def watch():
        while not over.wait(0.02):
            most[0] = max(most[0], family_memory(lonely))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = [pool.submit(post, IMAGES[name]) for _ in range(4)]
            neighbours = list(pool.map(post, [body for body, _ in good[:12]]))
            statuses = {reply.result().status_code for reply in asked}
    finally:
        over.set()
        watcher.join()
    assert statuses <= {200, 413, 415, 422, 503}
    for neighbour, (_, expected) in zip(neighbours, good, strict=False):
        assert neighbour.json() == pytest.approx(expected, abs=1e-5)
    assert most[0] - before < COSTLY, f"{before / MIB:.0f} MiB, then {most[0] / MIB:.0f} MiB"
    assert workers_of(lonely) == workers


# In this process, without a server


@st.composite
def damaged(draw):
    """An image file with flipped bytes, holes, repeated pieces and pieces of another."""
    body = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        length = draw(st.integers(1, 40) | st.integers(1, len(body) + 1))
        match draw(st.sampled_from(["flip", "hole", "cut", "repeat", "splice", "number"])):
            case "flip":
                body[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
            case "hole":
                del body[start : start + length]
            case "cut":
                del body[start:]
            case "repeat":
                body[start:start] = body[start : start + length]
            case "splice":
                other = FILES[draw(st.sampled_from(sorted(FILES)))]
                body[start : start + length] = other[start : start + length]
            case "number":  # lengths, sizes and offsets at their bounds
                body[start : start + 4] = draw(st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]))
    return bytes(body)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged files: no error outside tests either
@given(damaged())
@hypothesis_settings(max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_file_is_an_image_or_an_image_error(body):
    causes = {"empty", "not_an_image", "unsupported_kind", "truncated", "too_many_pixels"}
    for attempt in (lambda: decode(body, 1_000_000), lambda: read(body, PixelRule.square(32, 36), 1_000_000)):
        try:
            assert attempt() is not None
        except ImageError as error:
            assert error.cause in causes
            assert str(error)


words = st.sampled_from(["b64", "instances", "inputs", "datatype", "shape", "data", "id", "BYTES", "UINT8"])
texts = words | st.text(max_size=6) | st.sampled_from([base64.b64encode(FILES["png"]).decode(), "\ud800", "AAAA"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | texts, inner, max_size=4),
    max_leaves=12,
)
tensors = st.fixed_dictionaries(
    {
        "datatype": st.sampled_from(["BYTES", "UINT8"]) | anything,
        "shape": st.just([1, 1, 2, 3]) | st.lists(st.integers(-1, 4) | st.just(3), max_size=5) | anything,
        "data": st.lists(st.integers(-1, 256), min_size=5, max_size=7) | st.lists(texts, max_size=3) | anything,
    }
)
requests_of_json = (
    anything
    | st.fixed_dictionaries({"instances": anything | st.lists(st.fixed_dictionaries({"b64": texts | anything}))})
    | st.fixed_dictionaries({"inputs": st.lists(tensors, max_size=2) | anything, "id": anything})
)


@given(requests_of_json, st.booleans())
@hypothesis_settings(max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_json_of_any_kind_is_parsed_into_images_and_errors_and_answered(value, as_bytes):
    import numpy as np

    from handler import errors, request_parsing
    from predictor.pillow_preprocessing import ImageError as Error

    shape, found = request_parsing.parse({"body": json.dumps(value).encode() if as_bytes else value}, {"body"}, 256)
    assert found
    assert all(isinstance(image, (bytes, np.ndarray, Error)) for image in found.values())
    for image in found.values():
        if isinstance(image, np.ndarray):
            assert (image.dtype, image.ndim, image.shape[-1]) == (np.uint8, 3, 3)
    outcomes = {name: image if isinstance(image, Error) else {"7": 1.0} for name, image in found.items()}
    answer, cause = request_parsing.answer(shape, outcomes, "digits", "1.0")
    assert (cause is None) == any(isinstance(outcome, dict) for outcome in outcomes.values()) or "error" in answer
    assert cause is None or (answer["code"], answer["type"]) == (errors.STATUSES[cause][0], cause)
