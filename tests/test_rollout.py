"""A new version brought into a real TorchServe that answers clients all the while."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import requests
from onnx import numpy_helper

from deploy.rollout import Archive, Failed, TorchServeClient, rollout, steps
from deploy.rollout import __main__ as command
from launcher import Ports, serving
from predictor.pillow_preprocessing import crop, decode
from predictor.spec import ModelSpec
from tests.conftest import PROJECT

pytestmark = pytest.mark.server

# The time-out is what each drain waits for; where requests are slow or time is short, it is longer. The handler answers
# late what asks for it.
SETTINGS = "backend: onnx\nbatchSize: 8\nmaxBatchDelay: 1\nresponseTimeout: {}\n"
PATIENT = {"model-config_yaml": SETTINGS.format(6)}
BEGIN = "        started, latest = time.perf_counter(), time.monotonic() + FORWARD_SECONDS\n"
SLOW = '        if context.get_request_header(0, "x-slow"):\n            time.sleep(1.0)\n'


@dataclass
class Site:
    """A server that allows rollouts, its store, and archives for it with versions never used before."""

    server: TorchServeClient
    store: Path
    key_file: Path
    files: dict[str, bytes]  # of an archive
    folder: Path
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))
    golden: dict[str, dict] = field(default_factory=dict)  # by version

    def archive(self, *, version: str | None = None, **changes: str | bytes) -> Path:
        """Answers differently from every other version. `changes` replace files; dots in their names are _."""
        version = version or f"{next(self.numbers)}.0"
        files = dict(self.files)
        spec = json.loads(files["spec.json"])
        golden = json.loads(files["golden.json"])
        files["digits.crops.onnx"] = turned(files["digits.crops.onnx"], int(version.split(".")[0]))
        session = onnxruntime.InferenceSession(files["digits.crops.onnx"])
        bodies = [Archive.read(self.store / "digits.mar").images[i] for i in range(len(golden["images"]))]
        crops = np.stack([crop(decode(body), ModelSpec.from_json(files["spec.json"]).rule) for body in bodies])
        golden["probabilities"] = session.run(None, {"images": crops})[0].tolist()
        files["golden.json"] = json.dumps(golden).encode()
        files["spec.json"] = json.dumps(spec | {"weights_sha256": f"{version.replace('.', ''):0>64}"}).encode()
        manifest = json.loads(files["MAR-INF/MANIFEST.json"])
        manifest["model"]["modelVersion"] = version
        files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
        for name, content in changes.items():
            stem, _, suffix = name.rpartition("_")
            files[f"{stem}.{suffix}"] = content if isinstance(content, bytes) else content.encode()
        self.golden[version] = golden
        return pack(files, self.folder / f"digits-{version}-new.mar")

    def program(self, old: str, new: str, name: str = "classifier_handler.py") -> str:
        text = self.files[name].decode()
        assert old in text
        return text.replace(old, new, 1)

    def roll(
        self, path: Path, *, watch: float = 0, say: Callable[[str], object] = lambda _: None, **options: Any
    ) -> None:
        with reports_to(say):
            rollout(Archive.read(path), self.store, self.server, watch=watch, max_errors=0.01, **options)

    def arguments(self, path: Path, **replaced: str) -> list[str]:
        options = {
            "to": self.server.management,
            "inference": self.server.inference,
            "metrics": self.server.metrics,
            "key-file": str(self.key_file),
            "store": str(self.store),
        } | replaced
        return [str(path), *(word for name, value in options.items() for word in (f"--{name}", value))]

    def ask(self, i: int = 0, model: str = "digits", **headers: str) -> requests.Response:
        body = Archive.read(self.store / "digits.mar").images[i]
        headers = {"Authorization": f"Bearer {json.loads(self.key_file.read_text())['inference']['key']}", **headers}
        url = f"{self.server.inference}/predictions/{model}"
        return requests.post(url, data=body, headers=headers, timeout=20)

    @property
    def state(self) -> tuple[str, list[float], list[str]]:
        """What serves, what is registered, and the files of the store."""
        files = sorted(path.name for path in self.store.iterdir())
        return self.server.default("digits"), sorted(self.server.versions("digits")), files


@contextlib.contextmanager
def reports_to(say: Callable[[str], object]) -> Iterator[None]:
    """What the steps report, a line each."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    handler, level = Handler(), steps.log.level
    steps.log.addHandler(handler)
    steps.log.setLevel(logging.INFO)
    try:
        yield
    finally:
        steps.log.setLevel(level)
        steps.log.removeHandler(handler)


