"""The HTTP client where servers fail: against one that does what a test says, and a real one that is killed."""

from __future__ import annotations

import ast
import contextlib
import csv
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clients.python import classify
from clients.python.classify import (
    IN_FLIGHT,
    SUFFIXES,
    ClassifierError,
    Client,
    KeyFileError,
    Row,
    Unavailable,
    classify_files,
    find_images,
    main,
)
from launcher import Ports, serving
from tests.conftest import PROJECT, replace_in_archive

PROGRAM = PROJECT / "clients" / "python" / "classify.py"
ANSWER = {"cat": 0.75, "dog": 0.25}
REFUSED_KEY = (400, {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."})


@dataclass
class Scripted:
    """A server whose answer to each request is decided by `answer(body, place of the request)`.

    An answer is (status, JSON) or (status, JSON, headers); None closes the connection without a word; text is sent
    as it is and the connection closed. With `key` set, requests without it are refused as TorchServe refuses them.
    """

    answer: Callable[[bytes, int], object]
    key: str = ""
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def scripted(
    answer: Callable[[bytes, int], object],
    key: str = "",
    prepare: Callable[[ThreadingHTTPServer], object] = lambda _: None,
) -> Iterator[Scripted]:
    script = Scripted(answer, key)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # headers and body leave together
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            with script.lock:
                place = len(script.bodies)
                script.bodies.append(body)
                script.keys.append(token)
                script.times.append(time.monotonic())
            reply = script.answer(body, place)
            if token != script.key:
                reply = REFUSED_KEY
            if reply is None or isinstance(reply, str):
                self.wfile.write((reply or "").encode())
                self.close_connection = True
                return
            status, values, *headers = reply
            text = json.dumps(values).encode() if not isinstance(values, bytes) else values
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:  # clients that gave up, or were killed
            pass

    server = Server(("127.0.0.1", 0), Handler)
    prepare(server)
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def in_turn(*replies: object) -> Callable[[bytes, int], object]:
    """The replies one after the other; the last one for ever."""
    return lambda _, place: replies[min(place, len(replies) - 1)]


def folder_of(root: Path, count: int) -> Path:
    """Files that are named like images and hold their own name."""
    for i in range(count):
        path = root / f"{i % 3}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(path.name.encode())
    return root


def by_name(body: bytes, _: int = 0) -> object:
    """An answer that differs for each image; each seventh is refused."""
    number = int(body[:4])
    if number % 7 == 3:
        return 415, {"code": 415, "type": "not_an_image", "message": 'no "image",\nbut lines'}
    return 200, {f"label {number}": 1 / (number + 2), "other, label": 0.0}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "FIRST_WAIT", 0.001)


# ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 507])
def test_a_server_that_fails_for_a_while_is_asked_again(quick, status):
    failure = (status, {"code": status, "type": "ServiceUnavailableException", "message": "no worker is up"})
    with scripted(in_turn(failure, failure, failure, (200, ANSWER))) as server:
        assert Client(server.url, "m").classify(b"image") == ANSWER
    assert server.bodies == [b"image"] * 4


@pytest.mark.parametrize(
    "lost",
    [None, "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"],
)
def test_a_lost_connection_is_asked_again(quick, lost):
    with scripted(in_turn(lost, lost, (200, ANSWER))) as server:
        assert Client(server.url, "m").classify(b"image") == ANSWER
    assert len(server.bodies) == 3


def test_several_images_in_a_request_are_asked_again_too(quick):
    with scripted(in_turn(None, (503, {}), (200, {"a": ANSWER, "b": ANSWER}))) as server:
        assert Client(server.url, "m").classify_many({"a": b"1", "b": b"2"}) == {"a": ANSWER, "b": ANSWER}
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "type"), [(400, "empty"), (413, "too_many_pixels"), (415, "not_an_image"), (422, "truncated")]
)
def test_an_image_that_is_refused_is_not_asked_again(status, type):
    with scripted(in_turn((status, {"code": status, "type": type, "message": "why"}))) as server:
        with pytest.raises(ClassifierError, match=f"{status} {type}: why") as caught:
            Client(server.url, "m").classify(b"image")
        assert caught.value.is_about_the_image
    assert len(server.bodies) == 1


