import io
import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_images

from predictor import colour_profiles
from predictor.colour_profiles import MAX_BYTES, conversion, is_srgb
from predictor.decoder_process import DecoderProcess
from predictor.pillow_preprocessing import NO_MEMORY, ImageError, crop, decode, read
from predictor.spec import PixelRule
from tests.icc import CURVES, NOT_A_CURVE, P3, SRGB, of_grey, with_curve
from tests.kinds import gradient, save

RULE = PixelRule.square(32, 36)
KINDS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def in_p3(image: Image.Image) -> Image.Image:
    """The numbers that a camera of Display P3 stores for the same colours."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(P3))
    return ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_photograph_in_display_p3_gets_the_colours_that_a_browser_shows(kind):
    original = gradient(200, 150)
    body = save(in_p3(original), kind, icc_profile=P3, **KINDS[kind])
    converted, ignored = (np.asarray(decode(body, colour=colour)).astype(int) for colour in ("srgb", "as-stored"))
    off, far = (np.abs(pixels - np.asarray(original)).mean() for pixels in (converted, ignored))
    assert off < 2 < far


def test_the_figures_of_the_docs_about_display_p3():
    """docs/onnx.md: off by 1.6 and 7.0 levels as stored, 48 at most; 0.2 and 3 when converted. With some room."""
    off, far = [], []
    for photograph in load_sample_images().images:
        body = save(in_p3(Image.fromarray(photograph)), "PNG", icc_profile=P3)
        off.append(np.abs(np.asarray(decode(body)).astype(int) - photograph))
        far.append(np.abs(np.asarray(decode(body, colour="as-stored")).astype(int) - photograph))
    assert [levels.mean() for levels in far] == pytest.approx([1.6, 7.0], rel=0.1)
    assert max(levels.max() for levels in far) == pytest.approx(48, abs=2)
    assert max(levels.mean() for levels in off) < 0.2
    assert max(levels.max() for levels in off) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_of_srgb_changes_nothing(kind):
    body = save(gradient(40, 30), kind, icc_profile=SRGB, **KINDS[kind])
    np.testing.assert_array_equal(decode(body), decode(body, colour="as-stored"))


@pytest.mark.parametrize(
    ("profile", "expected"),
    [(SRGB, True), (P3, False), (with_curve(SRGB, 2.2), False), (SRGB[:200], False), (b"x" * 300, False)],
    ids=["srgb", "display p3", "gamma 2.2", "cut", "noise"],
)
def test_what_counts_as_srgb(profile, expected):
    assert is_srgb(profile) == expected


@pytest.mark.parametrize("name", NOT_A_CURVE)
def test_a_curve_that_cannot_be_computed_is_not_srgbs_and_costs_no_other_image(name):
    """In the worker, which looks at profiles, an exception would be the whole batch's."""
    profile = NOT_A_CURVE[name]
    assert not is_srgb(profile)
    body = save(gradient(40, 30), "PNG", icc_profile=profile)
    crops = read(body, RULE), read(body, RULE, elsewhere=lambda body: read(body, RULE))
    assert all(crop.shape == (32, 32, 3) for crop in crops)


def test_tags_that_overlap_are_not_copied():
    """A hundred of them may each claim all 4 MB of a profile, in a worker whose memory has no limit of its own."""
    names = [*CURVES, *(b"x%03d" % i for i in range(97))]
    table = b"".join(struct.pack(">4sII", name, 1, MAX_BYTES) for name in names)
    profile = (bytes(128) + struct.pack(">I", len(names)) + table).ljust(MAX_BYTES, b"\0")
    tracemalloc.start()
    try:
        assert not is_srgb(profile)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


def test_grey_pixels_are_converted_by_a_of_grey():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    got = np.asarray(decode(save(ramp, "PNG", icc_profile=of_grey(1.8)))).astype(int)
    assert (got[..., 0] == got[..., 2]).all()
    linear = (np.arange(256) / 255) ** 1.8
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert np.abs(got[..., 1].ravel() - expected).max() < 2


