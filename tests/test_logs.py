"""What strangers can have written to the console and the logs, without a key: little, and its size is bounded."""

import contextlib
import re
import socket

import grpc
import pytest
import requests

from launcher import Ports, serving
from tests.grpc_call import predict

pytestmark = pytest.mark.server

ATTEMPTS = 600
TRACE = 2_500  # bytes of a line with a stack trace, at the most
CONSOLE, FILE = 200, 500  # lines, of this many attempts: log4j2.xml lets through a first 100 and 300


@pytest.fixture(scope="module")
def own(exported, tmp_path_factory):
    with serving([exported / "digits.mar"], tmp_path_factory.mktemp("logs"), ports=Ports.free()) as server:
        yield server


@pytest.fixture
def written(own):
    """{name of a log: bytes that it has grown by}, when called."""

    def sizes():
        return {path.name: path.stat().st_size for path in (own.folder / "logs").iterdir()}

    before = sizes()
    return lambda: {name: size - before.get(name, 0) for name, size in sizes().items()}


def send(server, text):
    with socket.create_connection(("127.0.0.1", server.ports.inference), timeout=30) as connection:
        connection.sendall(text)
        with contextlib.suppress(OSError):
            while connection.recv(4096):
                pass


def test_stack_traces_of_broken_requests_are_bounded(own, written):
    chunk = b"POST /predictions/digits HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
    for _ in range(ATTEMPTS):
        send(own, chunk)
    grown = written()
    assert grown["console.log"] < CONSOLE * TRACE
    assert 0 < grown["ts_log.log"] < FILE * TRACE
    text = (own.folder / "logs" / "ts_log.log").read_text()
    assert 0 < len([line for line in text.splitlines() if "IllegalArgumentException" in line]) <= FILE
    assert not re.search(r"^\s+at ", text, re.MULTILINE)  # a trace is one line


def test_what_an_exception_repeats_of_a_body_is_cut(own, written):
    headers = {"Authorization": f"Bearer {own.key()}", "Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(3):
        assert (
            requests.post(
                f"{own.url}/predictions/digits", data=b"%zz" * 10_000, headers=headers, timeout=30
            ).status_code
            >= 400
        )
    assert all(size < 3 * (TRACE + 4_000) for size in written().values())


def test_a_long_uri_is_cut_in_the_access_log_and_the_status_is_kept(own, written):
    with requests.Session() as session:
        for _ in range(ATTEMPTS):
            session.get(f"{own.url}/predictions/{'a' * 3_900}", timeout=30)
    assert 0 < written()["access_log.log"] < ATTEMPTS * 400
    last = (own.folder / "logs" / "access_log.log").read_text().splitlines()[-1]
    assert re.search(r"/predictions/a+\.\.\. HTTP/1.1\" 400 \d+$", last), last


def test_json_that_is_none_writes_nothing(own, written):
    headers = {"Authorization": f"Bearer {own.key()}", "Content-Type": "application/json"}
    for _ in range(20):
        assert requests.post(f"{own.url}/predictions/digits", data=b"{", headers=headers, timeout=30).status_code == 400
    grown = written()
    assert grown.pop("access_log.log") < 20 * 400
    assert not any(grown.values()), grown


def test_grpc_without_a_key_writes_no_stack_traces(own, written):
    for _ in range(50):
        with pytest.raises(grpc.RpcError):
            predict(own, {"data": b"x"}, key="wrong")
    assert written()["console.log"] == 0