def test_a_refusal_of_every_image_is_final_and_known_as_such():
    with scripted(in_turn((404, {"code": 404, "type": "ModelNotFoundException", "message": "none"}))) as server:
        with pytest.raises(ClassifierError, match="404 ModelNotFoundException") as caught:
            Client(server.url, "m").classify(b"image")
        assert not caught.value.is_about_the_image
    assert len(server.bodies) == 1


@pytest.mark.parametrize("body", [b"<html>", [], {}])
def test_an_answer_without_labels_is_an_error(body):
    with scripted(in_turn((200, body))) as server, pytest.raises(ClassifierError, match="200 no_prediction"):
        Client(server.url, "m").classify(b"image")


def test_retry_after_is_waited_for(quick):
    with scripted(in_turn((503, {}, {"Retry-After": "1"}), (200, ANSWER))) as server:
        assert Client(server.url, "m").classify(b"image") == ANSWER
    first, second = server.times
    assert second - first >= 0.99


def test_retry_after_may_be_a_date(monkeypatch):
    reply = classify.requests.Response()
    assert classify._retry_after(reply) == 0
    for value, low, high in [("7", 7, 7), (formatdate(time.time() + 100, usegmt=True), 50, 101), ("soon", 0, 0)]:
        reply.headers["Retry-After"] = value
        assert low <= classify._retry_after(reply) <= high
    reply.headers["Retry-After"] = formatdate(0, usegmt=True)
    assert classify._retry_after(reply) == 0


def test_a_wait_longer_than_the_retry_time_is_not_begun():
    refused = pytest.raises(Unavailable, match=r"429 http.*asks to wait 3600 s")
    with scripted(in_turn((429, {}, {"Retry-After": "3600"}))) as server, refused:
        Client(server.url, "m", retry_seconds=60).classify(b"image")
    assert len(server.bodies) == 1


def test_asking_ends_with_the_retry_time_and_says_what_the_server_said():
    failure = (503, {"code": 503, "type": "ServiceUnavailableException", "message": "no worker"})
    said = r"no response within 0\.5 s \(503 ServiceUnavailableException: no worker"
    given_up = pytest.raises(Unavailable, match=said)
    with scripted(in_turn(failure)) as server, given_up:
        Client(server.url, "m", retry_seconds=0.5).classify(b"image")
    assert len(server.bodies) > 1
    with pytest.raises(Unavailable, match="Connection refused"):  # the server is gone
        Client(server.url, "m", retry_seconds=0).classify(b"image")
    assert not Client(server.url, "m").is_healthy()


def test_an_outage_is_told_once_and_not_by_each_thread(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(classify, "FIRST_WAIT", 2.1)
    failing = threading.Barrier(4)

    def fail_together(_, place):
        if place < 4:
            failing.wait(30)
        return (503, {}) if place < 8 else (200, ANSWER)

    with scripted(fail_together) as server:
        rows = list(classify_files(Client(server.url, "m"), find_images([folder_of(tmp_path, 4)]), threads=4))
    assert [row.predictions for row in rows] == [ANSWER] * 4
    assert len(server.bodies) == 12
    (message,) = caplog.messages
    assert message == f"{server.url}: 503 http: Service Unavailable; asking again for up to 60 s"


def test_the_waits_grow_differ_and_stay_bounded():
    for attempt, full in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 6.4, 6.4]):
        waits = {classify._back_off(attempt) for _ in range(20)}
        assert len(waits) > 1
        assert all(full / 2 <= wait <= full for wait in waits)
    assert classify._back_off(100_000) <= 6.4


