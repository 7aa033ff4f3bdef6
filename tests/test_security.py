"""What somebody who means harm tries from outside and in files that they hand over. Bodies are in test_hostile.py."""

import ast
import base64
import datetime
import http.client
import io
import ipaddress
import json
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest
import requests
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import NameOID
from PIL import Image

from launcher import CONFIG, Ports, serving
from model import load_run
from model.checkpoint import CheckpointError, load_state_dict
from tests.conftest import PROJECT, first_of_five, replace_in_archive
from tests.kinds import gradient, save
from tests.test_handler import context_of
from tests.test_serve import printed, wait_until_ready
from train import train
from training.options import TrainOptions


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


# Keys


@pytest.mark.server
@pytest.mark.parametrize("scheme", ["none", "empty", "wrong", "basic", "lower case", "cut", "longer", "the other's"])
def test_no_endpoint_opens_without_its_own_key(server, sample, scheme):
    endpoints = [
        *(("inference", "POST", server.url + path) for path in ("/predictions/digits", "/predictions/digits/1.0")),
        *(("inference", "POST", server.url + path) for path in ("/explanations/digits", "/v1/models/digits:predict")),
        *(("inference", "GET", server.url + path) for path in ("/ping", "/predictions/digits")),
        *(("management", "GET", server.management_url + path) for path in ("/models", "/models/digits")),
        ("management", "GET", server.management_url + "/models/digits?customized=true"),
        ("management", "PUT", server.management_url + "/models/digits?min_worker=0"),
        ("management", "PUT", server.management_url + "/models/digits/1.0/set-default"),
    ]
    for kind, method, url in endpoints:
        key, other = server.key(kind), server.key("inference" if kind == "management" else "management")
        headers = {
            "none": {},
            "empty": {"Authorization": ""},
            "wrong": bearer("wrong"),
            "basic": {"Authorization": "Basic " + base64.b64encode(f"x:{key}".encode()).decode()},
            "lower case": bearer(key.swapcase()),
            "cut": bearer(key[:-1]),
            "longer": bearer(key + "x"),
            "the other's": bearer(other),
        }[scheme]
        reply = requests.request(method, url, data=sample if method == "POST" else None, headers=headers, timeout=30)
        assert (reply.status_code, reply.json()["type"]) == (400, "InvalidKeyException"), url
        assert set(reply.json()) == {"code", "type", "message"}, url
        assert key not in reply.text


# Requests that the server would make


@pytest.fixture
def trap():
    """A listener on loopback: its URL, and the list of those who came."""
    came, listening = [], socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                connection, peer = listening.accept()
            except OSError:
                return
            came.append(peer)
            connection.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/x.png", came
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(5)


@pytest.mark.server
def test_no_address_that_a_request_names_is_asked(server, trap):
    url, came = trap
    text = base64.b64encode(url.encode()).decode()
    svg = (
        f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY e SYSTEM "{url}">]><svg xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<image xlink:href="{url}" href="{url}"/>&e;</svg>'
    )
    values = [
        *(
            url,
            {"url": url},
            {"b64": url},
            {"b64": text},
            {"uri": url},
            {"instances": [url]},
            {"image_url": {"url": url}},
        ),
        *({"instances": [{"url": url}]}, {"instances": [{"b64": url}, {"b64": text}]}, {"signature_name": url}),
        {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [2], "data": [url, text]}]},
        {"inputs": [{"name": url, "datatype": "BYTES", "shape": [1], "data": [text]}], "id": url},
    ]
    attempts = [
        {"data": body} for body in (url.encode(), svg.encode(), f'<img src="{url}">'.encode(), b"%PDF " + url.encode())
    ]
    attempts += [{"json": value} for value in values]
    attempts += [{"files": {"data": url}}, {"files": {"url": url, "data": svg}}, {"data": {"url": url, "data": url}}]
    attempts += [
        {"data": url, "headers": {name: url}} for name in ("url", "Referer", "X-Url", "Location", "X-Original-URL")
    ]
    attempts += [{"data": b"x", "params": {name: url}} for name in ("url", "data", "body", "model_url", "b64")]
    image = save(gradient(), "PNG", icc_profile=url.encode(), exif=f"Exif\0\0{url}".encode())
    attempts.append({"data": image})
    for attempt in attempts:
        headers = bearer(server.key()) | attempt.pop("headers", {})
        for path in ("predictions/digits", "explanations/digits", "v1/models/digits:predict"):
            reply = requests.post(f"{server.url}/{path}", headers=headers, timeout=30, **attempt)
            is_answered = attempt.get("data") == image and not path.startswith("explanations")  # which are off
            assert reply.status_code == 200 if is_answered else 400 <= reply.status_code < 500
    for method, path in (
        ("POST", f"/models?url={url}"),
        ("POST", "/workflows?url=" + url),
        ("PUT", "/models/digits?url=" + url),
    ):
        requests.request(method, server.management_url + path, headers=bearer(server.key("management")), timeout=30)
    time.sleep(0.5)
    assert came == []
    with pytest.raises(requests.ConnectionError):  # and the trap works
        requests.get(url, timeout=5)
    assert len(came) == 1


