"""The folder that a server works in: one server at a time, for its owner only, of any name. And what is said."""

import fcntl
import locale
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12
from hypothesis import given
from hypothesis import strategies as st

import serve
from launcher import CONFIG, LOGGING, Ports, ServerError, serving, work_folder
from launcher.properties import read_properties, write_properties
from tests.conftest import PROJECT, first_of_five
from tests.test_security import bearer, certificate, tls_config
from tests.test_serve import running_in, wait_until_ready

ODD = "épreuve 中 &"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# One server at a time


def test_a_second_server_in_a_folder_is_refused_in_one_line_and_the_first_goes_on(server, client, sample, exported):
    keys = (server.folder / "key_file.json").read_bytes()
    with (
        pytest.raises(
            ServerError, match=rf"works there \(process {os.getpid()}, port {server.ports.inference}\); stop it"
        ),
        serving([exported / "digits.mar"], server.folder, ports=Ports.free()),
    ):
        pass
    assert (server.folder / "key_file.json").read_bytes() == keys
    assert list((server.folder / "tmp").glob(".ts.sock.*"))
    assert client.classify(sample)


def test_serve_py_ends_with_2_where_another_server_works(run, exported, capsys):
    (run / "serve").mkdir(exist_ok=True)
    with work_folder.locked(run / "serve", Ports.from_first(9000)):
        assert serve.main([str(run), "--port", str(first_of_five())]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"serve.py: {run}/serve: another server works there (process {os.getpid()}, port 9000)")
    assert error.count("\n") == 1