def test_a_slow_answer_is_given_up_and_asked_for_again(quick):
    over = threading.Event()

    def slow_at_first(_, place):
        if place == 0:
            over.wait(30)
        return 200, ANSWER

    with scripted(slow_at_first) as server:
        try:
            assert Client(server.url, "m", timeout=0.5).classify(b"image") == ANSWER
            assert len(server.bodies) > 1
        finally:
            over.set()


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_key(path: Path, key: str) -> Path:
    path.write_text(json.dumps({"inference": {"key": key}}))
    return path


def test_a_key_that_the_server_has_changed_is_read_again(tmp_path):
    path = write_key(tmp_path / "key_file.json", "old")
    with scripted(in_turn((200, ANSWER)), key="old") as server:
        client = Client(server.url, "m", key_file=path)
        assert client.classify(b"1") == ANSWER
        server.key = "new"
        write_key(path, "new")
        assert client.classify(b"2") == client.classify(b"3") == ANSWER
    assert server.keys == ["old", "old", "new", "new"]


def test_a_key_file_that_is_missing_or_half_written_is_waited_for(quick, tmp_path):
    path = write_key(tmp_path / "key_file.json", "old")

    def restart(_, place):
        path.write_text('{"inference": {"ke')
        threading.Timer(0.2, path.unlink).start()
        threading.Timer(0.4, write_key, (path, "new")).start()

    with scripted(lambda body, place: restart(body, place) if place == 0 else (200, ANSWER), key="new") as server:
        assert Client(server.url, "m", key_file=path).classify(b"image") == ANSWER
    assert set(server.keys[:-1]) == {"old"}
    assert server.keys[-1] == "new"


def test_a_wrong_key_is_refused_at_once(tmp_path):
    path = write_key(tmp_path / "key_file.json", "of another server")
    with scripted(in_turn((200, ANSWER)), key="right") as server:
        for client in (Client(server.url, "m", "wrong"), Client(server.url, "m", key_file=path)):
            with pytest.raises(ClassifierError, match="400 InvalidKeyException") as caught:
                client.classify(b"image")
            assert not caught.value.is_about_the_image
    assert len(server.bodies) == 2


def test_a_key_file_without_a_key_is_named(tmp_path):
    with pytest.raises(KeyFileError, match=r"none\.json: No such file"):
        Client("http://127.0.0.1:1", "m", key_file=tmp_path / "none.json")
    for text in ("{", "[]", '{"management": {}}'):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(KeyFileError, match=r"keys\.json: holds no inference key"):
            Client("http://127.0.0.1:1", "m", key_file=tmp_path / "keys.json")
    with pytest.raises(ValueError, match="both a token and a key file"):
        Client("http://127.0.0.1:1", "m", "token", key_file=tmp_path / "keys.json")


# ── many images ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_keep_their_order_whatever_order_the_answers_come_in(quick, tmp_path):
    rng = random.Random(0)

    def sometimes_late(body, place):
        time.sleep(rng.random() / 50)
        return (503, {}) if rng.random() < 0.1 else by_name(body)

    images = list(find_images([folder_of(tmp_path, 200)]))
    with scripted(sometimes_late) as server:
        rows = list(classify_files(Client(server.url, "m"), images, threads=8))
    assert [row.image for row in rows] == [str(path) for path in images]
    for path, row in zip(images, rows, strict=True):
        status, values = by_name(path.read_bytes())
        assert row.predictions == (values if status == 200 else {})
        assert bool(row.error) == (status != 200)


def test_images_without_end_take_no_memory_without_end(tmp_path):
    (image,) = find_images([folder_of(tmp_path, 1)])
    taken = itertools.count()
    endless = (image for _ in taken)
    with scripted(by_name) as server:
        rows = classify_files(Client(server.url, "m"), endless, threads=2)
        assert len(list(itertools.islice(rows, 300))) == 300
        rows.close()
    assert next(taken) <= 300 + 2 * IN_FLIGHT


def test_a_file_that_cannot_be_read_is_a_row_with_an_error(tmp_path):
    folder = folder_of(tmp_path, 2)
    (folder / "0" / "0001.png").symlink_to(tmp_path / "nowhere")
    with scripted(by_name) as server:
        rows = list(classify_files(Client(server.url, "m"), find_images([folder])))
    assert [row.error for row in rows] == ["", "cannot be read: No such file or directory", ""]


