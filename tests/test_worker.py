"""What the handler changes in TorchServe's worker: the same messages, read in fewer pieces, and fewer lines."""

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from handler import worker_startup
from tests.conftest import PROJECT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@contextlib.contextmanager
def upstream():
    """TorchServe's module as installed, whatever a handler of another test made of it; afterwards as it was."""
    from ts.protocol import otf_message_handler as module

    before = dict(vars(module))
    importlib.reload(module)
    try:
        yield module
    finally:
        vars(module).update(before)


@pytest.fixture
def protocol():
    with upstream() as module:
        yield module


def text(value):
    return struct.pack("!i", len(value)) + value


def message(requests):
    """As the frontend writes it: command, then for each request its id, headers and parameters."""
    parts = [b"I"]
    for number, (headers, parameters) in enumerate(requests):
        parts.append(text(b"%036d" % number))
        parts += [text(key) + text(value) for key, value in headers]
        parts.append(struct.pack("!i", -1))
        parts += [text(name) + text(kind) + text(value) for name, kind, value in parameters]
        parts.append(struct.pack("!i", -1))
    return b"".join([*parts, struct.pack("!i", -1)])


def received(protocol, messages, pieces):
    """What the worker makes of messages that arrive in pieces of the given sizes."""
    ours, theirs = socket.socketpair()
    stream, sizes = b"".join(messages), iter(pieces)

    def write():
        sent = 0
        with theirs, contextlib.suppress(OSError):  # if the reader failed
            while sent < len(stream):
                size = next(sizes, len(stream))
                theirs.sendall(stream[sent : sent + size])
                sent += size

    thread = threading.Thread(target=write)
    thread.start()
    try:
        return [copy.deepcopy(protocol.retrieve_msg(ours)) for _ in messages]
    finally:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        for cell in protocol._retrieve_buffer.__closure__ or ():
            reader = getattr(cell.cell_contents, "__self__", None)
            if isinstance(reader, io.BufferedReader):
                reader.close()  # it holds the socket open
        ours.close()
        thread.join()


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=50)), max_size=4),
        st.lists(
            st.tuples(
                st.sampled_from([b"body", b"left"]),
                st.sampled_from([b"image/jpeg", b"", b"application/json", b"text/plain"]),
                st.binary(max_size=300) | st.just(b'{"b64": "AAAA"}') | st.just(bytes(300_000)),
            ),
            max_size=3,
        ),
    ),
    min_size=1,
    max_size=4,
)


@given(batches=st.lists(REQUESTS, min_size=1, max_size=3), pieces=st.lists(st.integers(1, 5000), max_size=20))
@hypothesis_settings(max_examples=50)
def test_messages_are_read_as_torchserve_reads_them_however_they_arrive(batches, pieces):
    messages = [message(batch) for batch in batches]
    with upstream() as protocol:
        expected = received(protocol, messages, pieces)
        worker_startup.read_ahead()
        assert received(protocol, messages, pieces) == expected


def test_a_negative_length_is_nothing_as_in_torchserve(protocol):
    none = struct.pack("!i", -5)
    request = b"I" + text(b"id") + text(b"name") + none + struct.pack("!i", -1) * 3
    expected = received(protocol, [request], [])
    worker_startup.read_ahead()
    assert received(protocol, [request], []) == expected
    assert expected[0][1][0]["headers"][0]["value"] == b""


def test_a_frontend_that_goes_away_ends_the_worker(protocol):
    worker_startup.read_ahead()
    with pytest.raises(SystemExit) as ended:
        received(protocol, [message([([], [(b"body", b"", b"x")])])[:-3]], [])
    assert ended.value.code == 0