# Paths


PATHS = [
    *("/predictions/../models", "/predictions/%2e%2e/%2e%2e/etc/passwd", "/predictions/..%2f..%2f..%2fetc%2fpasswd"),
    *("/predictions/digits/../../models", "/predictions/digits/..%2f..", "/predictions/digits/1.0/../../../etc/passwd"),
    *("/predictions/digits/..", "/predictions/digits/%00", "/predictions/%00", "/predictions/digits%00.mar"),
    *("/predictions/..\\..\\etc", "/predictions//etc/passwd", "/predictions/digits.mar", "/predictions/digits/9.9"),
    *("/explanations/..%2fdigits", "/v1/models/..%2fdigits:predict", "/v1/models/digits:../predict", "//etc/passwd"),
    *("/../../../../etc/passwd", "/static/../../etc/passwd", "/predictions/file:%2f%2f%2fetc", "/predictions/%ff"),
    *("/predictions/digits/1.0%2f..%2f..", "/predictions/" + "a" * 3_000, "/predictions/${jndi:x}", "/predictions/%25"),
]  # fmt: skip


@pytest.mark.server
@pytest.mark.parametrize("endpoint", ["inference", "management", "metrics"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_path_leads_to_a_file(server, endpoint, method):
    address = {"inference": server.url, "management": server.management_url, "metrics": server.metrics_url}[endpoint]
    key = server.key("management" if endpoint == "management" else "inference")
    for path in [*PATHS, *(path.replace("predictions", "models") for path in PATHS)]:
        with closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)) as connection:
            connection.request(method, path, body=b"x" if method == "POST" else None, headers=bearer(key))  # as written
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace")
        if not path.startswith("/predictions/digits/1.0"):  # what stands behind the version is not looked at
            assert reply.status in (400, 404, 405), (path, reply.status, text[:200])
        for secret in ("root:", str(server.folder), str(PROJECT), "site-packages", "key_file"):
            assert secret not in text, (path, text[:500])


# Files


@pytest.fixture
def evil(tmp_path):
    """An object whose pickle makes a file when it is loaded, and the name of that file."""

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    pickle.loads(pickle.dumps(Evil())).close()
    assert (tmp_path / "canary").exists()  # it works
    (tmp_path / "canary").unlink()
    return Evil()


def pickles(evil):
    """The files that it can be hidden in."""
    whole = io.BytesIO()
    torch.save({"w": evil}, whole)
    old = io.BytesIO()
    torch.save({"w": evil}, old, _use_new_zipfile_serialization=False)
    return {"plain": pickle.dumps({"w": evil}), "zip": whole.getvalue(), "old": old.getvalue()}