def test_all_rows_before_the_end_of_a_server_are_given_out(tmp_path):
    images = list(find_images([folder_of(tmp_path, 40)]))
    bad = images[20].read_bytes()
    with scripted(lambda body, _: None if body == bad else by_name(body)) as server:
        rows = classify_files(Client(server.url, "m", retry_seconds=0.2), images, threads=4)
        assert [next(rows).image for _ in range(20)] == [str(path) for path in images[:20]]
        with pytest.raises(Unavailable, match=re.escape(f"{images[20]}: {server.url}: no response")):
            next(rows)


def test_folders_are_searched_in_the_order_of_the_names(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/y/x.webp", "a.tiff", "a/.hidden.png", ".git/x.png", "__MACOSX/x.png", "n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "y")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["a/y/x.webp", "a/z.jpg", "a.tiff", "b.PNG", "linked/x.webp"]
    assert list(find_images([tmp_path / "n.txt"])) == [tmp_path / "n.txt"]  # what is named is asked about


def test_the_names_of_images_are_those_of_the_model():
    """With the extra for HEIC installed there, which a client cannot know."""
    from predictor import pillow_preprocessing

    assert SUFFIXES == pillow_preprocessing.SUFFIXES


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_rows(path: Path) -> list[Row]:
    """As another program would read the file."""
    if ".jsonl" in path.suffixes:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [Row(line["image"], line.get("predictions", {}), line.get("error", "")) for line in lines]
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        answer = json.loads(row["predictions"] or "{}")
        assert (row["label"], row["probability"]) == next(((n, str(v)) for n, v in answer.items()), ("", ""))
    return [Row(row["image"], json.loads(row["predictions"] or "{}"), row["error"]) for row in rows]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_command_writes_a_row_for_each_image(tmp_path, capsys, kind):
    folder, out = folder_of(tmp_path / "images", 30), tmp_path / f"predictions.{kind}"
    with scripted(by_name) as server:
        assert main([str(folder), "--url", server.url, "--model", "m", "--out", str(out)]) == 1
        assert capsys.readouterr().out == ""
        assert main([str(folder), "--url", server.url, "--model", "m"]) == 1
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = read_rows(out)
    assert [row.image for row in rows] == [str(path) for path in sorted(folder.rglob("*.png"))]
    assert sum(bool(row.error) for row in rows) == 4
    assert [line["image"] for line in printed] == [row.image for row in rows]
    assert [line.get("predictions", {}) for line in printed] == [row.predictions for row in rows]
    assert [line.get("error", "") for line in printed] == [row.error for row in rows]
    assert {line["model"] for line in printed if "predictions" in line} == {"m"}
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_run_that_was_stopped_at_any_byte_is_continued_without_loss(tmp_path, kind):
    names = ["plain.png", "a,comma.png", 'a"quote.png', "ä.png", "two\r\nlines.png", "zz.png"]
    names += [os.fsdecode(b"not \xff unicode.png"), "image.png"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"%04d" % len(name))
    out, images = tmp_path / f"predictions.{kind}", list(find_images([tmp_path / "images"]))
    command = [str(tmp_path / "images"), "--model", "m", "--out", str(out), "--resume"]
    with scripted(by_name) as server:
        assert main([*command, "--url", server.url]) == 1  # --resume with nothing to resume
        whole = out.read_bytes()
        assert [row.image for row in read_rows(out)] == [str(path) for path in images]
        part = tmp_path / f"predictions.{kind}.part"
        ends = set()
        for size in range(len(whole) + 1):
            part.write_bytes(whole[:size])
            rest = find_images([tmp_path / "images"])
            done, refused, model = classify._keep(part, rest)
            kept = part.read_bytes()
            assert whole.startswith(kept)
            assert [*rest] == images[done:]
            assert model == ("m" if done > refused else "")
            assert refused == sum(bool(row.error) for row in read_rows(out)[:done])
            ends.add((done, len(kept)))
        assert sorted(done for done, _ in ends) == list(range(len(images) + 1))  # one end for each number of rows
        for size in (0, 5, len(whole) // 3, len(whole) - 1, len(whole)):
            part.write_bytes(whole[:size])
            assert main([*command, "--url", server.url]) == 1
            assert out.read_bytes() == whole
            assert not part.exists()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, str(PROGRAM), *map(str, arguments)], stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_killed_is_continued_where_it_was(tmp_path, kind, number, capsys):
    folder, undisturbed, out = folder_of(tmp_path / "p", 60), tmp_path / f"whole.{kind}", tmp_path / f"out.{kind}"
    part, released = tmp_path / f"out.{kind}.part", threading.Event()
    first = [path.read_bytes() for path in sorted(folder.rglob("*.png"))][:25]

    def answer_first(body, _):
        if not body:  # of a client that is gone
            return None
        if body not in first:
            released.wait(120)
        return by_name(body)

    with scripted(answer_first) as server:
        common = [str(folder), "--url", server.url, "--model", "m"]
        try:
            with started(*common, "--out", out, "--threads", "4") as process:
                wait_for(lambda: part.exists() and part.read_bytes().count(b".png") >= 20, process)
                process.send_signal(number)
                _, said = process.communicate(timeout=30)  # though four requests wait for their answers
                assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
            assert b"--resume goes on" in said or number == signal.SIGKILL
        finally:
            released.set()
        kept = part.read_bytes()
        part.write_bytes(kept + b'"half of a')
        assert main([*common, "--out", str(out)]) == 2
        assert "--resume goes on, or delete it" in capsys.readouterr().err
        asked = len(server.bodies)
        assert main([*common, "--out", str(out), "--resume"]) == 1
        again = set(server.bodies[asked:]) - {b""}  # what the killed command had begun to send may still arrive
        assert out.read_bytes().startswith(kept)
        rows = read_rows(out)
        everything = {path.read_bytes() for path in folder.rglob("*.png")}
        assert again == everything - set(re.findall(rb"\d{4}\.png", kept))  # none that had a row was asked about again
        assert main([*common, "--out", str(undisturbed)]) == 1
    assert out.read_bytes() == undisturbed.read_bytes()
    assert [row.image for row in rows] == [str(path) for path in sorted(folder.rglob("*.png"))]


