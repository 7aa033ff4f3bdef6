"""A real Prometheus scrapes a real TorchServe; every expression of the dashboard and the alerts is run in it."""

import contextlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import time
from collections import Counter

import pytest
import requests
import yaml

from launcher import Ports, serving
from model import ModelSpec
from tests.conftest import PROJECT, label_of

DEPLOY = PROJECT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
SECONDS = 60  # until Prometheus shows what is expected

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus") or not shutil.which("promtool"),
    reason="no Prometheus: apt-get install --no-install-recommends prometheus",
)
WITHOUT_DATA = {"GPUUtilization", "GPUMemoryUsed", "Requests5XX"}  # there is no GPU, and nothing has failed


def expressions(panel):
    """As Grafana would send them, on all models."""
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "5m")
        yield expression.replace("$model", ".*")


class Prometheus:
    def __init__(self, url):
        self.url = url

    def ask(self, expression):
        """{labels: value} of an instant query; labels as a frozenset of pairs."""
        reply = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30).json()
        assert reply["status"] == "success", f"{expression}: {reply.get('error')}"
        assert not reply.get("warnings")
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in reply["data"]["result"]}

    def number(self, expression):
        """The one value, or 0 where there is none."""
        return sum(self.ask(expression).values())

    def wait(self, expression, expected):
        deadline = time.monotonic() + SECONDS
        while (found := self.number(expression)) != expected:
            assert time.monotonic() < deadline, f"{expression} is {found}, not {expected}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def own_server(exported, tmp_path_factory):
    """With nobody's traffic but this module's."""
    with serving([exported / "digits.mar"], tmp_path_factory.mktemp("scraped"), ports=Ports.free()) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(own_server, tmp_path_factory):
    """Prometheus with deploy/prometheus.yml, but for the address, the key's file and the interval."""
    folder, port = tmp_path_factory.mktemp("prometheus"), Ports.free().inference
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{own_server.ports.metrics}"]}]
    job["authorization"]["credentials_file"] = "inference.key"
    config["global"] = dict.fromkeys(config["global"], "1s")
    (folder / "inference.key").write_text(own_server.key() + "\n")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "alerts.yml", folder)
    checked = subprocess.run(["promtool", "check", "config", folder / "prometheus.yml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        made = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None, (folder / "output").read_text()
            with contextlib.suppress(requests.ConnectionError, AssertionError, ValueError):
                if made.number("up") == 1:
                    break
            assert time.monotonic() < deadline, (folder / "output").read_text()
            time.sleep(0.1)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def traffic(own_server, prometheus, run):
    """Known traffic, twice, so that every counter grows while Prometheus looks: how often each thing was sent."""
    first, second = ((run / "samples" / f"{digit}-0.png").read_bytes() for digit in (7, 3))
    log = (own_server.folder / "logs" / "access_log.log").read_text()
    warm_up = len(re.findall(r"POST /predictions/digits", log))  # by serve.py itself, before anybody asks
    prometheus.wait('sum(classifier_images_total{outcome="ok"})', warm_up)
    labels = prometheus.ask("sum by (label) (classifier_predictions_total)")
    sent = {"first": 5, "second": 2, "truncated": 3, "not_an_image": 1}
    bodies = {"first": first, "second": second, "truncated": first[:60], "not_an_image": b"nothing"}
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {own_server.key()}"
        for time_ in (1, 2):
            for kind, count in sent.items():
                for _ in range(count):
                    session.post(f"{own_server.url}/predictions/digits", data=bodies[kind], timeout=30)
            prometheus.wait("sum(classifier_images_total)", warm_up + time_ * sum(sent.values()))
    sent = {kind: 2 * count for kind, count in sent.items()}
    expected = Counter({label: labels.get(frozenset({("label", label)}), 0) for label in ModelSpec.load(run).labels})
    for kind in ("first", "second"):
        expected[label_of(run, bodies[kind])] += sent[kind]
    return sent, warm_up, expected


@needs_prometheus
@pytest.mark.server
def test_prometheus_counts_what_was_sent(prometheus, traffic):
    sent, warm_up, expected = traffic
    ok = warm_up + sent["first"] + sent["second"]
    by_outcome = prometheus.ask("sum by (outcome) (classifier_images_total)")
    found = {dict(labels)["outcome"]: value for labels, value in by_outcome.items() if value}
    assert found == {"ok": ok, "truncated": sent["truncated"], "not_an_image": sent["not_an_image"]}
    for label, count in expected.items():
        assert prometheus.number(f'classifier_predictions_total{{label="{label}"}}') == count
    everything = ok + sent["truncated"] + sent["not_an_image"]
    assert prometheus.number('classifier_confidence_bucket_total{le="+Inf"}') == ok
    assert prometheus.number("classifier_batches_total") == everything  # one after the other: batches of one
    assert prometheus.number('classifier_batch_size_bucket_total{le="1"}') == everything
    for stage in ("decode", "forward", "post"):
        assert prometheus.number(f'classifier_stage_seconds_bucket_total{{stage="{stage}",le="+Inf"}}') == everything
        assert 0 < prometheus.number(f'classifier_stage_seconds_total{{stage="{stage}"}}') < 60
    assert prometheus.number("ts_inference_requests_total") == everything
    assert prometheus.number("Requests4XX") == sent["truncated"] + sent["not_an_image"]
    assert 0 < prometheus.number("classifier_golden_difference_ratio") < 1


@needs_prometheus
@pytest.mark.server
@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_of_the_dashboard_has_data(prometheus, traffic, panel):
    for expression in expressions(panel):
        found = prometheus.ask(expression)
        if not any(name in expression for name in WITHOUT_DATA):
            assert found, f"{panel['title']}: {expression} has no data"
            assert all(value == value for value in found.values()), f"{expression}: {found}"  # no NaN
        for target in panel["targets"]:  # the legend names labels that are there
            names = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - {"DeviceId", "gpu"}
            assert all(names <= {name for name, _ in labels} for labels in found), target["legendFormat"]


@needs_prometheus
@pytest.mark.server
def test_the_figures_of_the_panels_are_right(prometheus, traffic):
    panels = {panel["title"]: list(expressions(panel)) for panel in PANELS}
    failed = prometheus.ask(panels["Share of images that failed, by reason"][0])
    shares = {dict(labels)["outcome"]: value for labels, value in failed.items() if value}
    assert set(shares) == {"truncated", "not_an_image"}
    assert 0 < shares["not_an_image"] < shares["truncated"] < 1
    assert prometheus.number(panels["Batch size"][0]) == pytest.approx(1, rel=0.5)  # two rates, extrapolated
    steps = {dict(labels)["le"]: value for labels, value in prometheus.ask(panels["Confidence"][0]).items()}
    assert steps["+Inf"] == pytest.approx(1)
    assert all(0 <= value <= 1.001 for value in steps.values())
    half, most = (prometheus.ask(panels[f"p{p} of a batch, by stage"][0]) for p in (50, 99))
    assert len(half) == 3  # stages
    assert all(0 < half[stage] <= most[stage] <= 2.5 for stage in half)


@needs_prometheus
@pytest.mark.server
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_is_understood_and_none_of_a_healthy_server_fires(prometheus, traffic, rule):
    found = prometheus.ask(rule["expr"])
    if rule["alert"] != "ClassifierBadImages":  # of which we did send some
        assert not found
    (state,) = [
        one
        for group in requests.get(f"{prometheus.url}/api/v1/rules", timeout=30).json()["data"]["groups"]
        for one in group["rules"]
        if one["name"] == rule["alert"]
    ]
    assert not state.get("lastError"), state


@needs_prometheus
def test_the_alerts_fire_when_they_should(tmp_path):
    """Series made up for each, run by promtool: the alerts at the end of two days."""
    of = 'model_name="digits"'
    series = {
        'up{job="x/classifier",instance="a"}': "1x2870 0x10",
        'Requests2XX{job="c"}': "0+90x2880",
        'Requests5XX{job="c"}': "0+10x2880",
        f"ts_queue_latency_microseconds{{{of}}}": "0+6000000000x2880",
        f"ts_inference_requests_total{{{of}}}": "0+6000x2880",
        f'classifier_golden_difference_ratio{{{of},model_version="1.0"}}': "1.05x2880",
        f'classifier_images_total{{{of},outcome="ok"}}': "0+70x2880",
        f'classifier_images_total{{{of},outcome="truncated"}}': "0+30x2880",
        f'classifier_confidence_bucket_total{{{of},le="0.5"}}': "0+60x2880",
        f'classifier_confidence_bucket_total{{{of},le="+Inf"}}': "0+100x2880",
        f'classifier_predictions_total{{{of},label="cat"}}': "0+100x2700 270000+10x180",
        f'classifier_predictions_total{{{of},label="dog"}}': "0+10x2700 27000+100x180",
    }
    test = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "2880m",
                        "exp_samples": [{"labels": f'{{alertname="{rule["alert"]}"}}', "value": 1} for rule in RULES],
                    }
                ],
            }
        ],
    }
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.parametrize(("ratio", "firing"), [("0.99", 0), ("1.01", 1)])
def test_wrong_answers_are_alerted_at_the_tolerance_whatever_it_is(tmp_path, ratio, firing):
    """Of an int8 model, too, whose tolerance may be 0.1 of a probability."""
    series = 'classifier_golden_difference_ratio{model_name="digits",model_version="1.0"}'
    sample = {"labels": '{alertname="ClassifierWrongPredictions"}', "value": 1}
    question = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "5m"}
    test = {
        "rule_files": ["alerts.yml"],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": f"{ratio}x10"}],
                "promql_expr_test": [{**question, "exp_samples": [sample] * firing}],
            }
        ],
    }
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_rules_are_as_promtool_wants_them():
    done = subprocess.run(["promtool", "check", "rules", DEPLOY / "alerts.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


def test_the_dashboard_is_whole_and_its_panels_do_not_overlap():
    panels = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] <= place["x"] + place["w"] <= 24
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "model": "query"}
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        assert all(target["expr"] for target in panel["targets"])


def test_every_metric_of_ours_is_shown_and_every_one_shown_is_told():
    listed = yaml.safe_load((PROJECT / "metrics.yaml").read_text())
    names = {
        metric["name"] for part in ("ts_metrics", "model_metrics") for kind in listed[part].values() for metric in kind
    }
    text = " ".join(expression for panel in PANELS for expression in expressions(panel))
    alerts = " ".join(rule["expr"] for rule in RULES)
    assert {name for name in names if name.startswith("classifier_")} <= set(re.findall(r"\w+", text))
    used = re.findall(r"\b(?:classifier_\w+|ts_\w+|Requests\w+|Memory\w+|GPU\w+)", text + alerts)
    assert set(used) <= names