@pytest.mark.parametrize("kind", ["plain", "zip", "old"])
def test_weights_that_are_a_program_are_refused(evil, kind, run, tmp_path):
    body = pickles(evil)[kind]
    (tmp_path / "evil.pt").write_bytes(body)
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_state_dict(tmp_path / "evil.pt")
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "spec.json").write_bytes((run / "spec.json").read_bytes())
    (copy / "model.pt").write_bytes(body)
    with pytest.raises(ValueError):
        load_run(copy)
    config = TrainOptions(data="digits", arch="simplecnn", out=str(tmp_path / "out"), weights=str(tmp_path / "evil.pt"))
    with pytest.raises(ValueError, match=r"evil\.pt"):
        train(config)
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore")  # of torch's
@pytest.mark.parametrize("kind", ["plain", "zip", "old"])
@pytest.mark.parametrize("backend", ["torchscript", "pt2", "onnx"])
def test_a_worker_loads_no_program_in_the_place_of_its_weights(evil, kind, backend, tmp_path):
    from predictor import backends

    (tmp_path / backends.FILES[backend].format("digits")).write_bytes(pickles(evil)[kind])
    with pytest.raises(Exception, match=r"."):
        backends.load(backend, tmp_path, "digits")
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore")  # of torch's
@pytest.mark.parametrize("kind", ["plain", "zip", "old"])
def test_a_pickle_within_an_exported_program_is_not_run(evil, kind, exported, tmp_path, monkeypatch):
    """PyTorch loads a part of a .pt2 with weights_only=False where True fails."""
    from export.graphs import exported_program
    from predictor import backends

    target = tmp_path / "digits.crops.pt2"
    with zipfile.ZipFile(exported / target.name) as old, zipfile.ZipFile(target, "w") as new:
        inner = [name for name in old.namelist() if "sample_inputs" in name]
        assert inner
        for name in old.namelist():
            new.writestr(name, pickles(evil)[kind] if name in inner else old.read(name))
    assert backends.load("pt2", exported, "digits") is not None  # the right one loads
    for load in (lambda: backends.load("pt2", tmp_path, "digits"), lambda: exported_program.load(target)):
        monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # which the one before has set
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            load()
    assert not (tmp_path / "canary").exists()


def sources():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if not name.startswith("tests/")]


def dangers(text):
    """Calls in a source that may run what they read, as `line: name`."""
    never = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "marshal.loads", "marshal.load"}
    never |= {"shelve.open", "joblib.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            name in never
            or name.startswith(("pickle.", "cPickle.", "dill.", "cloudpickle."))
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name == "yaml.load" and given.get("Loader") not in ("yaml.SafeLoader", "yaml.CSafeLoader"))
            or given.get("allow_pickle") == "True"
            or given.get("shell") == "True"
        ):
            yield f"{node.lineno}: {name}"
        if name == "getattr" and len(node.args) > 1 and ast.unparse(node.args[1]) in ("'load'", "'loads'"):
            yield f"{node.lineno}: {name}"