@pytest.mark.parametrize("words", [["--out", "out.csv"], []])
def test_an_interrupt_in_the_instant_before_a_wait_is_seen(tmp_path, words):
    """Such a one does not wake the main thread; nor does one that another thread receives, which can be arranged."""
    folder, released = folder_of(tmp_path / "p", 4), threading.Event()

    def answer_later(body, _):
        released.wait(120)

    with scripted(answer_later) as server:
        arguments = [str(folder), "--url", server.url, "--model", "m", *words]
        program = f"""
import os, signal, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()  # which receives it
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
sys.path.insert(0, {str(PROJECT)!r})
from clients.python import classify
os._exit(classify.main({arguments!r}))
"""
        process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
        try:
            wait_for(lambda: len(server.bodies) == 4, process)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            released.set()
            process.kill()
            process.wait()


def test_a_file_of_other_images_is_not_continued(tmp_path, capsys):
    folder, out = folder_of(tmp_path / "p", 5), tmp_path / "out.csv"
    with scripted(by_name) as server:
        command = [str(folder), "--url", server.url, "--model", "m", "--out", str(out)]
        assert main(command) == 1
        out.rename(tmp_path / "out.csv.part")
        (folder / "0" / "0001.png").write_bytes(b"0001")
        assert main([*command, "--resume"]) == 2
        assert re.search(r"row 2 of .*0003\.png where .*0001\.png is now", capsys.readouterr().err)
        assert len(read_rows(tmp_path / "out.csv.part")) == 5
        for path in folder.rglob("*.png"):
            path.unlink()
        assert main([*command, "--resume"]) == 2
        assert "holds no images" in capsys.readouterr().err


