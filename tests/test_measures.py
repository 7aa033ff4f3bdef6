"""What the handler counts, as lines that TorchServe reads; test_metrics_scraped.py asks a real Prometheus."""

import logging
import math
import re

import pytest
import yaml

from handler.prometheus_metrics import BUCKETS, Measures
from tests.conftest import PROJECT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

# As in TorchServe's frontend (org.pytorch.serve.metrics.Metric).
LINE = re.compile(
    r"\[METRICS\]([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)"
)


@pytest.fixture
def measures():
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    cache = MetricsCacheYamlImpl(str(PROJECT / "metrics.yaml"))
    cache.initialize_cache()
    made = Measures(None, "digits", "1.0")  # no thread: the tests report by themselves
    made._metrics = cache
    return made


@pytest.fixture
def report(measures, caplog):
    """{(name, labels): value} of what is told."""
    caplog.set_level(logging.INFO)

    def told():
        caplog.clear()
        measures.report()
        found = {}
        for record in caplog.records:
            match = LINE.fullmatch(record.message)
            assert match, record.message
            labels = dict(pair.split(":") for pair in match[4].split(","))
            assert (labels.pop("model_name"), labels.pop("model_version")) == ("digits", "1.0")
            found[match[1], tuple(labels.values())] = float(match[3])
        return found

    return told


def test_a_batch_is_counted(measures, report):
    measures.add(
        ["ok", "truncated", "ok", "ok"],
        [("cat", 0.45), ("dog", 0.995), ("cat", 0.9)],
        {"decode": 0.003, "forward": 0.02, "post": 0.00001},
    )
    told = report()
    assert told["classifier_images_total", ("ok",)] == 3
    assert told["classifier_images_total", ("truncated",)] == 1
    assert told["classifier_predictions_total", ("cat",)] == 2
    assert told["classifier_batches_total", ()] == 1
    assert told["classifier_stage_seconds_total", ("post",)] == pytest.approx(1e-5)
    confidence = {labels[0]: value for (name, labels), value in told.items() if "confidence" in name}
    assert {bound: count for bound, count in confidence.items() if count} == {
        "0.5": 1,
        "0.6": 1,
        "0.7": 1,
        "0.8": 1,
        "0.9": 2,
        "0.95": 2,
        "0.99": 2,
        "+Inf": 3,
    }
    assert told["classifier_batch_size_bucket_total", ("4",)] == 1
    assert told["classifier_batch_size_bucket_total", ("2",)] == 0
    assert told["classifier_stage_seconds_bucket_total", ("decode", "0.005")] == 1
    assert told["classifier_stage_seconds_bucket_total", ("decode", "0.0025")] == 0


def test_it_begins_with_every_series_so_that_the_first_event_is_an_increase(measures, report):
    measures.begin(["truncated"], ["cat", "dog"], ["decode"])
    told = report()
    assert set(told.values()) == {0}
    measures.add(["ok", "truncated"], [("cat", 0.5)], {"decode": 0.1})
    assert set(report()) <= set(told)


def test_only_what_is_new_is_told(measures, report):
    measures.add(["ok"], [("cat", 0.5)], {})
    assert report()
    assert report() == {}
    measures.add(["ok"] * 3, [("dog", 0.5)] * 3, {})
    assert report()["classifier_images_total", ("ok",)] == 3


@pytest.mark.parametrize("label", ["a,b", "a:b", "a|b#c", "100%", "a\nb", "köter", "犬", "a b"])
def test_a_label_of_any_signs_arrives_whole(measures, report, label):
    from urllib.parse import unquote

    measures.add(["ok"], [(label, 0.5)], {})
    ((told,),) = [labels for name, labels in report() if name == "classifier_predictions_total"]
    assert unquote(told) == label


def test_every_metric_that_is_told_is_listed_and_the_buckets_end_in_infinity(measures, caplog):
    listed = yaml.safe_load((PROJECT / "metrics.yaml").read_text())["model_metrics"]
    names = {metric["name"] for kind in listed.values() for metric in kind if metric["name"].startswith("classifier_")}
    caplog.set_level(logging.INFO)
    measures.add(["ok", "empty"], [("cat", 1.0)], {"decode": 9.0})
    measures.report()
    measures.gauge("classifier_golden_difference_ratio", 3e-7)
    assert {LINE.fullmatch(record.message)[1] for record in caplog.records} == names
    assert all(bounds[-1] == math.inf for bounds in BUCKETS.values())


def test_torchserves_own_metrics_are_still_there():
    """metrics.yaml takes the place of TorchServe's, so whatever that listed must be in it."""
    from pathlib import Path

    import ts

    theirs = yaml.safe_load((Path(ts.__file__).parent / "configs" / "metrics.yaml").read_text())
    ours = yaml.safe_load((PROJECT / "metrics.yaml").read_text())
    for section in ("ts_metrics", "model_metrics"):
        for kind, metrics in theirs[section].items():
            for metric in metrics:
                assert metric in ours[section][kind], metric["name"]


def test_without_this_projects_metrics_yaml_the_worker_says_so_once_and_serves_on(measures, caplog, monkeypatch):
    monkeypatch.setattr("handler.prometheus_metrics.INTERVAL", 0)
    measures._metrics.cache.clear()
    measures.add(["ok"], [("cat", 0.5)], {})
    measures.gauge("classifier_golden_difference_ratio", 0.1)
    measures._report_for_ever()  # ends
    assert caplog.text.count("no metrics of the handler") == 1
    measures.gauge("classifier_golden_difference_ratio", 0.1)
    measures.add(["ok"], [("cat", 0.5)], {})