def test_warnings_and_metrics_are_still_said(caplog):
    root, metrics = logging.getLogger(), logging.getLogger("ts.metrics")
    levels = root.level, metrics.level
    try:
        worker_startup.log_less()
        logging.info("Backend received inference at: 1")
        logging.warning("something is wrong")
        logging.getLogger("ts.metrics.caching_metric").info("[METRICS]PredictionTime.ms:1")
    finally:
        root.setLevel(levels[0])
        metrics.setLevel(levels[1])
    assert [record.message for record in caplog.records] == ["something is wrong", "[METRICS]PredictionTime.ms:1"]


def left_alone(protocol, caplog, *arguments):
    """Whether `tune` patches nothing, and what it says. JSON is left to the handler in any case."""
    before, level = dict(vars(protocol)), logging.getLogger().level
    try:
        worker_startup.tune(*arguments)
        changed = {name for name, value in vars(protocol).items() if before.get(name) is not value}
        said = [record.message for record in caplog.records]
        assert os.environ["TS_DECODE_INPUT_REQUEST"] == "false"
        return not changed, said
    finally:
        logging.getLogger().setLevel(level)
        logging.getLogger("ts.metrics").setLevel(logging.NOTSET)


def test_the_worker_of_another_release_is_left_as_it_is_and_the_log_says_so(protocol, caplog, monkeypatch):
    monkeypatch.setattr("os.environ", {})
    assert left_alone(protocol, caplog) == (False, [])  # of the installed one, for which it was written
    monkeypatch.setattr("os.environ", {})
    importlib.reload(protocol)
    monkeypatch.setattr("ts.__version__", "0.13.0")
    is_left, (warning,) = left_alone(protocol, caplog)
    assert is_left
    assert "0.13.0 is not 0.12.x" in warning


def test_the_operator_can_switch_the_changes_off(protocol, caplog, monkeypatch):
    monkeypatch.setattr("os.environ", {})
    assert left_alone(protocol, caplog, False) == (True, [])


@pytest.fixture
def started(tmp_path):
    """A function that starts Python as TorchServe starts a worker, with an archive's settings; whether torch waits."""
    shutil.copy(PROJECT / "handler" / "sitecustomize.py", tmp_path)

    def start(settings, version=None):
        (tmp_path / "model-config.yaml").write_text(settings)
        if version:
            (tmp_path / "ts").mkdir()
            (tmp_path / "ts" / "__init__.py").touch()
            (tmp_path / "ts" / "version.txt").write_text(version)
        code = "import sys; print(any(getattr(one, '__name__', '') == 'LazyTorch' for one in sys.meta_path))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip() == "True", done.stderr

    return start


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        *(("", True), ("patch_worker: true\n", True), ("# patch_worker: false\n", True)),
        *(("topk: 5\npatch_worker: false  # see there\n", False), ("patch_worker: off\n", False)),
    ],
)
def test_torch_waits_for_its_first_use_unless_a_setting_says_otherwise(started, settings, expected):
    assert started(settings) == (expected, "")
    assert (yaml.safe_load(settings) or {}).get("patch_worker", True) == expected


def test_with_another_torchserve_torch_is_loaded_as_ever_and_the_log_says_so(started):
    waits, said = started("", version="0.13.0\n")
    assert not waits
    assert "TorchServe 0.13.0 is not 0.12.x" in said
    assert said.count("\n") == 1


def test_both_files_are_written_for_the_same_release():
    source = (PROJECT / "handler" / "sitecustomize.py").read_text()
    assert f'TORCHSERVE = "{worker_startup.TORCHSERVE}"' in source


def test_json_bodies_arrive_as_values_and_are_left_as_bytes_for_our_handler(protocol, monkeypatch):
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")  # as upstream; and undone afterwards
    body = json.dumps({"b64": "AAAA"}).encode()
    for change, expected in ((lambda: None, {"b64": "AAAA"}), (worker_startup.leave_json, body)):
        change()
        worker_startup.read_ahead()  # of one connection
        ((_, (request,)),) = received(protocol, [message([([], [(b"body", b"application/json", body)])])], [])
        assert request["parameters"][0]["value"] == expected
