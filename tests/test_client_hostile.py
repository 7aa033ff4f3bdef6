"""The HTTP clients against servers that mean them harm, against a server's poison image, and over TLS."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from clients.python import classify
from clients.python.classify import LARGEST_RESPONSE, ClassifierError, Client, Unavailable, main
from clients.web import serve
from tests.test_client_python import ANSWER, Scripted, by_name, folder_of, in_turn, quick, read_rows, scripted
from tests.test_security import certificate

__all__ = ["quick"]  # a fixture

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\nclassify.py: all is well"


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that writes whatever `answer` writes to a connection on which a request has begun."""
    over = threading.Event()

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            answer(connection)

    def accept() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_an_image_is_not_sent_to_where_a_redirect_leads(tmp_path, capsys, status):
    with scripted(in_turn((200, ANSWER))) as other:
        for location in (f"{other.url}/predictions/m", "//[", "http://[::1", "file:///etc/passwd"):
            with scripted(in_turn((status, ANSWER, {"Location": location}))) as server:
                with pytest.raises(ClassifierError, match=f"{status} .*sends to another address"):
                    Client(server.url, "m").classify(b"image")
                assert main([str(folder_of(tmp_path, 1)), "--url", server.url, "--model", "m"]) == 2
                assert capsys.readouterr().err.count("\n") == 1
        assert other.bodies == []


@pytest.mark.timeout(120)  # an answer without end is what this is about
@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"])
def test_an_answer_that_comes_byte_after_byte_ends_with_the_time_for_an_answer(begin):
    def drip(connection: socket.socket) -> None:
        connection.sendall(begin)
        while True:
            connection.sendall(b"1")
            time.sleep(0.02)

    with raw_server(drip) as url, pytest.raises(Unavailable, match=r"took too long|timed out"):
        Client(url, "m", timeout=0.5, retry_seconds=0).classify(b"image")


@pytest.mark.parametrize("head", ["Content-Length: 3000000000", "Connection: close", "Transfer-Encoding: chunked"])
def test_of_an_answer_without_end_no_more_is_read_than_an_answer_may_have(head):
    sent, over = 0, threading.Event()

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        block = b" " * (1 << 16)
        if "chunked" in head:
            block = b"10000\r\n" + block + b"\r\n"
        try:
            while sent < 3_000_000_000:
                connection.sendall(block)
                sent += len(block)
        finally:
            over.set()

    with raw_server(flood) as url:
        with pytest.raises(ClassifierError, match="response_too_long: more than 4,000,000 bytes"):
            Client(url, "m").classify(b"image")
        assert over.wait(60)  # the connection is closed, and not read to its end
    assert sent < LARGEST_RESPONSE + 50_000_000  # what sockets hold on the way


def test_an_answer_is_not_unpacked():
    packed = (200, gzip.compress(bytes(50_000_000)), {"Content-Encoding": "gzip"})
    with scripted(in_turn(packed)) as server, pytest.raises(ClassifierError, match="200 no_prediction"):
        Client(server.url, "m").classify(b"image")


@pytest.mark.parametrize("body", [b"[" * 1_000_000, b'{"a":' * 500_000, b"9" * 5_000, b"\xff" * 100, b'{"7": "x"}'])
@pytest.mark.parametrize("status", [200, 415])
def test_json_that_is_deep_huge_or_of_another_shape_is_an_error(tmp_path, capsys, status, body):
    with scripted(in_turn((status, body))) as server:
        assert main([str(folder_of(tmp_path, 1)), "--url", server.url, "--model", "m"]) == (2 if status == 200 else 1)
    said = capsys.readouterr()
    assert "no_prediction" in said.err if status == 200 else "415 http: Unsupported Media Type" in said.out
    assert (said.err + said.out).count("\n") == 1