def test_a_torchserve_that_lost_serve_py_is_named_with_the_command_that_ends_it(tmp_path, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(work_folder, "KILLED_SECONDS", 0)
    (tmp_path / work_folder.LOCK).write_text(f"{gone.pid} 4242 9000")
    with (tmp_path / work_folder.LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(ServerError, match=r"without serve\.py; end it: kill -- -4242"),
            work_folder.locked(tmp_path, Ports.free()),
        ):
            pass
    with work_folder.locked(tmp_path, Ports.free()):
        pass


def start(run, output, *options):
    command = [sys.executable, "serve.py", str(run), "--port", str(first_of_five()), *options]
    with output.open("wb") as file:
        return subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def test_a_killed_serve_py_takes_its_server_with_it_and_the_next_start_works(run, exported, tmp_path):
    output = tmp_path / "output"
    with start(run, output, "--console") as child:
        try:
            wait_until_ready(child, output)
            assert "Model server started" in output.read_text()  # --console
        finally:
            child.kill()
    with serving([exported / "digits.mar"], run / "serve", ports=Ports.free()) as server:
        assert server.process.poll() is None
    wait_for(lambda: not running_in(run))


def test_a_torchserve_that_ends_by_itself_is_said_and_is_no_success(run, exported, tmp_path):
    output = tmp_path / "output"
    with start(run, output) as child:
        try:
            wait_until_ready(child, output)
            (java,) = (p for p in psutil.Process(child.pid).children(recursive=True) if p.name() == "java")
            java.kill()
            assert child.wait(timeout=60) == 1
        finally:
            child.send_signal(signal.SIGTERM)
    assert "\nserve.py: TorchServe ended: " in output.read_text()
    wait_for(lambda: not running_in(run))


# A folder of any name, under any locale, for its owner only


@pytest.fixture(scope="module")
def odd(exported, tmp_path_factory):
    """A server whose every path has letters that are not ASCII, started under the locale C and the umask 0, with a
    password in its configuration."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    folder.mkdir()
    for path in (exported / "digits.mar", CONFIG.with_name("metrics.yaml"), LOGGING):
        shutil.copy(path, folder)
    config = folder / CONFIG.name
    config.write_text(CONFIG.read_text() + "keystore_pass=geheimnis\n", encoding="utf-8")
    config.chmod(0o600)
    umask = os.umask(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LC_ALL", "C")
        patch.setattr(locale, "nl_langinfo", lambda _: "ANSI_X3.4-1968")  # as in a process that began in it
        try:
            with serving(
                [folder / "digits.mar"],
                folder / "serve",
                ports=Ports.free(),
                config=config,
                logging=folder / LOGGING.name,
            ) as server:
                yield server
        finally:
            os.umask(umask)


def test_folders_whose_names_are_not_ascii_are_found_under_every_locale(odd, sample):
    reply = requests.post(f"{odd.url}/predictions/digits", data=sample, headers=bearer(odd.key()), timeout=30)
    assert reply.status_code == 200
    reply = requests.get(odd.metrics_url, headers=bearer(odd.key()), timeout=30)
    assert "ts_inference_requests_total" in reply.text  # metrics.yaml was read
    assert (odd.folder / "config.properties").read_bytes().isascii()
    assert (odd.folder / "logs" / "access_log.log").read_text()  # and log4j2.xml


def test_what_a_server_keeps_is_its_owners_whatever_the_umask(odd):
    assert "geheimnis" in (odd.folder / "config.properties").read_text()
    assert mode(odd.folder / "config.properties") == 0o600
    assert mode(odd.folder) == mode(odd.folder / "tmp") == 0o700
    sockets = [path for path in odd.folder.rglob("*") if path.is_socket()]
    assert sockets
    assert {path.parent for path in sockets} == {odd.folder / "tmp"}


def test_the_console_file_does_not_grow_with_what_clients_do(odd):
    """Nothing rotates it: what Log4j writes goes into ts_log.log, which is."""
    before = (odd.folder / "logs" / "console.log").stat().st_size
    for path in ("predictions/nobody", "nothing", "predictions/digits"):
        requests.post(f"{odd.url}/{path}", data=b"x", timeout=30)
    with socket.create_connection(("127.0.0.1", odd.ports.inference)) as broken:
        broken.sendall(b"POST /predictions/digits HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        broken.settimeout(30)
        with suppress(ConnectionResetError):
            while broken.recv(1000):
                pass
    assert (odd.folder / "logs" / "console.log").stat().st_size == before
    assert "org.pytorch.serve" in (odd.folder / "logs" / "ts_log.log").read_text()


def test_the_temporary_folder_of_a_long_path_is_its_owners_whatever_the_umask(tmp_path):
    umask = os.umask(0)
    try:
        folder = work_folder.make_temporary_folder(tmp_path / ("deep" * 20))
    finally:
        os.umask(umask)
    assert not folder.is_relative_to(tmp_path)
    assert mode(folder) == 0o700
    folder.rmdir()


def test_a_run_folders_server_folder_of_an_earlier_version_is_closed(run, exported, monkeypatch):
    (run / "serve").mkdir(exist_ok=True)
    (run / "serve").chmod(0o755)

    def stopped(*_, **__):
        raise ServerError("enough")

    monkeypatch.setattr(serve, "serving", stopped)
    assert serve.main([str(run)]) == 2
    assert mode(run / "serve") == 0o700


# .properties files, as java.util.Properties reads them


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1\n# no\n! no\n\n  b = 2  \n", {"a": "1", "b": "2"}),
        ("vmargs=-Xmx1g \\\n   -XX:-UsePerfData\nb=2", {"vmargs": "-Xmx1g -XX:-UsePerfData", "b": "2"}),
        ("a=1\\\\\nb=2", {"a": "1\\", "b": "2"}),  # a backslash that is escaped continues nothing
        ("a=1\\\n# still a\nb=2", {"a": "1# still a", "b": "2"}),
        ("a:1\nb 2\nc\nd==x:y z", {"a": "1", "b": "2", "c": "", "d": "=x:y z"}),
        ("keystore_pass=pa\\\\ss\\u00e9\\ud83d\\ude00\\q\nx\\=y=1\\ ", {"keystore_pass": "pa\\ssé😀q", "x=y": "1 "}),
        ("a=1\r\nb=2\rc=3\\\r\n  4", {"a": "1", "b": "2", "c": "34"}),
        ("a=1\\", {"a": "1"}),
    ],
)
def test_properties_are_read_as_java_reads_them(text, expected, tmp_path):
    (tmp_path / "x.properties").write_bytes(text.encode())
    assert read_properties(tmp_path / "x.properties") == expected


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_properties_may_be_utf_8_or_latin_1(encoding, tmp_path):
    (tmp_path / "x.properties").write_bytes("certificate_file=/épreuve/x.pem".encode(encoding))
    assert read_properties(tmp_path / "x.properties") == {"certificate_file": "/épreuve/x.pem"}


@given(st.dictionaries(st.sampled_from(["a", "keystore_pass", "x.y"]), st.text(), min_size=1))
def test_what_is_written_is_read_again(tmp_path_factory, properties):
    path = tmp_path_factory.getbasetemp() / "again.properties"
    write_properties(path, properties)
    assert path.read_bytes().isascii()
    assert read_properties(path) == properties
    assert [part for part in path.parent.iterdir() if part.name.endswith(".part")] == []


# Why it does not start


def refusal(exported, folder, **options):
    with (
        pytest.raises(ServerError) as raised,
        serving([exported / "digits.mar"], folder, ports=Ports.free(), **options),
    ):
        pass
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_keystore_for_grpc_is_refused_before_the_start(exported, tmp_path):
    """TorchServe's own answer is a NullPointerException."""
    (tmp_path / "store.p12").touch()
    config = tls_config(tmp_path, "keystore=store.p12\nenable_grpc_ssl=true\n")
    said = refusal(exported, tmp_path / "server", config=config)
    assert "enable_grpc_ssl=true needs certificate_file and private_key_file" in said
    assert not (tmp_path / "server").exists()


def test_a_file_that_the_configuration_names_and_that_is_not_there_is_named(exported, tmp_path):
    config = tls_config(tmp_path, "certificate_file=none.pem\nprivate_key_file=none.key\n")
    assert f"certificate_file is {tmp_path}/none.pem, and there is no such file" in refusal(
        exported, tmp_path / "server", config=config
    )


def test_why_java_or_torchserve_does_not_start_is_said(exported, tmp_path):
    said = refusal(exported, tmp_path / "server", settings={"vmargs": "-XX:Nonsense"})
    assert "Unrecognized VM option 'Nonsense'" in said
    key, made = certificate("localhost", tmp_path)
    secret = serialization.BestAvailableEncryption(b"right")
    (tmp_path / "store.p12").write_bytes(pkcs12.serialize_key_and_certificates(b"x", key, made, None, secret))
    config = tls_config(tmp_path, "keystore=store.p12\nkeystore_pass=wrong\nkeystore_type=PKCS12\n")
    assert "keystore password was incorrect" in refusal(exported, tmp_path / "server", config=config)
    assert not running_in(tmp_path)


# TLS


@pytest.fixture(scope="module")
def encrypted(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    certificate("localhost", folder, "127.0.0.1")
    lines = "private_key_file=localhost.key\ncertificate_file=localhost.pem\nenable_grpc_ssl=true\n"
    with serving(
        [exported / "digits.mar"], folder / "server", ports=Ports.free(), config=tls_config(folder, lines)
    ) as server:
        yield server


def handshake(server, port, version, ciphers):
    """(protocol, suite) that the server agrees to; None if it refuses all of `ciphers`."""
    context = ssl.create_default_context(cafile=str(server.verify))
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    if version != ssl.TLSVersion.TLSv1_3:
        context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            return secure.version(), secure.cipher()[0]
    except (ssl.SSLError, ConnectionResetError):
        return None


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")  # they are deprecated, which is the point
@pytest.mark.parametrize("kind", ["inference", "management", "grpc_inference", "grpc_management"])
def test_tls_is_what_the_operations_page_says(encrypted, kind):
    port, versions = getattr(encrypted.ports, kind), ssl.TLSVersion
    assert handshake(encrypted, port, versions.TLSv1, "ALL") is None
    assert handshake(encrypted, port, versions.TLSv1_1, "ALL") is None
    assert (handshake(encrypted, port, versions.TLSv1_3, "ALL") is not None) == kind.startswith("grpc")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    suites = [suite["name"] for suite in context.get_ciphers() if suite["protocol"] != "TLSv1.3"]
    found = {suite for suite in suites if handshake(encrypted, port, versions.TLSv1_2, suite)}
    with_gcm = {"ECDHE-RSA-AES128-GCM-SHA256"}
    if kind.startswith("grpc"):
        assert found == with_gcm | {"ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-CHACHA20-POLY1305"}
    else:
        assert found == with_gcm | {"ECDHE-RSA-AES128-SHA"}
