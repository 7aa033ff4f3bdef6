"""The contract over the wire: one real TorchServe, asked over REST and gRPC."""

import base64
import io
import json
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import requests
from PIL import Image

from benchmarks.probes import workers_of
from clients.python.classify import ClassifierError, Client
from dataset.loading import read_split
from launcher import Ports, serving
from launcher.readiness import WARM_UP
from tests.conftest import PROJECT, label_of, replace_in_archive
from tests.grpc_call import predict, stream, stream_both_ways
from tests.kinds import BAD, GOOD, gradient, save

pytestmark = pytest.mark.server

API = (PROJECT / "docs" / "api.md").read_text()

STATUS = {
    "empty": 400,
    "too_many_pixels": 413,
    "not_an_image": 415,
    "unsupported_kind": 415,
    "truncated": 422,
}  # written out again, so that a change of the handler's table is a change of the contract


def post(server, body, path="predictions/digits", **headers):
    headers = {"Authorization": f"Bearer {server.key()}", **headers}
    return requests.post(f"{server.url}/{path}", data=body, headers=headers, timeout=30)


def post_patiently(server, body):
    """Again at 503, as `no_time` tells clients: the decoder has a second and a half, which this machine may stall."""
    for _ in range(30):
        reply = post(server, body)
        if reply.status_code != 503:
            break
    return reply


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_image_is_answered(server, name):
    reply = post_patiently(server, GOOD[name][0])
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert len(reply.json()) == 5
    assert list(reply.json().values()) == sorted(reply.json().values(), reverse=True)


@pytest.mark.parametrize("name", BAD)
def test_every_error_has_its_status_over_rest_and_is_the_answer_over_grpc(server, name):
    body, cause = BAD[name]
    reply = post_patiently(server, body)
    error = reply.json()
    assert (reply.status_code, error["code"], error["type"]) == (STATUS[cause], STATUS[cause], cause)
    assert error["message"]
    assert json.loads(predict(server, {"data": body})) == error  # gRPC's status is OK: TorchServe drops ours there


def test_over_grpc_an_image_has_the_answer_that_it_has_over_rest(server, sample, label):
    answer = json.loads(predict(server, {"data": sample}))
    assert answer == pytest.approx(post(server, sample).json(), abs=1e-5)
    several = json.loads(predict(server, {"a": sample, "b": b"nothing"}))
    assert next(iter(several["a"])) == label
    assert several["b"]["type"] == "not_an_image"