def turned(model: bytes, by: int) -> bytes:
    """The same network with its outputs moved on by so many labels, and a little sharper with each."""
    proto = onnx.load_from_string(model)
    last = [node for node in proto.graph.node if node.op_type in ("Gemm", "MatMul")][-1]
    for tensor in proto.graph.initializer:
        if tensor.name in last.input:
            values = numpy_helper.to_array(tensor)
            axis = values.shape.index(10)  # the labels
            values = np.roll(values, by, axis) * np.float32(1 + 0.05 * by)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return proto.SerializeToString()


def pack(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def site(exported, tmp_path_factory) -> Iterator[Site]:
    folder, store = tmp_path_factory.mktemp("rollout"), tmp_path_factory.mktemp("rollout-store")
    with zipfile.ZipFile(exported / "digits.mar") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["digits.crops.onnx"] = (exported / "digits.crops.onnx").read_bytes()
    files["model-config.yaml"] = SETTINGS.format(2).encode()
    text = files["classifier_handler.py"].decode()
    files["classifier_handler.py"] = text.replace(BEGIN, SLOW + BEGIN, 1).encode()
    assert SLOW.encode() in files["classifier_handler.py"]
    pack(files, store / "digits.mar")
    ports = Ports.free()
    with serving([store / "digits.mar"], folder, ports=ports, settings={"enable_model_api": "true"}) as running:
        keys = running.folder / "key_file.json"
        server = TorchServeClient(running.management_url, running.url, running.metrics_url, keys)
        one = Site(server, store, keys, files, tmp_path_factory.mktemp("rollout-archives"))
        one.golden["1.0"] = json.loads(files["golden.json"])
        yield one


@contextlib.contextmanager
def load(site: Site, threads: int, **headers: str) -> Iterator[list[list[tuple[int, requests.Response]]]]:
    """Clients that ask about golden images one after the other; what each was answered."""
    body = Archive.read(site.store / "digits.mar").images
    key = {"Authorization": f"Bearer {json.loads(site.key_file.read_text())['inference']['key']}"}
    end, seen = threading.Event(), [[] for _ in range(threads)]

    def client(mine: list) -> None:
        with requests.Session() as session:
            session.headers.update(key | headers)
            for i in itertools.cycle(range(len(body))):
                if end.is_set():
                    return
                try:
                    reply = session.post(f"{site.server.inference}/predictions/digits", data=body[i], timeout=60)
                except requests.RequestException as error:
                    reply = error
                mine.append((i, reply))

    running = [threading.Thread(target=client, args=(mine,)) for mine in seen]
    for one in running:
        one.start()
    try:
        yield seen
    finally:
        end.set()
        for one in running:
            one.join()


def check(site: Site, seen: list[list[tuple[int, requests.Response]]], old: str, new: str) -> None:
    """Each was answered, correctly for the version that it names, and no client by the old after the new."""
    for mine in seen:
        assert [reply for _, reply in mine if getattr(reply, "status_code", 0) != 200] == []
        versions = [reply.headers["x-model-version"] for _, reply in mine]
        assert versions == sorted(versions, key=[old, new].index)
        assert set(versions) == {old, new}
        assert difference(site, old, new) > 0.01  # else the versions could not be told apart
        for (i, reply), version in zip(mine, versions, strict=True):
            row = site.golden[version]["probabilities"][i]
            assert reply.json() == pytest.approx({label: row[int(label)] for label in reply.json()}, abs=1e-3)


def test_under_load_no_request_fails_and_each_is_answered_by_the_version_that_it_names(site):
    """Some requests take a second, so that they are under way when the old version could go."""
    site.roll(site.archive(**PATIENT))
    old, _, before = site.state
    path = site.archive(**PATIENT)
    new = Archive.read(path).version
    lines = []
    with load(site, 6) as seen, load(site, 3, **{"x-slow": "1"}) as slow:
        wait_for(lambda: all(seen) and all(slow))
        site.roll(path, watch=1, say=lines.append)
        wait_for(lambda: all(mine[-1][1].headers["x-model-version"] == new for mine in seen + slow))
    check(site, seen + slow, old, new)
    served, registered, files = site.state
    assert (served, registered) == (new, [float(new)])
    assert files == sorted([*before, f"digits-{new}.mar"])  # nothing hidden is left
    assert (site.store / "digits.mar").read_bytes() == path.read_bytes()
    assert lines[-1] == f"digits {new} serves"
    # and back, from what the store has kept
    site.roll(site.store / f"digits-{old}.mar")
    assert site.state == (old, [float(old)], files)


def test_archives_that_differ_answer_differently(site):
    """Each image in each two versions, by ten times the tolerance: else the test above could not tell them apart."""
    versions = ["1.0", *(Archive.read(site.archive()).version for _ in range(3))]
    assert all(difference(site, one, other) > 0.01 for one, other in itertools.combinations(versions, 2))


def difference(site: Site, one: str, other: str) -> float:
    """Of the image that the two versions answer most alike."""
    first, second = (np.array(site.golden[version]["probabilities"]) for version in (one, other))
    return np.abs(first - second).max(axis=1).min()


def test_an_archive_that_its_handler_refuses_is_rolled_back(site):
    golden = json.loads(site.files["golden.json"])
    golden["probabilities"] = golden["probabilities"][::-1]
    before = site.state
    with load(site, 2) as seen, pytest.raises(Failed, match=r"does not load"):
        site.roll(site.archive(golden_json=json.dumps(golden)))
    assert site.state == before
    assert {reply.status_code for mine in seen for _, reply in mine} == {200}


@pytest.mark.parametrize(
    ("program", "old", "new", "reason"),
    [
        (
            *("predictor/predictor", "labels[index]: value for", "labels[index]: value / 2 for"),
            r"golden image 0: a probability is 0\.\d+ off",
        ),
        (
            *("classifier_handler", '"x-model-version": self.version', '"x-model-version": "0.5"'),
            "predicted by version 0.5",
        ),
    ],
)
def test_an_archive_that_passes_its_own_check_and_answers_otherwise_is_rolled_back(site, program, old, new, reason):
    before = site.state
    path = site.archive(**{f"{program}_py": site.program(old, new, f"{program}.py")})
    with pytest.raises(Failed, match=reason):
        site.roll(path)
    assert site.state == before


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise RuntimeError('worn out')", "requests failed, and --max-errors is 0.01"),
        ("os._exit(1)", "has died|failed"),
    ],
)
def test_a_version_that_begins_to_fail_after_the_switch_is_rolled_back(site, tmp_path, how, reason):
    before, flag = site.state, tmp_path / "fail"
    broken = site.program(BEGIN, f"        if os.path.exists({str(flag)!r}):\n            {how}\n{BEGIN}")
    path = site.archive(classifier_handler_py=broken)
    with pytest.raises(Failed, match=reason):
        site.roll(path, watch=120, say=lambda line: flag.touch() if "is the default" in line else None)
    assert flag.exists()
    assert site.state == before
    assert site.ask().headers["x-model-version"] == before[0]