@pytest.mark.parametrize(
    "source",
    [
        *("eval('1')", "torch.load(x)", "torch.load(x, weights_only=False)", "pickle.loads(x)", "yaml.load(x)"),
        *("yaml.load(x, Loader=yaml.Loader)", "np.load(x, allow_pickle=True)", "os.system('x')", "run(x, shell=True)"),
    ],
)
def test_the_search_for_dangerous_calls_finds_them(source):
    assert list(dangers(source))


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="not a checkout")
def test_no_source_runs_what_it_reads():
    names = sources()
    assert {"serve.py", "model/checkpoint.py", "predictor/backends.py"} <= set(names)
    found = [f"{name}:{danger}" for name in names for danger in dangers((PROJECT / name).read_text())]
    assert found == []
    for name in names:  # names taken out of those modules would escape the search
        for node in ast.walk(ast.parse((PROJECT / name).read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "marshal", "yaml", "shelve", "joblib"), name


# Pixels


@pytest.mark.filterwarnings("ignore")  # of TorchServe's own modules
def test_the_limit_of_pixels_is_the_models_and_the_operator_may_lift_it(exported, tmp_path):
    from ts.context import RequestProcessor

    from handler.classifier_handler import ClassifierHandler

    with zipfile.ZipFile(exported / "digits.mar") as archive:
        archive.extractall(tmp_path)
    body = save(gradient(30, 30), "PNG")
    for limited, most, expected in ((True, 899, 413), (True, 900, 200), (False, 899, 200)):
        context = context_of(tmp_path, max_pixels=most)
        context.system_properties["limit_max_image_pixels"] = limited
        context.request_processor = [RequestProcessor({})]
        handler = ClassifierHandler()
        handler.initialize(context)
        answer = json.loads(handler.handle([{"body": body}], context)[0])
        assert context.get_response_status(0)[0] == expected
        assert answer.get("type") == ("too_many_pixels" if expected == 413 else None)


# TLS


def certificate(name, folder, address=None):
    """An RSA key and a certificate of its own, made out to `name`: NAME.key and NAME.pem."""
    key, now = rsa.generate_private_key(65537, 2048), datetime.datetime.now(datetime.timezone.utc)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = [x509.DNSName(name), *([x509.IPAddress(ipaddress.ip_address(address))] if address else [])]
    made = (
        x509.CertificateBuilder(issuer, issuer, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(key.private_bytes(*form))
    return key, made


def tls_config(folder, lines):
    """config.properties with https, and `lines`."""
    text = CONFIG.read_text()
    for kind in ("inference", "management"):
        assert f"{kind}_address=http://" in text
        text = text.replace(f"{kind}_address=http://", f"{kind}_address=https://")
    text = text.replace("metrics_config=metrics.yaml", f"metrics_config={PROJECT / 'metrics.yaml'}")
    (folder / "tls.properties").write_text(text + "\n" + lines)
    return folder / "tls.properties"


@contextmanager
def command(*arguments, output):
    """`serve.py` as a user runs it, when it has said that it is ready."""
    with (
        output.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "serve.py", *map(str, arguments)],
            cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        ) as child,
    ):  # fmt: skip
        try:
            wait_until_ready(child, output)
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(timeout=60)


def test_serve_py_serves_https_to_those_who_trust_its_certificate_and_nothing_without_it(
    run, exported, sample, label, tmp_path
):
    certificate("localhost", tmp_path, "127.0.0.1")
    certificate("stranger", tmp_path, "127.0.0.1")
    config = tls_config(tmp_path, "private_key_file=localhost.key\ncertificate_file=localhost.pem\n")  # beside it
    port, output = first_of_five(), tmp_path / "output"
    with command(run, "--port", port, "--config", config, output=output):
        commands = printed(output.read_text())
        assert f"--cacert {tmp_path / 'localhost.pem'} " in commands
        (tmp_path / "IMAGE").write_bytes(sample)
        answer = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, stdout=subprocess.PIPE, check=True)
        assert next(iter(json.loads(answer.stdout))) == label
        for kind, its_port in (("inference", port), ("management", port + 1)):
            its_key = json.loads((run / "serve" / "key_file.json").read_text())[kind]["key"]
            path = f"127.0.0.1:{its_port}/" + ("predictions/digits" if kind == "inference" else "models")
            method = "POST" if kind == "inference" else "GET"

            def ask(url, verify, method=method, key=its_key):
                return requests.request(method, url, data=sample, headers=bearer(key), verify=verify, timeout=30)

            reply = ask(f"https://{path}", str(tmp_path / "localhost.pem"))
            assert reply.status_code == 200
            if kind == "inference":
                assert next(iter(reply.json())) == label
            for untrusted in (True, str(tmp_path / "stranger.pem")):
                with pytest.raises(requests.exceptions.SSLError):
                    ask(f"https://{path}", untrusted)
            reply = ask(f"http://{path}", True)
            assert reply.status_code == 403
            assert reply.json() == {"status": "This TorchServe instance only accepts HTTPS requests"}


def test_https_with_a_keystore_and_another_name_and_without_a_limit_of_pixels(exported, sample, label, tmp_path):
    key, made = certificate("classifier.example", tmp_path)
    secret = serialization.BestAvailableEncryption(b"changeit")
    (tmp_path / "store.p12").write_bytes(pkcs12.serialize_key_and_certificates(b"x", key, made, None, secret))
    lines = "keystore=store.p12\nkeystore_pass=changeit\nkeystore_type=PKCS12\n"
    archive = tmp_path / "digits.mar"
    replace_in_archive(exported / archive.name, archive, {"model-config.yaml": "minWorkers: 1\nmaxWorkers: 1\n"})
    with serving(
        [archive],
        tmp_path / "server",
        ports=Ports.free(),
        config=tls_config(tmp_path, lines),
        settings={"limit_max_image_pixels": "false"},
    ) as server:
        port = urlsplit(server.url).port
        session = requests.Session()
        session.headers.update(bearer(server.key()))
        adapter = requests.adapters.HTTPAdapter()
        adapter.init_poolmanager(1, 1, server_hostname="classifier.example", assert_hostname="classifier.example")
        session.mount("https://", adapter)
        with session:
            for body, expected in ((sample, label), (save(Image.new("1", (7_100, 7_100)), "PNG"), None)):
                url, trusted = f"https://127.0.0.1:{port}/predictions/digits", str(tmp_path / "classifier.example.pem")
                reply = session.post(url, data=body, verify=trusted, timeout=60)
                assert reply.status_code == 200
                assert expected in (None, next(iter(reply.json())))