@pytest.mark.parametrize("body", [b"{", b'{"instances": 7}', b"null", b"[[[", b'{"b64": 7}'])
def test_bad_json_is_a_400_of_its_own(server, body):
    reply = post(server, body, **{"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["type"]) == (400, "bad_json")


def test_bad_base64_is_a_400_of_its_own(server):
    reply = post(server, b'{"b64": "???"}', **{"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["type"]) == (400, "bad_base64")


@pytest.mark.parametrize("path", ["predictions/digits", "v1/models/digits:predict"])
def test_kserve_v1_clients_get_predictions(server, sample, label, path):
    instance = {"b64": base64.b64encode(sample).decode()}
    reply = post(server, json.dumps({"instances": [instance, instance]}), path, **{"Content-Type": "application/json"})
    assert reply.status_code == 200
    first, second = reply.json()["predictions"]
    assert next(iter(first)) == next(iter(second)) == label


def test_multipart_fields_are_answered_by_name(server, sample, label):
    reply = requests.post(
        f"{server.url}/predictions/digits",
        files={"left": sample, "right": b"nothing"},
        headers={"Authorization": f"Bearer {server.key()}"},
        timeout=30,
    )
    assert reply.status_code == 200
    assert next(iter(reply.json()["left"])) == label
    assert reply.json()["right"]["code"] == 415


def test_of_a_repeated_field_torchserve_keeps_the_last(server, sample, label):
    reply = requests.post(
        f"{server.url}/predictions/digits",
        files=[("data", ("a", b"nothing")), ("data", ("b", sample))],
        headers={"Authorization": f"Bearer {server.key()}"},
        timeout=30,
    )
    assert next(iter(reply.json())) == label


def test_one_bad_image_in_a_batch_of_32_fails_alone(server, run):
    """The model `patient` waits an hour for its batch to fill: what it answers at all came in one batch of 32."""
    good = [path.read_bytes() for path in sorted((run / "samples").iterdir())][:31]
    alone = [post(server, body).json() for body in good]
    bodies = [*good[:13], b"not an image", *good[13:]]
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda body: post(server, body, "predictions/patient"), bodies))
    bad = replies.pop(13)
    assert (bad.status_code, bad.json()["type"]) == (415, "not_an_image")
    for reply, answer in zip(replies, alone, strict=True):
        assert reply.status_code == 200
        assert reply.json() == pytest.approx(answer, abs=1e-5)


def test_answers_do_not_depend_on_the_load(server, run):
    bodies = [path.read_bytes() for path in sorted((run / "samples").iterdir())]
    alone = [post(server, body).json() for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda body: post(server, body), bodies * 4))
    for reply, answer in zip(replies, alone * 4, strict=True):
        assert reply.status_code == 200
        assert reply.json() == pytest.approx(answer, abs=1e-5)


def test_the_accuracy_over_http_is_that_of_the_metrics(client, run):
    expected = json.loads((run / "metrics.json").read_text())["test"]["accuracy"]
    answers = [(truth, client.classify(body)) for _, truth, body in read_split("digits", "test")]
    correct = sum(next(iter(answer)) == truth for truth, answer in answers)
    assert correct / len(answers) == pytest.approx(expected, abs=1.5 / len(answers))  # one near tie


def test_answers_carry_the_version_and_the_weights(server, sample, run):
    reply = post(server, sample)
    spec = json.loads((run / "spec.json").read_text())
    assert reply.headers["x-model-version"] == "1.0"
    assert reply.headers["x-model-weights-sha256"] == spec["weights_sha256"]


def test_describe_answers_with_the_spec_and_the_card(server, run, exported):
    reply = requests.get(
        f"{server.management_url}/models/digits?customized=true",
        headers={"Authorization": f"Bearer {server.key('management')}"},
        timeout=30,
    )
    described = reply.json()[0]["customizedMetadata"]
    assert described.pop("card") == (exported / "MODEL_CARD.md").read_text()
    assert described == json.loads((run / "spec.json").read_text())


def test_the_inference_key_is_not_enough_for_a_description(server, sample, label):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for path in ("predictions/digits", "invocations?model_name=digits", "models/digits/invoke"):
        for body, headers in ((sample, {}), (b"", {}), (b"", form)):
            answer = post(server, body, path, describe="True", **headers).json()
            assert "weights_sha256" not in answer
            assert (label in str(answer)) if body else (answer["type"] in ("empty", "not_an_image"))


def test_explanations_are_off(server, sample):
    for path in ("explanations/digits", "v1/models/digits:explain"):
        reply = post(server, sample, path)
        assert (reply.status_code, reply.json()["type"]) == (403, "explanations_off")


def test_a_header_asks_for_health_and_an_empty_request_is_a_mistake(server):
    headers = {"Authorization": f"Bearer {server.key()}"}
    reply = requests.get(f"{server.url}/predictions/digits", headers={**headers, "health": "True"}, timeout=30)
    assert (reply.status_code, reply.json()["status"]) == (200, "Healthy")
    for body, more in ((b"", {}), (None, {}), (b"", {"content-length": "0"})):
        reply = requests.post(f"{server.url}/predictions/digits", data=body, headers=headers | more, timeout=30)
        assert (reply.status_code, reply.json()["type"]) == (400, "empty")


def test_streams_over_grpc_are_answered_or_refused_and_cost_no_worker(server, sample):
    """StreamPredictions is answered once; StreamPredictions2 is for models of sequences, which TorchServe says."""
    workers = workers_of(server)
    expected = post(server, sample).json()
    for body, is_answer in ((sample, True), (b"nothing", False), (b"", False)) * 3:
        (reply,) = stream(server, {"data": body})
        assert json.loads(reply) == pytest.approx(expected, abs=1e-5) if is_answer else b"message" in reply
    (reply,) = stream(server, {"content-length": sample})  # a field's name, not a header
    assert json.loads(reply) == pytest.approx(expected, abs=1e-5)
    for _ in range(3):
        replies = stream_both_ways(server, [{"data": sample}] * 2)
        assert [prediction for prediction, _ in replies] == [b"", b""]
        assert all(b"sequenceId is required" in status for _, status in replies)
        with pytest.raises(grpc.RpcError):
            stream_both_ways(server, [{"data": sample}] * 2, sequence="a")
    assert post(server, sample).json() == pytest.approx(expected, abs=1e-5)
    assert workers_of(server) == workers


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc on this system")
def test_json_that_is_a_large_table_of_values_is_refused_in_little_memory(server, sample):
    workers = workers_of(server)
    for worker in workers:
        Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # the peak is that of this test
    before = sum(worker.memory_info().rss for worker in workers)
    length = 10_000_000
    bodies = [
        head + item * ((length - len(head)) // len(item)) + item[:-1] + tail
        for head, item, tail in (
            (b'{"instances": [', b"0,", b"]}"),
            (b'{"inputs": [{"datatype": "BYTES", "shape": [1], "data": [', b'"",', b"]}]}"),
            (b'{"inputs": [{"datatype": "UINT8", "shape": [9999, 1, 1, 3], "data": [', b"0,", b"]}]}"),
        )
    ]
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(lambda body: post(server, body, **{"Content-Type": "application/json"}), bodies + bodies[:1])
        )
    assert [(reply.status_code, reply.json()["type"]) for reply in replies] == [(413, "too_many_images")] * 4
    assert post(server, sample).ok
    assert workers_of(server) == workers
    most = sum(peak_memory(worker) for worker in workers)
    assert most - before < 400 * 2**20, f"{most / 2**20:.0f} MiB, from {before / 2**20:.0f}"


def peak_memory(process):
    """Bytes of resident memory, at the most since clear_refs."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def test_kserve_v2_bodies_are_answered_over_rest_and_grpc(server, sample, label):
    content = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(sample).decode()]}
    body = json.dumps({"id": "a", "inputs": [content]}).encode()
    over_rest = post(server, body, **{"Content-Type": "application/json"}).json()
    assert over_rest["outputs"][0]["data"][0] == label
    over_grpc = json.loads(predict(server, {"data": body}))
    assert over_grpc["outputs"][0] == over_rest["outputs"][0]


def test_without_the_key_nothing_is_answered(server, sample):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {server.key('management')}"}):
        reply = requests.post(f"{server.url}/predictions/digits", data=sample, headers=headers, timeout=30)
        assert (reply.status_code, reply.json()["type"]) == (400, "InvalidKeyException")
    with pytest.raises(Exception, match="Token Authorization failed"):
        predict(server, {"data": sample}, key="wrong")
    assert (server.folder / "key_file.json").stat().st_mode & 0o077 == 0  # nobody else reads the keys


def test_the_health_check_works_with_the_key(client, server):
    assert client.is_healthy()
    assert not Client(server.url, "digits", "wrong").is_healthy()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/models?url=http://127.0.0.1:1/evil.mar"),
        ("POST", "/models?url=file:///etc/passwd"),
        ("POST", "/models?url=digits.mar"),
        ("DELETE", "/models/digits"),
    ],
)
def test_no_model_can_be_registered_or_removed_even_with_the_key(server, method, path):
    headers = {"Authorization": f"Bearer {server.key('management')}"}
    reply = requests.request(method, server.management_url + path, headers=headers, timeout=30)
    assert reply.status_code == 405


def test_a_body_above_the_bound_is_refused_and_the_server_stays(server, sample, label, client):
    assert post(server, bytes(10_485_760 + 1)).status_code == 413
    with pytest.raises(ClassifierError, match=r"413 http: .*max_request_size in its config.properties, 10 MB"):
        client.classify(bytes(10_485_760 + 1))
    assert "| 413 | above 10 MB (`max_request_size` in `config.properties`) |" in API
    assert next(iter(client.classify(sample))) == label


def test_all_ports_listen_on_loopback_only(server):
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = {c.laddr for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {address.port for address in listening} >= set(vars(server.ports).values())
    assert all(address.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for address in listening)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc on this system")
def test_a_worker_that_runs_onnx_runtime_loads_no_pytorch_before_an_explanation_is_asked_for(
    exported, sample, tmp_path
):
    """Of a model whose explanations are switched on; they are images."""
    with zipfile.ZipFile(exported / "digits.mar") as archive:
        config = archive.read("model-config.yaml").decode().replace("explain: false", "explain: true")
    replace_in_archive(exported / "digits.mar", tmp_path / "digits.mar", {"model-config.yaml": config})
    with serving([tmp_path / "digits.mar"], tmp_path / "server", ports=Ports.free()) as server:
        for path, loaded in (("predictions/digits", 0), ("explanations/digits", 1)):
            assert post(server, sample, path).ok
            family = psutil.Process(server.process.pid).children(recursive=True)
            workers = [one for one in family if any("model_service_worker" in word for word in one.cmdline())]
            libraries = [Path(f"/proc/{worker.pid}/maps").read_text() for worker in workers]
            assert all("onnxruntime" in text for text in libraries)
            assert sum("libtorch" in text for text in libraries) == loaded
        reply = post(server, sample, "explanations/digits")
        best = next(iter(post(server, sample).json()))
        assert (reply.status_code, reply.headers["content-type"], reply.headers["x-label"]) == (200, "image/png", best)
        assert Image.open(io.BytesIO(reply.content)).size == (224, 224)
        reply = post(server, b"nothing", "explanations/digits")
        assert (reply.status_code, reply.json()["type"]) == (415, "not_an_image")
        body = json.dumps({"instances": [{"b64": base64.b64encode(sample).decode()}]})
        reply = post(server, body, "v1/models/digits:explain", **{"Content-Type": "application/json"})
        assert reply.json()["predictions"][0]["label"] == best


def test_a_request_is_one_line_in_one_log(server, sample):
    logs = server.folder / "logs"
    before = {path.name: path.stat().st_size for path in logs.iterdir()}
    for _ in range(20):
        post(server, sample)
    grown = {}
    for path in logs.iterdir():
        with path.open("rb") as file:
            file.seek(before.get(path.name, 0))
            grown[path.name] = file.read().decode().splitlines()
    assert len([line for line in grown.pop("access_log.log") if "POST /predictions/digits" in line]) == 20
    assert not any(grown.values()), grown


def test_the_server_has_asked_itself_before_the_first_client_does(server):
    lines = (server.folder / "logs" / "access_log.log").read_text().splitlines()
    posts = [line for line in lines if "POST" in line]
    assert all("/predictions/digits" in line and " 200 " in line for line in posts[:WARM_UP])
    assert len(posts) >= WARM_UP


def test_metrics_are_there_for_prometheus_and_need_no_key_as_the_documents_say(server, sample):
    post(server, sample)
    for headers in ({"Authorization": f"Bearer {server.key()}"}, {}):
        assert "ts_inference_requests_total" in requests.get(server.metrics_url, headers=headers, timeout=30).text
    assert requests.get(f"{server.url}/api-description", timeout=30).ok
    for name in ("docs/operations.md", "SECURITY.md", "config.properties", "deploy/README.md"):
        text = (PROJECT / name).read_text()
        assert "/api-description" in text
        assert re.search(r"without\W+(#\W+)?a\W+key|need\W+none", text), name


def test_a_form_that_is_no_form_is_refused_as_docs_api_says(server, sample):
    """What `curl --data-binary` sends unless it is told the type; nearly every photograph has such a `%` in it."""
    reply = post(server, sample + b"%zz", **{"Content-Type": "application/x-www-form-urlencoded"})
    assert (reply.status_code, reply.json()["type"]) == (500, "ErrorDataDecoderException")
    assert "| `ErrorDataDecoderException` | 500 |" in API


def test_the_client_names_what_was_wrong(client, sample, label):
    assert next(iter(client.classify(sample))) == label
    with pytest.raises(ClassifierError, match="415 not_an_image") as caught:
        client.classify(b"nothing")
    assert (caught.value.code, caught.value.type) == (415, "not_an_image")
    with pytest.raises(ClassifierError, match="404"):
        Client(client.url, "nobody", client._session.headers["Authorization"].split()[1]).classify(sample)


def test_the_client_asks_about_several_images_at_once(client, sample, label):
    answers = client.classify_many({"a": sample, "b": b"nothing", "c": save(gradient(), "PNG")})
    assert list(answers) == ["a", "b", "c"]
    assert next(iter(answers["a"])) == label
    assert answers["b"]["type"] == "not_an_image"
    assert client.classify_many({"only": sample}) == {"only": client.classify(sample)}


def test_the_client_as_a_command(server, run, label, tmp_path, capsys):
    from clients.python.classify import main

    (tmp_path / "bad.png").write_bytes(b"nothing")
    common = ["--url", server.url, "--model", "digits", "--key-file", str(server.folder / "key_file.json")]
    assert main([*common, str(run / "samples" / "7-0.png")]) == 0
    assert next(iter(json.loads(capsys.readouterr().out)["predictions"])) == label
    assert main([*common, str(tmp_path / "bad.png"), str(run / "samples" / "3-0.png")]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "415 not_an_image" in lines[0]["error"]
    assert next(iter(lines[1]["predictions"])) == label_of(run, (run / "samples" / "3-0.png").read_bytes())
    assert main(["--url", "http://127.0.0.1:1", "--model", "digits", str(run / "samples" / "3-0.png")]) == 2
    assert main([*common, str(tmp_path / "none.png")]) == 2
