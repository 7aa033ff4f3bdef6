"""The golden images: what export writes, and that a worker with other answers does not serve."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from export.package import golden_images as export_golden
from export.proof import images
from launcher import Ports, ServerError, serving
from model import Classifier, load_run
from predictor import pillow_preprocessing
from predictor.golden_check import FILE, Golden
from predictor.spec import PixelRule
from tests.conftest import replace_in_archive
from tests.kinds import gradient, save


@pytest.fixture(scope="module")
def content(exported):
    return json.loads((exported / FILE).read_text())


def correct(golden):
    return lambda bodies: golden.expected[: len(bodies)].copy()


def test_they_are_samples_of_the_run_with_the_answers_of_pytorch(content, run, exported):
    assert len(content["images"]) == export_golden.IMAGES
    assert content["source"] == "samples"
    samples = [
        pillow_preprocessing.read(path.read_bytes(), PixelRule.square(32))
        for path in sorted((run / "samples").iterdir())
    ]
    for body in Golden(exported).bodies:
        crop = pillow_preprocessing.read(body, PixelRule.square(32)).astype(int)
        assert min(np.abs(crop - sample).mean() for sample in samples) < 4  # grey levels, of JPEG
    assert content["tolerance"] == {"cpu": 1e-3, "gpu": 0.02}
    with zipfile.ZipFile(exported / "digits.mar") as archive:
        assert json.loads(archive.read(FILE)) == content


def photograph(secret: bytes) -> bytes:
    """A JPEG file as a telephone writes it: on its side, with position, serial number, thumbnail and comment."""
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    exif[0x010F] = secret.decode()  # maker
    exif.get_ifd(0x8825)[2] = (48.0, 12.0, 30.0)  # latitude
    exif.get_ifd(0x8769)[0xA431] = secret.decode()  # serial number
    return save(gradient(300, 200), "JPEG", exif=exif, comment=secret, quality=90)


@pytest.fixture
def made(run, exported, tmp_path):
    """A function that writes golden.json of a run whose samples are these files, and reads it."""
    spec, network = load_run(run)
    (tmp_path / "samples").mkdir()
    for file in exported.glob("digits*"):
        (tmp_path / file.name).symlink_to(file)

    def write(samples, source="samples"):
        for name, body in samples.items():
            (tmp_path / "samples" / name).write_bytes(body)
        golden = export_golden.answered(tmp_path, Classifier(network, spec).eval(), spec, source)
        export_golden.write(golden, tmp_path, "digits", "onnx")
        return Golden(tmp_path)

    return write


def test_hidden_files_among_the_samples_are_left_out_and_one_that_cannot_be_read_is_named(made, tmp_path):
    good, samples = photograph(b"x"), tmp_path / "samples"
    golden = made({"a.jpg": good, ".b.jpg.abcdefgh.tmp": good[:99], ".DS_Store": b"of a Mac"})
    assert len(golden.bodies) == 1
    names = {name for name, _ in images.of_samples(samples)}
    assert names & {path.name for path in samples.iterdir()} == {"a.jpg"}
    (samples / "c.jpg").write_bytes(good[:99])
    for read in (images.of_samples, lambda _: made({})):
        with pytest.raises(ValueError, match=r"samples/c\.jpg: the image is truncated .*; move it away"):
            read(samples)


def test_nothing_of_a_photograph_but_its_crop_travels_in_the_archive(made):
    secret = b"SN-4711-of-Ann"
    png = io.BytesIO()
    notes = PngInfo()
    notes.add_text("Author", secret.decode())
    gradient(300, 200).save(png, "PNG", pnginfo=notes)
    files = {"Ann at home.jpg": photograph(secret), "Ann's.png": png.getvalue(), "c.jpg": photograph(secret)}
    assert all(secret in body for body in files.values())
    golden = made(files)
    text = json.dumps(golden.names)
    assert "Ann" not in text
    for body in golden.bodies:
        assert secret not in body
        image = Image.open(io.BytesIO(body))
        image.load()
        assert image.size == (32, 32)  # not the whole
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert not image.getexif()


def test_both_decoders_are_checked_on_upright_images(made):
    photo = photograph(b"x")
    golden = made({"a.jpg": photo, "b.jpg": photo})
    assert [body[:4] for body in golden.bodies] == [b"\xff\xd8\xff\xe0", b"\x89PNG"]
    np.testing.assert_array_equal(
        pillow_preprocessing.read(golden.bodies[1], PixelRule.square(32)),
        pillow_preprocessing.read(photo, PixelRule.square(32)),
    )


def test_synthetic_ones_hold_no_image_of_the_user_and_differ(made):
    golden = made({"a.jpg": photograph(b"x")}, "synthetic")
    again = made({"b.png": save(gradient(), "PNG")}, "synthetic")
    assert golden.bodies == again.bodies
    assert len(set(golden.bodies)) == export_golden.IMAGES
    assert len({row.argmax() for row in golden.expected}) > 1


def test_correct_predictions_pass_and_wrong_ones_are_named(exported):
    golden = Golden(exported)
    assert golden.check(correct(golden), "cpu") == 0

    def wrong(bodies):
        answers = correct(golden)(bodies)
        answers[3:4, 0] += 0.01
        return answers

    with pytest.raises(
        ValueError, match=f"golden image {re.escape(golden.names[3])}: a probability is 0.01 off, and 0.001"
    ):
        golden.check(wrong, "cpu")
    assert golden.check(wrong, "gpu") == pytest.approx(0.01 / 0.02, abs=1e-3)  # half precision is allowed more
    assert golden.check(wrong, "cpu", count=1) == 0


def test_a_prediction_of_nan_is_wrong(exported):
    golden = Golden(exported)
    with pytest.raises(ValueError, match="is nan off"):
        golden.check(lambda bodies: np.full_like(golden.expected, np.nan), "gpu")
    ratio, _ = golden.compare(lambda bodies: np.full_like(golden.expected, np.nan), "gpu")
    assert np.isfinite(ratio)  # TorchServe drops a metric that is NaN
    assert ratio > 1


def test_an_archive_without_them_is_served_with_a_warning(tmp_path, caplog):
    golden = Golden(tmp_path)
    assert "golden.json is not in the archive" in caplog.text
    assert golden.check(lambda bodies: pytest.fail("nothing to ask"), "cpu") == 0


@pytest.mark.server
def test_a_server_with_wrong_answers_does_not_start(exported, content, tmp_path):
    content = json.loads(json.dumps(content))
    content["probabilities"][0].reverse()
    replace_in_archive(exported / "digits.mar", tmp_path / "digits.mar", {FILE: json.dumps(content)})
    with (
        pytest.raises(ServerError, match=r"the worker of digits died while loading: .*golden image .* off"),
        serving([tmp_path / "digits.mar"], tmp_path / "server", ports=Ports.free()),
    ):
        pytest.fail("it serves")