def test_a_server_that_is_gone_ends_the_command_and_keeps_the_rows(tmp_path, capsys):
    folder, out = folder_of(tmp_path / "p", 20), tmp_path / "out.jsonl"
    with scripted(lambda body, place: by_name(body) if place < 10 else None) as server:
        command = [str(folder), "--url", server.url, "--model", "m", "--out", str(out), "--threads", "1"]
        assert main([*command, "--retry", "0.3"]) == 2
        said = capsys.readouterr().err
        assert "no response within 0.3 s" in said
        assert "out.jsonl.part holds the rows so far: --resume goes on" in said
        assert not out.exists()
        server.answer = by_name
        assert main([*command, "--resume"]) == 1
    assert len(read_rows(out)) == 20


def test_a_command_that_wrote_no_row_leaves_nothing_to_continue(tmp_path, capsys):
    folder, out = folder_of(tmp_path / "p", 2), tmp_path / "out.csv"
    with scripted(by_name, key="right") as server:
        command = [str(folder), "--url", server.url, "--model", "m", "--out", str(out)]
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "400 InvalidKeyException" in said
        assert "--resume" not in said
        assert main([*command, "--key-file", str(write_key(tmp_path / "keys.json", "right"))]) == 0
    assert len(read_rows(out)) == 2