def test_transparency_is_kept_and_laid_on_white():
    image = gradient(40, 30)
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    rgb = image.convert("RGB")
    stored = in_p3(rgb)
    stored.putalpha(image.getchannel("A"))
    got = np.asarray(decode(save(stored, "PNG", icc_profile=P3))).astype(int)
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.abs(got - np.asarray(expected)).mean() < 2


@pytest.mark.parametrize(
    "profile",
    [
        P3[:16] + b"CMYK" + P3[20:],
        P3[:16] + b"GRAY" + P3[20:],
        P3[:150],
        P3[:130] + bytes(200),
        b"P3",
        P3 + bytes(MAX_BYTES),
    ],
    ids=["of ink", "of grey", "cut", "without tags", "short", "too large"],
)
def test_a_profile_that_cannot_be_used_is_ignored(profile):
    image = gradient(40, 30)
    body = save(image, "TIFF", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(decode(body)), np.asarray(image))


def test_a_profile_that_changes_colours_is_used_in_the_decoder_process_only():
    plain, tagged, other = (
        save(gradient(200, 150), "JPEG", **more) for more in ({}, {"icc_profile": SRGB}, {"icc_profile": P3})
    )
    sent = []

    def elsewhere(body):
        sent.append(body)
        return read(body, RULE)

    for body in (plain, tagged, other):
        np.testing.assert_array_equal(read(body, RULE, elsewhere=elsewhere), crop(decode(body), RULE))
    assert sent == [other]


def test_the_decoder_process_converts_as_well():
    body = save(gradient(200, 150), "PNG", icc_profile=P3)
    decoder = DecoderProcess()
    try:
        decoder.wait()
        decoder.begin_batch()
        np.testing.assert_array_equal(decoder.read(body, RULE), read(body, RULE))
    finally:
        decoder.close()


def test_a_large_image_is_converted_strip_by_strip_to_the_same_pixels(monkeypatch):
    body = save(gradient(200, 150), "PNG", icc_profile=P3)
    whole = read(body, RULE)
    monkeypatch.setattr("predictor.pillow_preprocessing.STRIP", 3_000)
    np.testing.assert_array_equal(read(body, RULE), whole)


def test_the_conversion_is_made_once_for_images_of_one_profile():
    conversion.cache_clear()
    for width in (30, 40):
        decode(save(gradient(width, 30), "PNG", icc_profile=P3))
    assert conversion.cache_info().misses == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not limited")
def test_a_conversion_that_fails_for_lack_of_memory_is_not_remembered_as_the_profiles_fault():
    """In a process of its own; the profile's rest makes LittleCMS ask the system for memory."""
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from predictor import colour_profiles
from predictor.colour_profiles import conversion
from predictor.decoder_process import _memory
profile = sys.stdin.buffer.read()
try:
    with _memory(0):
        conversion(profile)
except MemoryError:
    assert conversion(profile) is not None
    print("made anew")
"""
    profile = P3.ljust(MAX_BYTES, b"\0")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", code], input=profile, capture_output=True, check=True, env=environment)
    assert done.stdout == b"made anew\n"


def fails(*_):
    raise ValueError("cannot build transform")  # as LittleCMS does, whatever the reason


@pytest.mark.parametrize("size", [(40, 30), (200, 150)], ids=["whole", "in strips"])
def test_an_image_whose_conversion_lacks_memory_is_refused_and_not_read_unconverted(size, monkeypatch):
    body = save(gradient(*size), "PNG", icc_profile=P3)
    monkeypatch.setattr("predictor.pillow_preprocessing.STRIP", 3_000)
    conversion.cache_clear()
    with monkeypatch.context() as short:
        short.setattr(ImageCms, "ImageCmsTransform", fails)
        short.setattr(colour_profiles, "ENOUGH", sys.maxsize // 2)
        for attempt in (lambda: read(body, RULE), lambda: decode(body)):
            with pytest.raises(ImageError, match=NO_MEMORY):
                attempt()
    np.testing.assert_array_equal(read(body, RULE), crop(decode(body), RULE))
    assert conversion(P3) is not None
