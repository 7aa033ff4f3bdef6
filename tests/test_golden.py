"""The golden pictures: what export writes, and that a worker with other answers does not serve."""

import json
import zipfile

import numpy as np
import pytest

from export import golden as export_golden
from handler.golden import FILE, Golden
from model import Classifier, load_run
from serve import Ports, ServerError, serving
from tests.conftest import replace_in_archive
from tests.kinds import gradient, save


@pytest.fixture(scope="module")
def content(exported):
    return json.loads((exported / FILE).read_text())


def right(golden):
    return lambda bodies: golden.expected[: len(bodies)].copy()


def test_they_are_samples_of_the_run_with_the_answers_of_pytorch(content, run, exported):
    assert len(content["pictures"]) == export_golden.PICTURES
    assert {picture["name"] for picture in content["pictures"]} <= {path.name for path in (run / "samples").iterdir()}
    assert len({picture["name"].split("-")[0] for picture in content["pictures"]}) > 5  # of many classes
    assert content["tolerance"] == {"cpu": 1e-3, "gpu": 0.02}
    with zipfile.ZipFile(exported / "digits.mar") as archive:
        assert json.loads(archive.read(FILE)) == content


def test_a_large_picture_travels_as_its_crop(run, exported, tmp_path):
    spec, network = load_run(run)
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), np.uint8)
    from PIL import Image

    (tmp_path / "samples" / "large.png").write_bytes(save(Image.fromarray(noise), "PNG"))
    (tmp_path / "samples" / "small.png").write_bytes(save(gradient(), "PNG"))
    for file in exported.glob("digits*"):
        (tmp_path / file.name).symlink_to(file)
    export_golden.write(tmp_path, tmp_path, "digits", spec, Classifier(network, spec).eval(), "onnx")
    golden = Golden(tmp_path)
    assert golden.names == ["large.png", "small.png"]
    assert len(golden.bodies[0]) < export_golden.FILE_BYTES
    assert golden.bodies[1] == save(gradient(), "PNG")


def test_right_answers_pass_and_wrong_ones_are_named(exported):
    golden = Golden(exported)
    assert golden.check(right(golden), "cpu") == 0

    def wrong(bodies):
        answers = right(golden)(bodies)
        answers[3:4, 0] += 0.01
        return answers

    with pytest.raises(ValueError, match=f"golden picture {golden.names[3]}: a probability is 0.01 off, and 0.001"):
        golden.check(wrong, "cpu")
    assert golden.check(wrong, "gpu") == pytest.approx(0.01 / 0.02, abs=1e-3)  # half precision is allowed more
    assert golden.check(wrong, "cpu", count=1) == 0


def test_an_answer_that_is_no_number_is_wrong(exported):
    golden = Golden(exported)
    with pytest.raises(ValueError, match="is nan off"):
        golden.check(lambda bodies: np.full_like(golden.expected, np.nan), "gpu")
    ratio, _ = golden.compare(lambda bodies: np.full_like(golden.expected, np.nan), "gpu")
    assert np.isfinite(ratio)  # TorchServe drops a metric that is no number
    assert ratio > 1


def test_an_archive_without_them_is_served_with_a_warning(tmp_path, caplog):
    golden = Golden(tmp_path)
    assert "golden.json is not in the archive" in caplog.text
    assert golden.check(lambda bodies: pytest.fail("nothing to ask"), "cpu") == 0


def test_a_server_with_wrong_answers_does_not_start(exported, content, tmp_path):
    content = json.loads(json.dumps(content))
    content["probabilities"][0].reverse()
    replace_in_archive(exported / "digits.mar", tmp_path / "digits.mar", {FILE: json.dumps(content)})
    with (
        pytest.raises(ServerError, match=r"the worker of digits died while loading: .*golden picture .* off"),
        serving([tmp_path / "digits.mar"], tmp_path / "server", ports=Ports.free()),
    ):
        pytest.fail("it serves")
