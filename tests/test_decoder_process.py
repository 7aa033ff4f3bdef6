"""The process that decodes what is not plainly harmless: what it costs, what it refuses, and how it is replaced."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from predictor.pillow_preprocessing import MAX_PIXELS, is_plain
from predictor.pillow_preprocessing import read as read_here
from predictor.spec import PixelRule
from tests.hostile_images import IMAGES, bmp_of_runs, tiff_of_fax
from tests.kinds import BAD, GOOD, HEIC, LARGE_HEIC, gradient, save

pytestmark = pytest.mark.skipif(os.name != "posix", reason="elsewhere the worker decodes everything itself")

RULE = PixelRule.square(32, 36)
MIB = 1 << 20


@pytest.fixture(scope="module")
def decoder():
    from predictor.decoder_process import DecoderProcess

    child = DecoderProcess()
    child.wait()
    yield child
    child.close()


@pytest.fixture
def ask(decoder):
    """The crop of a file, or the cause of its error, by way of the child."""
    from predictor.pillow_preprocessing import ImageError

    def outcome(body):
        decoder.begin_batch()
        try:
            return decoder.read(body, RULE)
        except ImageError as error:
            assert str(error)
            assert "\n" not in str(error)
            return error.cause

    return outcome


def status_of(pid):
    """MiB that a process has or had, by the names of /proc."""
    lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(value.split()[0]) / 1024 for name, value in lines if name.startswith("Vm")}


ODD = """

_read = read


def read(body, *rest):
    while body == b"slow":  # in the place of a file that takes minutes
        pass
    if body == b"crash":
        os.abort()
    if body == b"sense":
        raise ImageError("no_such_cause", "x" * 9_000)
    return _read(body, *rest)
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A decoder whose child does as the bodies `slow`, `crash` and `sense` say."""
    from predictor import decoder_process

    here = Path(decoder_process.__file__)
    copy = shutil.copytree(here.parent, tmp_path / "predictor") / here.name
    with copy.open("a") as file:
        file.write(ODD)
    monkeypatch.setattr(decoder_process, "__file__", str(copy))
    child = decoder_process.DecoderProcess()
    child.wait()
    yield child
    child.close()


@pytest.mark.parametrize("name", GOOD)
def test_a_good_image_is_the_same_crop_as_in_this_process(ask, name):
    body = GOOD[name][0]
    np.testing.assert_array_equal(ask(body), read_here(body, RULE))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_has_the_same_cause_as_in_this_process(ask, name):
    body, cause = BAD[name]
    assert ask(body) == cause


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_refused_or_read_within_the_limits_of_the_child(decoder, ask, name):
    from predictor.decoder_process import ALONE_MEMORY

    before, worker = status_of(decoder._child.pid), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = ask(IMAGES[name])
    assert isinstance(got, np.ndarray) or got in ("too_many_pixels", "unsupported_kind", "truncated", "too_slow")
    after = status_of(decoder._child.pid)
    assert after["VmPeak"] - before["VmSize"] <= ALONE_MEMORY / MIB + 16  # and the file itself
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - worker < 16 * 1024
    assert isinstance(ask(GOOD["tiff"][0]), np.ndarray)
    assert status_of(decoder._child.pid)["VmRSS"] < before["VmRSS"] + 32  # and gives it back


def test_hostile_images_have_their_causes(ask):
    causes = {name: got for name, body in IMAGES.items() if isinstance(got := ask(body), str)}
    assert (
        causes.items()
        >= {
            "jpeg of exif": "unsupported_kind",
            "jpeg of scans": "unsupported_kind",
            "png truncated at 50 megapixels": "truncated",
            "png of one row": "too_many_pixels",
            "png of one column": "too_many_pixels",
            "tiff of a large tile": "too_many_pixels",
            "tiff of fax lines": "too_many_pixels",
            "tiff of a million strips": "unsupported_kind",
            "bmp of runs": "too_many_pixels",
            "webp of 49 megapixels": "too_many_pixels",
        }.items()
    )
    assert not {"jpeg of markers", "png with nested rationals", "png of 16 megapixels"} & set(causes)


def test_a_photograph_of_48_megapixels_is_read_in_the_child_upright(ask):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = save(gradient(800, 600).resize((8_000, 6_000)), "JPEG", exif=exif)
    assert not is_plain(body)
    np.testing.assert_array_equal(ask(body), read_here(body, RULE))


def test_a_heic_photograph_of_24_megapixels_is_read_in_the_child():
    """With the memory that its pixels take, and none for the threads of its decoder; in whatever time that takes."""
    from predictor.decoder_process import DecoderProcess

    child = DecoderProcess(None)
    try:
        child.wait()
        child.begin_batch()
        before = status_of(child._child.pid)["VmSize"]
        np.testing.assert_array_equal(child.read(LARGE_HEIC, RULE), read_here(LARGE_HEIC, RULE))
        assert status_of(child._child.pid)["VmPeak"] - before < 9 * 5_712 * 4_284 / MIB
    finally:
        child.close()


@pytest.mark.parametrize(
    ("body", "rooms", "kind"),
    [
        pytest.param(HEIC, ["ALONE_MEMORY"], "photograph", id="heic"),
        pytest.param(save(gradient(), "JPEG"), ["MEMORY", "ALONE_MEMORY"], "photograph", id="jpeg"),
        pytest.param(save(gradient(), "TIFF"), ["MEMORY", "ALONE_MEMORY"], "other", id="tiff"),
    ],
)
def test_what_a_file_gets_that_needs_much_memory(body, rooms, kind, monkeypatch):
    """What has no second attempt to wait for begins with all the memory that there is: its time is for both."""
    from predictor import decoder_process
    from predictor.pillow_preprocessing import NO_MEMORY, ImageError

    asked, timers = [], []

    def attempt(body, rule, max_pixels, room):
        asked.append(room)
        is_enough = room == decoder_process.ALONE_MEMORY
        return read_here(body, rule) if is_enough else ImageError("too_many_pixels", NO_MEMORY)

    monkeypatch.setattr(decoder_process, "_attempt", attempt)
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: timers.append(seconds))
    outcome = decoder_process._outcome(body, RULE, MAX_PIXELS)
    assert outcome == (decoder_process.CROP, read_here(body, RULE).tobytes())
    assert asked == [getattr(decoder_process, room) for room in rooms]
    assert timers == [decoder_process.SECONDS[kind], 0]


def test_no_operator_gives_a_batch_more_time_than_a_worker_has():
    from predictor.decoder_process import MOST_BATCH_SECONDS, DecoderProcess

    decoder = DecoderProcess(None)
    try:
        decoder.begin_batch()
        assert decoder._left == MOST_BATCH_SECONDS
    finally:
        decoder.close()


def test_what_is_slow_for_the_processor_is_refused_and_the_next_image_is_answered(odd):
    from predictor.pillow_preprocessing import ImageError

    for body, cause in ((b"slow", "too_slow"), (b"crash", "truncated"), (b"sense", "truncated")):
        odd.begin_batch()
        with pytest.raises(ImageError) as caught:
            odd.read(body, RULE)
        assert caught.value.cause == cause, body
        assert odd.read(GOOD["bmp"][0], RULE).shape == (RULE.height, RULE.width, 3)


def test_a_batch_has_a_time_and_what_comes_later_is_to_ask_again(odd, monkeypatch):
    from predictor import decoder_process
    from predictor.pillow_preprocessing import ImageError

    monkeypatch.setattr(decoder_process, "BATCH_SECONDS", 0.2)
    odd.begin_batch()
    first = odd._child
    for body in (b"slow", GOOD["bmp"][0]):  # the first takes more than is left of the batch, not yet of the processor
        with pytest.raises(ImageError) as caught:
            odd.read(body, RULE)
        assert caught.value.cause == "no_time"
    assert first.returncode == -signal.SIGKILL
    monkeypatch.setattr(decoder_process, "BATCH_SECONDS", 60)
    odd.begin_batch()
    assert odd.read(GOOD["bmp"][0], RULE).shape == (RULE.height, RULE.width, 3)


def test_a_child_that_was_killed_is_replaced(decoder, ask):
    first = decoder._child
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    assert isinstance(ask(GOOD["gif animation"][0]), np.ndarray)
    assert decoder._child.pid != first.pid


def test_a_child_ends_with_its_worker_even_if_that_is_killed():
    code = f"""