def test_a_wrong_command_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "p", 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, said in [
        ([str(folder), "--resume"], "--resume goes on with a file; name it with --out"),
        ([str(folder), "--out", "predictions.txt"], "must end in .csv or .jsonl"),
        ([str(folder), "--threads", "0"], "--threads is 0; it must be at least 1"),
        ([str(tmp_path / "none")], "no such image or folder"),
        ([str(empty), "--out", str(tmp_path / "out.csv")], "holds no images"),
        ([str(folder), "--url", "nonsense"], "nonsense"),
        ([str(folder), "--key-file", str(tmp_path / "none.json")], "none.json: No such file"),
    ]:
        assert main([*arguments, "--model", "m"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("classify.py: ")
        assert said in line


def test_a_folder_without_images_is_a_mistake_without_out_too(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for options in ([], ["--out", str(tmp_path / "out.csv")]):
        assert main([str(tmp_path / "empty"), "--model", "m", *options]) == 2
        assert "empty: holds no images" in capsys.readouterr().err
    assert not (tmp_path / "out.csv.part").exists()


def test_two_commands_do_not_write_one_file(tmp_path, capsys):
    folder, out, released = folder_of(tmp_path / "p", 20), tmp_path / "out.csv", threading.Event()
    first = [path.read_bytes() for path in sorted(folder.rglob("*.png"))][:5]

    def answer_first(body, _):
        if body not in first:
            released.wait(120)
        return by_name(body)

    with scripted(answer_first) as server:
        common = [str(folder), "--url", server.url, "--model", "m", "--out", str(out)]
        part = tmp_path / "out.csv.part"
        try:
            with started(*common, "--threads", "1") as process:
                wait_for(lambda: part.exists() and part.read_bytes().count(b"\r\n") >= 6, process)
                before = part.read_bytes()
                for options in ([], ["--resume"]):
                    assert main([*common, *options]) == 2
                    said = capsys.readouterr().err
                    assert "another classify.py writes it" in said
                    assert "delete" not in said
                assert part.read_bytes() == before
                released.set()
                process.communicate(timeout=60)
                assert process.returncode == 1
        finally:
            released.set()
    assert [row.image for row in read_rows(out)] == [str(path) for path in sorted(folder.rglob("*.png"))]
    assert not part.exists()


def test_a_file_that_got_its_name_while_its_lock_was_waited_for_is_not_written(tmp_path, monkeypatch):
    """Opened before the first command ended, locked after it."""
    part, out = tmp_path / "out.csv.part", tmp_path / "out.csv"
    part.write_text("whole")
    monkeypatch.setattr(classify.fcntl, "flock", lambda *_: part.replace(out))
    with pytest.raises(classify.InUse), classify._locked(part):
        raise AssertionError
    assert out.read_text() == "whole"


def version(number: str) -> Callable[[bytes, int], object]:
    """Answers of a model that names its version and weights."""
    headers = {"x-model-version": number, "x-model-weights-sha256": number[0] * 64}
    return lambda body, _: (*by_name(body), headers)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_one_file_holds_the_answers_of_one_model(tmp_path, capsys, kind):
    folder, out = folder_of(tmp_path / "p", 30), tmp_path / f"out.{kind}"
    part, old, new = tmp_path / f"out.{kind}.part", version("1.0"), version("2.0")
    with scripted(lambda body, place: (old if place < 10 else new)(body, place)) as server:
        common = [str(folder), "--url", server.url, "--out", str(out), "--threads", "1"]
        for options in ([], ["--resume"]):  # changed in the middle; and before the command goes on
            assert main([*common, "--model", "m", *options]) == 2
            said = capsys.readouterr().err
            assert f"was classified by m/2.0@{'2' * 64}, the images before by m/1.0@{'1' * 64}" in said
            assert "--model m/1.0; " in said
            assert "--resume goes on, or delete it" in said
            assert len(read_rows(part)) == 10
        server.answer = old  # as TorchServe answers at /predictions/m/1.0
        assert main([*common, "--model", "m/1.0", "--resume"]) == 1
        assert len(read_rows(out)) == 30
        text = out.read_text()
        assert text.count(f"m/1.0@{'1' * 64}") == sum(not row.error for row in read_rows(out))
        out.rename(part)
        assert main([*common, "--model", "other", "--resume"]) == 1  # nothing is left to ask
        server.answer = new
        assert main([*common, "--model", "m"]) == 1  # anew
        assert f"m/2.0@{'2' * 64}" in out.read_text()


def test_a_file_of_an_earlier_version_of_the_program_is_not_continued_and_not_cut(tmp_path, capsys):
    folder = folder_of(tmp_path / "p", 3)
    first, *_ = find_images([folder])
    row = f'{first},cat,0.5,,"{{""cat"": 0.5}}"'
    for kind, before in (
        ("csv", f"image,label,probability,error,answer\r\n{row}\r\n"),
        ("csv", f"image,label,probability,error,answer,model\r\n{row},m\r\n"),
        ("jsonl", json.dumps({"image": str(first), "answer": {"cat": 0.5}, "model": "m"}) + "\n"),
    ):
        part, out = tmp_path / f"out.{kind}.part", tmp_path / f"out.{kind}"
        part.write_text(before, newline="")
        with scripted(by_name) as server:
            assert main([str(folder), "--url", server.url, "--model", "m", "--out", str(out), "--resume"]) == 2
        assert "another version of classify.py" in capsys.readouterr().err
        assert part.read_bytes() == before.encode()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch):
    with classify._Progress(3, 1) as progress:
        progress._next = 0
        progress.step()
        progress.step()  # the next line is ten seconds away
    assert re.fullmatch(r"2 of 3 images, \d+ a second\n", capsys.readouterr().err)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with classify._Progress(3, 1) as progress:
        progress.step()
        progress.step()
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    with classify._Progress(3, 1) as progress:
        progress._next = 0
        progress.step()
    assert capsys.readouterr().err.startswith("2 of 3 images")


# ── a real server ────────────────────────────────────────────────────────────────────────────────────────────────────


# What is added to the archive's handler: a worker that dies of an image.
DEADLY = """
import os
_handle = ClassifierHandler.handle


def _deadly(self, data, context):
    if any(bytes(row.get("body") or row.get("data") or b"") == b"poison" for row in data):
        os._exit(1)
    return _handle(self, data, context)


ClassifierHandler.handle = _deadly
"""


@pytest.mark.server
@pytest.mark.timeout(600)  # two starts of TorchServe, and of the trained run where nothing has asked for it before
def test_a_torchserve_that_is_killed_and_started_anew_costs_no_image(exported, run, tmp_path, capsys, monkeypatch):
    import psutil

    samples = [path.read_bytes() for path in sorted((run / "samples").iterdir())]
    images = tmp_path / "images"
    images.mkdir()
    for i in range(300):
        (images / f"{i:03}.png").write_bytes(b"no image" if i % 50 == 7 else samples[i % len(samples)])
    archive, folder, ports = tmp_path / "digits.mar", tmp_path / "server", Ports.free()
    slow = "batchSize: 32\nmaxBatchDelay: 30\nminWorkers: 1\nmaxWorkers: 1\n"  # so that it is killed in the middle
    with zipfile.ZipFile(exported / "digits.mar") as files:
        deadly = files.read("classifier_handler.py").decode() + DEADLY
    replace_in_archive(exported / "digits.mar", archive, {"model-config.yaml": slow, "classifier_handler.py": deadly})
    out, part = tmp_path / "out.csv", tmp_path / "out.csv.part"

    with contextlib.ExitStack() as stack:
        with serving([archive], folder, ports=ports) as server:
            first_key = server.key()
            common = [images, "--model", "digits", "--url", server.url, "--key-file", folder / "key_file.json"]
            client = stack.enter_context(started(*common, "--out", out, "--retry", "200"))
            wait_for(lambda: part.exists() and part.read_bytes().count(b".png") >= 60, client)
            family = psutil.Process(server.process.pid).children(recursive=True)
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            assert family
            assert not psutil.wait_procs(family, timeout=30)[1]
            assert 60 <= part.read_bytes().count(b".png") < 300
        assert client.poll() is None
        with serving([archive], folder, ports=ports) as server:
            assert server.key() != first_key
            _, said = client.communicate(timeout=200)
            assert client.returncode == 1, said
            assert b"300 images, 6 refused" in said
            (tmp_path / "poison").mkdir()
            for name, body in (("0.png", b"poison"), ("1.png", samples[0]), ("2.png", samples[1])):
                (tmp_path / "poison" / name).write_bytes(body)
            assert main([str(tmp_path / "poison"), *map(str, common[1:]), "--out", str(tmp_path / "poison.csv")]) == 1
            bad, *good = read_rows(tmp_path / "poison.csv")
            assert re.search(r"worker_died: the server failed 2 times at this image", bad.error)
            assert [(row.error, len(row.predictions)) for row in good] == [("", 5)] * 2
            undisturbed = tmp_path / "undisturbed.csv"
            assert main([*map(str, common), "--out", str(undisturbed)]) == 1
            (tmp_path / "seven.png").write_bytes(samples[0])
            (tmp_path / "key_file.json").symlink_to(folder / "key_file.json")
            monkeypatch.chdir(tmp_path)
            monkeypatch.syspath_prepend(str(PROGRAM.parent))
            examples = re.findall(r"^```python\n(.*?)^```$", (PROGRAM.parent / "README.md").read_text(), re.M | re.S)
            run_examples(examples, server.url, capsys)
    rows = read_rows(out)
    assert [row.image for row in rows] == [str(path) for path in sorted(images.iterdir())]
    for row, expected in zip(rows, read_rows(undisturbed), strict=True):
        assert (row.image, row.error) == (expected.image, expected.error)
        assert row.predictions == pytest.approx(expected.predictions, abs=1e-5)
    assert sum(row.error.startswith("415 not_an_image") for row in rows) == 6


def run_examples(examples: list[str], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The programs of clients/python/README.md, in a folder that holds the files that they name."""
    assert examples
    capsys.readouterr()
    for example in examples:
        assert "http://127.0.0.1:8080" in example
        exec(compile(example.replace("http://127.0.0.1:8080", url), "README.md", "exec"), {})
    first, *rows = capsys.readouterr().out.splitlines()
    assert len(ast.literal_eval(first)) == 5
    assert [row.split()[0] for row in rows] == [f"images/{i:03}.png" for i in range(300)]