def start(site: Site, path: Path, *, until: str, watch: int = 60) -> subprocess.Popen[str]:
    """The command, when it has printed a line with `until`."""
    line = [sys.executable, "-u", "-m", "deploy.rollout", *site.arguments(path, watch=str(watch))]
    process = subprocess.Popen(line, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = []
    for text in process.stdout:
        seen.append(text)
        if until in text:
            return process
    process.kill()
    raise AssertionError(seen)


@pytest.mark.parametrize("until", ["goes into the store", "workers are ready", "is the default"])
def test_a_rollout_that_is_killed_leaves_a_server_that_serves_and_the_same_command_goes_on(site, until):
    old, path = site.server.default("digits"), site.archive()
    new = Archive.read(path).version
    with start(site, path, until=until) as process:
        process.kill()
    reply = site.ask()
    assert (reply.status_code, reply.headers["x-model-version"]) == (200, new if until == "is the default" else old)
    site.roll(path)
    assert site.state[:2] == (new, [float(new)])
    assert not [name for name in site.state[2] if name.startswith(".")]


def test_ctrl_c_rolls_back(site):
    before = site.state
    with start(site, site.archive(), until="is the default") as process:
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == 130
    assert said.splitlines()[-2:] == [f"rolled back, {before[0]} serves", "rollout: interrupted"]
    assert site.state == before


def test_ctrl_c_in_the_last_step_says_that_the_new_version_serves(site):
    """While the old version finishes what it has under way, which takes the model's time-out."""
    site.roll(site.archive(**PATIENT))
    old, path = site.server.default("digits"), site.archive()
    new = Archive.read(path).version
    with start(site, path, until="for the next start", watch=0) as process:
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == 3
    assert said == f"rollout: digits {new} serves, but the rest was not done: interrupted\n"
    assert site.state[:2] == (new, sorted([float(old), float(new)]))
    site.roll(path)  # the same command goes on
    assert site.state[:2] == (new, [float(new)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_rollout_whose_terminal_is_closed_rolls_back(site, number):
    before = site.state
    with start(site, site.archive(), until="is the default") as process:
        process.stdout.close()  # nobody reads what it says
        process.send_signal(number)
    assert process.returncode == 130
    assert site.state == before


def test_the_old_version_can_be_kept_for_requests_that_name_it(site):
    old, path = site.server.default("digits"), site.archive()
    new = Archive.read(path).version
    site.roll(path, keep_old=True)
    assert site.state[:2] == (new, sorted([float(old), float(new)]))
    assert site.ask(model=f"digits/{old}").headers["x-model-version"] == old
    site.server.unregister("digits", old)


def test_a_new_version_that_an_export_wrote_over_the_old_one_is_not_kept_as_the_old_one(site, capsys):
    old, path = site.server.default("digits"), site.archive()
    (site.store / f"digits-{old}.mar").unlink(missing_ok=True)
    (site.store / "digits.mar").write_bytes(path.read_bytes())
    before = site.state
    assert command.main(site.arguments(site.store / "digits.mar")) == 2
    assert "the next start takes it, good or not; export elsewhere" in capsys.readouterr().err
    assert site.state == before
    site.roll(path)
    assert not (site.store / f"digits-{old}.mar").exists()


def test_what_could_not_be_done_after_the_switch_is_said(site, monkeypatch, capsys):
    old, path = site.server.default("digits"), site.archive()
    new = Archive.read(path).version

    def lost(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_drop", lost)
        assert command.main([*site.arguments(path), "--watch", "0"]) == 3
    assert f"digits {new} serves, but the rest was not done: No space left on device" in capsys.readouterr().err
    assert site.state[:2] == (new, sorted([float(old), float(new)]))
    site.server.unregister("digits", old)


def test_a_version_that_somebody_else_has_dropped_is_nothing_to_do(site):
    before = site.state
    steps._drop(site.server, "digits", "999.0")
    assert site.state == before


def test_another_rollout_waits_for_nobody(site, capsys):
    folder = os.open(site.store, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        assert command.main(site.arguments(site.archive())) == 2
    finally:
        os.close(folder)
    assert "another rollout is under way" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_changes_nothing(site, server, tmp_path, capsys):
    before = site.state
    good = site.archive()
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "damaged.mar").write_bytes(content)
    (tmp_path / "cut.mar").write_bytes(content[: len(content) // 2])
    manifest = json.loads(site.files["MAR-INF/MANIFEST.json"])
    other = json.dumps(manifest | {"model": manifest["model"] | {"modelName": "cats"}}).encode()
    pack(site.files | {"MAR-INF/MANIFEST.json": other}, tmp_path / "cats.mar")
    pack({name: body for name, body in site.files.items() if name != "golden.json"}, tmp_path / "old.mar")
    (tmp_path / "keys.json").write_text('{"management": {"key": "a"}, "inference": {"key": "b"}}')
    (tmp_path / "elsewhere").mkdir()
    locked = {"to": server.management_url, "inference": server.url, "key-file": str(server.folder / "key_file.json")}
    mistakes = [
        (site.store / "digits.mar", {}, "is what the server serves"),
        (site.archive(version="2.1.3"), {}, "takes numbers only"),
        (tmp_path / "damaged.mar", {}, "is damaged"),
        (tmp_path / "cut.mar", {}, "is no whole archive"),
        (tmp_path / "none.mar", {}, "No such file"),
        (tmp_path / "cats.mar", {}, "is of the model cats, and the server has digits"),
        (tmp_path / "old.mar", {}, "no item named 'golden.json'"),
        (good, {"to": "http://127.0.0.1:1"}, "is it running"),
        (good, {"inference": "http://127.0.0.1:1"}, "is it running"),
        (good, {"key-file": str(tmp_path / "keys.json")}, "the management key is refused"),
        (good, {"key-file": str(tmp_path / "none.json")}, "No such file"),
        (good, {"store": str(tmp_path / "none")}, "no such folder"),
        (good, {"store": str(tmp_path / "elsewhere")}, "is not its model store"),
        (good, locked, "set enable_model_api=true in its config.properties"),
    ]
    for path, options, said in mistakes:
        assert command.main(site.arguments(path, **options)) == 2, said
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert site.state == before
    assert list((tmp_path / "elsewhere").iterdir()) == []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Answers that TorchServe does not give, and files that `python -m export` does not write

STATE = {
    "modelVersion": "1.0",
    "workers": [{"pid": 1, "status": "READY"}],
    "jobQueueStatus": {"pendingRequests": 0},
    "responseTimeout": 2,
    "maxBatchDelay": 1,
}


@contextlib.contextmanager
def impostor(answers: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers to GET, by path. Its URL, and the requests that it got."""
    came: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(f"{self.command} {self.path}")
            status, body = (400, b"{}") if self.command == "POST" else (200, answers.get(self.path, b"{}"))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", came
        finally:
            server.shutdown()
            thread.join()


def text(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("path", ["/models/digits/all", "/models/digits"])
@pytest.mark.parametrize(
    "answer",
    [
        *(b"", b"<html>", b"\xff\xfe", text(None), text(7), text("x"), text({}), text([]), text([None]), text([[]])),
        text([STATE | {"modelVersion": "a\nb"}]),
        *(text([{name: value for name, value in STATE.items() if name != left}]) for left in STATE),
        *(text([STATE | {name: None}]) for name in STATE),
        text([STATE | {"workers": [{"status": "READY"}]}]),
    ],
)
def test_a_server_that_answers_oddly_is_left_as_it_is_and_said_in_one_line(exported, tmp_path, path, answer, capsys):
    (tmp_path / "store").mkdir()
    archive = tmp_path / "digits.mar"
    with zipfile.ZipFile(exported / "digits.mar") as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    manifest = json.loads(files["MAR-INF/MANIFEST.json"])
    manifest["model"]["modelVersion"] = "2.0"
    pack(files | {"MAR-INF/MANIFEST.json": text(manifest)}, archive)
    right = {"/models/digits/all": text([STATE]), "/models/digits": text([STATE])}
    with impostor(right | {path: answer}) as (url, came):
        options = ["--to", url, "--inference", url, "--metrics", url, "--store", str(tmp_path / "store")]
        assert command.main([str(archive), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rollout: nothing was changed: GET {url}{path} returned what TorchServe never does: ")
    assert error.count("\n") == 1
    assert {one for one in came if not one.startswith("GET")} == {"POST /models"}  # without a model: a question
    assert list((tmp_path / "store").iterdir()) == []


def test_a_list_of_models_that_is_none_is_said_in_one_line(exported, capsys):
    for answer in (b"x", text([]), text({"models": [{}]}), text({"models": 7})):
        with impostor({"/models": answer}) as (url, _):
            server = TorchServeClient(url, url, url, None)
            with pytest.raises(Failed, match="what TorchServe never does"):
                server.models()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MAR-INF/MANIFEST.json", odd) for odd in ([], {"model": []})),
        *(("MAR-INF/MANIFEST.json", {"model": {"modelName": n, "modelVersion": v}}) for n, v in ((1, "2.0"), ("a", 2))),
        *(("spec.json", odd) for odd in ([], {"weights_sha256": 1, "labels": ["a"]})),
        ("spec.json", {"weights_sha256": "x", "labels": 3}),
        *(("golden.json", value) for value in ([], {"images": 1}, {"images": [{"b64": 1}]}, {"images": [1]})),
    ],
)  # fmt: skip
def test_an_archive_whose_files_hold_something_else_is_a_mistake(exported, tmp_path, name, value, capsys):
    with zipfile.ZipFile(exported / "digits.mar") as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    whole = json.loads(files["golden.json"])
    values = [value]
    if name == "golden.json":
        values += [
            whole | {"probabilities": odd}
            for odd in (None, [], whole["probabilities"][:-1], [["a"]] * len(whole["images"]))
        ]
        values += [whole | {"tolerance": odd} for odd in ([], {"onnx": "much"}, {})]
    for odd in values:
        pack(files | {name: text(odd)}, tmp_path / "odd.mar")
        assert command.main([str(tmp_path / "odd.mar")]) == 2, odd
        error = capsys.readouterr().err
        assert error.startswith(f"rollout: {tmp_path}/odd.mar: "), odd
        assert error.count("\n") == 1


def test_settings_that_are_no_mapping_are_a_mistake(exported, tmp_path, capsys):
    with zipfile.ZipFile(exported / "digits.mar") as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    for settings in (b"- a", b"minWorkers: many", b"minWorkers: -1", b"a: [", b"7"):
        pack(files | {"model-config.yaml": settings}, tmp_path / "odd.mar")
        assert command.main([str(tmp_path / "odd.mar")]) == 2, settings
        assert capsys.readouterr().err.count("\n") == 1