import sys, time
sys.path[:] = {sys.path!r}
from predictor.decoder_process import DecoderProcess
child = DecoderProcess()
child.wait()
print(child._child.pid, flush=True)
time.sleep(600)
"""
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(worker.stdout.readline())
        assert "python" in Path(f"/proc/{pid}/cmdline").read_text()
    finally:
        worker.kill()
        worker.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def test_a_child_has_no_secrets_writes_nothing_and_is_closed_with_its_owner(monkeypatch):
    from predictor.decoder_process import DecoderProcess

    monkeypatch.setenv("SOME_TOKEN", "secret")
    decoder = DecoderProcess()
    decoder.wait()
    child = decoder._child
    assert b"secret" not in Path(f"/proc/{child.pid}/environ").read_bytes()
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    assert all(line.split()[-3:-1] == ["0", "0"] for line in limits.splitlines() if "file size" in line)
    assert {str(Path(f"/proc/{child.pid}/fd/{number}").readlink()) for number in range(3)} == {"/dev/null"}
    del decoder
    assert child.returncode == -signal.SIGKILL


def test_threads_share_a_child(decoder):
    from concurrent.futures import ThreadPoolExecutor

    decoder.begin_batch()
    bodies = [save(gradient(40 + i, 30), "BMP") for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        crops = list(pool.map(lambda body: decoder.read(body, RULE), bodies))
    for body, crop in zip(bodies, crops, strict=True):
        np.testing.assert_array_equal(crop, read_here(body, RULE))


def test_an_operator_who_allows_larger_images_allows_what_they_take():
    from predictor.decoder_process import _scale

    assert [_scale(most) for most in (1, MAX_PIXELS, 2 * MAX_PIXELS, None)] == [1, 1, 2, 8]


def test_what_libtiff_says_of_a_file_reaches_no_log(ask, capfd):
    assert isinstance(ask(tiff_of_fax(2_000)), (str, np.ndarray))
    ask(bmp_of_runs(400, 300))
    assert capfd.readouterr() == ("", "")


def test_the_bytes_of_a_file_are_all_that_a_worker_holds_of_it(ask):
    """It does not open what it hands over."""
    from unittest import mock

    with mock.patch("PIL.Image.open", side_effect=AssertionError("opened here")):
        assert isinstance(ask(save(Image.new("P", (3_000, 2_000)), "GIF")), np.ndarray)