def test_a_servers_escape_sequences_reach_neither_terminal_nor_table(tmp_path, capsys, caplog):
    folder, out = folder_of(tmp_path / "p", 4), tmp_path / "out.csv"
    refusal = {"type": ESCAPES, "message": ESCAPES * 1000}
    named = {"x-model-version": "1\x1b[2J", "x-model-weights-sha256": "\x9b31m"}
    answers = ((415, refusal), (200, {ESCAPES: 1.0}, named), (503, refusal), (404, refusal))
    with scripted(in_turn(*answers)) as server:
        common = [str(folder), "--url", server.url, "--model", "m", "--threads", "1"]
        assert main(common) == 2
        server.bodies.clear()
        assert main([*common, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "all is well" in said.err
    for line in [*said.out.split("\n"), *said.err.split("\n"), *caplog.messages]:
        assert line.isprintable()
        assert len(line) < 3_000
    table = (tmp_path / "out.csv.part").read_bytes().decode()
    assert "all is well" in table
    assert all(line.isprintable() for line in table.split("\r\n"))


def test_a_status_line_with_escape_sequences_is_told_without_them(tmp_path, capsys):
    with raw_server(lambda connection: connection.sendall(ESCAPES.encode() + b"\r\n\r\n")) as url:
        assert main([str(folder_of(tmp_path, 1)), "--url", url, "--model", "m", "--retry", "0"]) == 2
    error = capsys.readouterr().err
    assert error.removesuffix("\n").isprintable()


FORMULAS = ["=1+1.png", "+1.png", "-1.png", "@1.png", "'=1.png", "\t1.png", "plain.png"]


def test_no_cell_of_a_table_is_run_by_a_spreadsheet_and_resume_still_knows_the_names(tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    monkeypatch.chdir(tmp_path / "p")
    for name in FORMULAS:
        Path(name).write_bytes(name.encode())
    out, part = tmp_path / "out.csv", tmp_path / "out.csv.part"

    def answer(body: bytes, _: int) -> object:
        if body.startswith(b"@"):
            return 415, {"type": "=cmd|' /C calc'!A0", "message": "-"}
        return 200, {body.decode(): 0.5, "=2": 0.25}

    with scripted(answer) as server:
        command = [".", "--url", server.url, "--model", "=m", "--out", str(out)]
        assert main(command) == 1
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            assert not [cell for cell in row.values() if cell[:1] in tuple("=+-@\t\r")]
            name = row["image"].removeprefix("'")
            assert json.loads(row["predictions"] or "{}") == ({} if name == "@1.png" else {name: 0.5, "=2": 0.25})
        assert [row["image"].removeprefix("'") for row in rows] == sorted(FORMULAS)
        assert [row["label"].removeprefix("'") for row in rows if row["label"]] == [
            name.replace("\t", "\\t") for name in sorted(FORMULAS) if name != "@1.png"
        ]
        whole = out.read_bytes()
        for size in range(0, len(whole) + 1, 37):
            part.write_bytes(whole[:size])
            assert main([*command, "--resume"]) == 1
            assert out.read_bytes() == whole


# ── a poison image ───────────────────────────────────────────────────────────────────────────────────────────────────

DIED = (500, {"code": 500, "type": "InternalServerException", "message": "Worker died."})


class Batching:
    """A server that has one worker, which `poison` kills together with all that is asked at the same time."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running: list[bytes] = []
        self.deaths, self.down = 0, 0
        self.companions: dict[bytes, list[int]] = {}  # of each try: how many were asked at the same time

    def __call__(self, body: bytes, _: int) -> object:
        with self.changed:
            if self.down:  # the worker starts anew
                self.down -= 1
                return 503, {"type": "ServiceUnavailableException", "message": "no worker is up"}
            self.running.append(body)
            deaths = self.deaths
            self.changed.notify_all()
            if not body.startswith(b"poison"):
                self.changed.wait_for(lambda: self.deaths > deaths, 0.05)
            elif not self.companions:  # at first with others
                self.changed.wait_for(lambda: len(self.running) > 1, 10)
            self.companions.setdefault(body, []).append(len(self.running) - 1)
            if body.startswith(b"poison"):
                self.deaths, self.down = self.deaths + 1, 3
                self.changed.notify_all()
            self.running.remove(body)
            return DIED if self.deaths > deaths else by_name(b"0000")


@pytest.mark.parametrize("message", ["Worker died.", "Prediction failed", "Out of resources"])
def test_an_image_that_kills_its_worker_twice_is_a_row_with_an_error_and_its_neighbours_are_answered(
    quick, tmp_path, monkeypatch, message
):
    monkeypatch.setitem(DIED[1], "message", message)
    folder, out, server_of = folder_of(tmp_path / "p", 40), tmp_path / "out.jsonl", Batching()
    (folder / "0" / "0003.png").write_bytes(b"poison")
    with scripted(server_of) as server:
        assert main([str(folder), "--url", server.url, "--model", "m", "--out", str(out)]) == 1
    rows = read_rows(out)
    assert [row.image for row in rows] == [str(path) for path in sorted(folder.rglob("*.png"))]
    (bad,) = [row for row in rows if row.error]
    assert bad.image.endswith("0003.png")
    assert bad.error == (f"500 worker_died: the server failed 2 times at this image, the last time alone ({message})")
    assert len(server_of.companions[b"poison"]) == 2
    for tries in server_of.companions.values():
        assert set(tries[1:]) <= {0}  # whatever is asked again is asked alone


def test_a_server_whose_workers_die_at_every_image_ends_the_command(quick, tmp_path, capsys):
    with scripted(in_turn(DIED)) as server:
        command = [str(folder_of(tmp_path / "p", 40)), "--url", server.url, "--model", "m", "--threads", "1"]
        assert main([*command, "--out", str(tmp_path / "out.csv")]) == 2
    assert re.search(r"fails at every image \(500 .*Worker died", capsys.readouterr().err)
    assert len(read_rows(tmp_path / "out.csv.part")) == classify.DEADLY_IN_A_ROW - 1


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def over_tls(folder: Path) -> Iterator[Scripted]:
    """A scripted server behind a certificate of its own, localhost.pem; stranger.pem is another one."""
    certificate("localhost", folder, "127.0.0.1")
    certificate("stranger", folder, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "localhost.pem", folder / "localhost.key")

    def wrap(server: ThreadingHTTPServer) -> None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)

    with scripted(in_turn((200, ANSWER)), prepare=wrap) as script:
        script.url = script.url.replace("http:", "https:")
        yield script


def test_the_python_client_verifies_tls_by_a_certificate_that_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "localhost.pem"))  # what is around decides nothing
    (image,) = sorted(folder_of(tmp_path / "p", 1).rglob("*.png"))
    with over_tls(tmp_path) as server:
        assert Client(server.url, "m", cacert=tmp_path / "localhost.pem").classify(b"image") == ANSWER
        common = [str(image), "--url", server.url, "--model", "m"]
        assert main([*common, "--cacert", str(tmp_path / "localhost.pem")]) == 0
        assert json.loads(capsys.readouterr().out)["predictions"] == ANSWER
        asked = len(server.bodies)
        for options in ([], ["--cacert", str(tmp_path / "stranger.pem")]):
            assert main([*common, *options, "--retry", "1000"]) == 2  # and at once: no other try would help
            error = capsys.readouterr().err
            assert re.search("certificate verify failed.*name whom to trust with --cacert", error, re.I)
            assert error.count("\n") == 1
        assert len(server.bodies) == asked
    for path, words in ((tmp_path / "none.pem", "No such file"), (image, "name a PEM file")):
        assert main([*common, "--cacert", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_the_pages_server_verifies_tls_by_a_certificate_that_is_named(tmp_path, capsys):
    with over_tls(tmp_path) as server:
        for name, status in (("localhost.pem", 200), ("stranger.pem", 502), (None, 502)):
            with pages(torchserve=server.url, cacert=name and tmp_path / name) as url:
                reply = requests.post(f"{url}/predictions/m", data=b"image", timeout=30)
            assert reply.status_code == status
            assert reply.json() == ANSWER if status == 200 else reply.json()["type"] == "unreachable"
        assert server.bodies == [b"image"]
    for path, words in ((tmp_path / "none.pem", "No such file"), (Path(serve.__file__), "name a PEM file")):
        assert serve.main(["--torchserve", server.url, "--cacert", str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@contextlib.contextmanager
def pages(**options: object) -> Iterator[str]:
    with serve.create(**options) as server:  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


# ── the page's server ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [".", "..", "...", ".hidden", "a/..", "%2e%2e", "a/../b"])
def test_the_pages_server_forwards_no_path_that_leads_elsewhere(name):
    """Sent as it is: a client's own tidying of paths would hide it."""
    with scripted(in_turn((200, ANSWER))) as server, pages(torchserve=server.url) as url:
        host = url.removeprefix("http://")
        with socket.create_connection(host.split(":")) as connection:
            request = f"POST /predictions/{name} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1\r\n\r\nx"
            connection.sendall(request.encode())
            assert connection.makefile("rb").readline().split()[1] == b"404"
        assert server.bodies == []


def test_the_pages_server_forwards_no_answer_without_end():
    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(bytes(1 << 16))

    with raw_server(flood) as address, pages(torchserve=address) as url:
        reply = requests.post(f"{url}/predictions/m", data=b"image", timeout=60)
        assert (reply.status_code, reply.json()["type"]) == (502, "unreachable")
