import io
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from predictor import image_headers, pillow_preprocessing
from predictor.image_headers import is_photograph
from predictor.pillow_preprocessing import MAX_PIXELS, ImageError, crop, decode, is_plain, read
from predictor.spec import PixelRule
from tests.hostile_images import (
    IMAGES,
    JPEG_END,
    exif_of_rationals,
    jpeg,
    jpeg_of_markers,
    png,
    png_header,
    png_of_texts,
    png_pixels,
    segment,
    tiff,
)
from tests.kinds import BAD, GOOD, HEIC, gradient, save

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged files: no error outside tests either


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_becomes_upright_rgb(name):
    body, expected, tolerance = GOOD[name]
    image = decode(body)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.shape[:2] == (expected.height, expected.width)
    assert difference.mean() <= tolerance


@pytest.mark.parametrize("name", BAD)
def test_every_bad_body_has_its_cause(name):
    body, cause = BAD[name]
    with pytest.raises(ImageError) as caught:
        decode(body)
    assert caught.value.cause == cause
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(kind):
    body = save(gradient(40, 30), kind)
    for length in range(1, len(body) - 1, max(1, len(body) // 40)):
        try:
            decode(body[:length])
        except ImageError as error:
            assert error.cause in ("truncated", "not_an_image"), (length, error)
        else:  # some kinds end in bytes that carry no pixels
            assert length > 0.5 * len(body), f"{kind} cut at {length} of {len(body)} was accepted"


@given(st.binary(max_size=200), st.sampled_from(sorted(GOOD)), st.integers(0, 400))
def test_damage_never_raises_anything_else(noise, name, place):
    body = GOOD[name][0]
    damaged = body[:place] + noise + body[place + len(noise) :]
    try:
        assert decode(damaged, max_pixels=1_000_000).mode == "RGB"
    except ImageError as error:
        assert str(error)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_the_same_on_white_in_strips_as_at_once(monkeypatch, mode):
    colours = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    image = Image.fromarray(colours).convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    whole = image.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    monkeypatch.setattr(pillow_preprocessing, "STRIP", 100)
    np.testing.assert_array_equal(np.asarray(pillow_preprocessing._to_rgb(image)), np.asarray(expected))


def test_a_bomb_is_refused_from_its_header_before_it_is_decoded(monkeypatch):
    body = save(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(body) < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="20000×20000 px is too large: at most 50,000,000") as caught:
        decode(body)
    assert caught.value.cause == "too_many_pixels"


def test_the_limit_of_pixels_can_be_set_and_lifted():
    body = save(gradient(100, 100), "PNG")
    with pytest.raises(ImageError):
        decode(body, max_pixels=9_999)
    assert decode(body, max_pixels=10_000).size == decode(body, max_pixels=None).size == (100, 100)
    assert MAX_PIXELS == 50_000_000


def test_broken_exif_does_not_cost_the_image():
    buffer = io.BytesIO()
    gradient(20, 10).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(buffer.getvalue()).size == (20, 10)


def outcome(body):
    """The pixels, or the cause of the error."""
    try:
        return np.asarray(decode(body))
    except ImageError as error:
        return error.cause


@pytest.mark.skipif(pillow_preprocessing.simplejpeg is None, reason="without simplejpeg: pip install simplejpeg")
@given(
    seed=st.integers(0, 999),
    size=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    grey=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "quality": st.integers(1, 100),
            "subsampling": st.sampled_from(["4:4:4", "4:2:2", "4:2:0", "4:1:1"]),
            "progressive": st.booleans(),
            "restart_marker_blocks": st.integers(0, 3),
        }
    ),
    exif=st.sampled_from([None, 1, 6]),
    damage=st.one_of(st.none(), st.tuples(st.floats(0, 1), st.integers(0, 255)), st.floats(0, 1)),
)
@hypothesis_settings(max_examples=300)
def test_a_jpeg_file_is_the_same_pixels_or_the_same_error_with_and_without_simplejpeg(
    seed, size, grey, options, exif, damage
):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    image = Image.fromarray(noise).resize(size)
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    body = bytearray(save(image.convert("L") if grey else image, "JPEG", **options))
    if isinstance(damage, float):
        del body[int(damage * len(body)) :]
    elif damage:
        body[min(int(damage[0] * len(body)), len(body) - 1)] = damage[1]
    expected, seen = None, []
    with mock.patch.object(pillow_preprocessing, "simplejpeg", None):
        expected = outcome(bytes(body))
    original = pillow_preprocessing._small_jpeg
    with mock.patch.object(
        pillow_preprocessing, "_small_jpeg", lambda *given: seen.append(original(*given)) or seen[-1]
    ):
        got = outcome(bytes(body))
    np.testing.assert_array_equal(got, expected)
    if damage is None and max(size) <= 128:
        assert (seen[0] is not None) == (exif is None)  # it is simplejpeg that is compared


def test_the_bound_on_pixels_holds_for_small_jpeg_files_too():
    body = save(gradient(20, 10), "JPEG")
    assert decode(body, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError) as caught:
        decode(body, max_pixels=199)
    assert caught.value.cause == "too_many_pixels"


@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    size=st.sampled_from([16, 32, 64]),
    margin=st.sampled_from([1.0, 1.14]),
    kind=st.sampled_from(["JPEG", "PNG"]),
    is_square=st.booleans(),
)
def test_read_is_the_crop_of_decode(width, height, size, margin, kind, is_square):
    """Also where a JPEG file is its own crop, and goes another way."""
    image = gradient(size, size) if is_square else gradient(width, height)
    body, resize = save(image, kind), round(size * margin)
    got = read(body, PixelRule.square(size, resize))
    assert (got.shape, got.dtype) == ((size, size, 3), np.uint8)
    np.testing.assert_array_equal(got, crop(decode(body), PixelRule.square(size, resize)))


@pytest.mark.parametrize("name", BAD)
def test_read_refuses_what_decode_refuses(name):
    body, cause = BAD[name]
    with pytest.raises(ImageError) as caught:
        read(body, PixelRule.square(32))
    assert caught.value.cause == cause


def test_a_jpeg_file_of_too_many_scans_is_refused_and_what_only_looks_like_scans_is_read():
    image = gradient(100, 80)
    plain, progressive = save(image, "JPEG"), save(image, "JPEG", progressive=True)
    film = b"\xff\xda" * 2_000
    comments = (b"\xff\xfe" + (2 + len(film)).to_bytes(2, "big") + film) * 2
    for body in (plain + film, plain[:2] + comments + plain[2:]):
        np.testing.assert_array_equal(decode(body), decode(plain))
    last = progressive[progressive.rindex(b"\xff\xc4") : -2]
    assert decode(progressive[:-2] + last * 50 + progressive[-2:]).size == (100, 80)
    with pytest.raises(ImageError, match="of 2010 scans") as caught:
        decode(progressive[:-2] + last * 2_000 + progressive[-2:])
    assert caught.value.cause == "unsupported_kind"


# What is plain, and what large or hostile files cost


def test_the_search_for_scans_looks_at_each_byte_once():
    """A search that backtracks looks at 5 billion bytes of this file, and training on it would never end."""
    body = jpeg_of_markers()
    assert is_plain(body)
    assert decode(body).size == (64, 48)
    assert image_headers._MARKER.search(b"\xff" * 4_000_000 + b"\0") is None


def test_a_look_at_a_file_goes_through_no_more_than_its_headers(monkeypatch):
    """What lies between the scans of a progressive file is its pixels, or two million comments."""
    monkeypatch.setattr(image_headers, "counts", None)
    assert not is_plain(IMAGES["jpeg of comments"])
    assert not is_photograph(IMAGES["jpeg of comments"])


def test_markers_are_counted_up_to_a_limit():
    start, comment = b"\xff\xd8", segment(0xFE, b"")
    assert image_headers.counts(start + comment * 90_000 + b"\xff\xda\0\2" + JPEG_END) == (1, 0)
    assert image_headers.counts(start + comment * 2_000_000) == (image_headers.MAX_MARKERS,) * 2


def test_exif_of_one_segment_and_a_quarter_of_a_megabyte_of_metadata_are_plain():
    body = jpeg()

    def with_segments(*segments):
        return body[:2] + b"".join(segment(*one) for one in segments) + body[2:]

    exif, xmp = (
        (0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000)),
    )
    assert is_plain(with_segments(exif, *[xmp] * 4))
    assert not is_plain(with_segments(exif, *[xmp] * 5))
    assert not is_plain(with_segments(exif, exif))


def test_plain_are_the_files_of_cameras_and_encoders_and_nothing_odd():
    assert {name for name in GOOD if is_plain(GOOD[name][0])} == {
        *("jpeg", "jpeg progressive", "jpeg grey", *(f"jpeg turned {o}" for o in range(1, 9))),
        *("png", "png grey", "png bilevel", "png palette", "png palette with transparency", "png alpha", "one pixel"),
        *("png grey alpha", "png interlaced", "webp", "webp alpha"),
    }
    assert {name for name, body in IMAGES.items() if is_plain(body)} == {"jpeg of markers", "png of 16 megapixels"}


def test_photographs_are_plain_files_of_any_size_and_heic():
    large = save(Image.new("RGB", (8_064, 6_048)), "JPEG")
    assert not is_plain(large)
    assert all(is_photograph(body) for body in (large, HEIC, GOOD["jpeg"][0], GOOD["png"][0], GOOD["webp"][0]))
    assert not any(is_photograph(GOOD[name][0]) for name in ("gif animation", "tiff", "bmp", "png grey 16"))
    odd = {"jpeg of exif", "jpeg of scans", "png truncated at 50 megapixels", "png with nested rationals"}
    assert not any(is_photograph(IMAGES[name]) for name in odd)
    assert not is_photograph(b"")


@pytest.mark.parametrize(
    ("kind", "size", "options", "expected"),
    [
        ("JPEG", (4_608, 3_456), {}, True),
        ("JPEG", (5_000, 4_000), {}, False),
        ("JPEG", (2_000, 2_000), {"progressive": True}, True),
        ("JPEG", (3_000, 2_000), {"progressive": True}, False),
        ("PNG", (4_608, 3_456), {}, True),
        ("PNG", (5_000, 4_000), {}, False),
        ("WEBP", (2_000, 2_000), {"method": 0}, True),
        ("WEBP", (3_000, 2_000), {"method": 0}, False),
        ("WEBP", (3_000, 2_000), {"method": 0, "lossless": True}, False),
    ],
)
def test_plain_ends_at_16_megapixels_and_earlier_where_a_decoder_holds_more(kind, size, options, expected):
    assert is_plain(save(Image.new("RGB", size), kind, **options)) is expected


def test_an_animation_a_huge_profile_and_what_is_cut_are_not_plain():
    frames = [gradient(), gradient(24, 18).rotate(90)]
    for kind in ("WEBP", "PNG"):
        assert not is_plain(save(frames[0], kind, save_all=True, append_images=frames[1:]))
    pixels, end = png_pixels(16, 12), (b"IEND", b"")
    assert is_plain(png(png_header(16, 12), *[(b"tEXt", b"a\0b")] * 100, pixels, end))
    assert not is_plain(png(png_header(16, 12), *[(b"tEXt", b"a\0b")] * 200, pixels, end))
    assert not is_plain(png(png_header(16, 12), (b"iCCP", bytes(2_000_000)), pixels, end))
    assert is_plain(png_of_texts(4))
    assert not is_plain(png_of_texts(5))
    assert not is_plain(png(png_header(16, 12), *[(b"IDAT", b"")] * 5_000, pixels, end))
    for kind in ("JPEG", "PNG", "WEBP"):
        body = save(gradient(), kind)
        assert not any(is_plain(body[:length]) for length in range(20))
    assert not is_plain(save(gradient(), "PNG") + bytes(8_000_000))


@given(st.binary(max_size=100), st.sampled_from(sorted(GOOD)), st.integers(0, 300))
def test_whether_a_damaged_file_is_plain_is_always_answered(noise, name, place):
    body = GOOD[name][0]
    assert is_plain(body[:place] + noise + body[place + len(noise) :]) in (True, False)


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    size=st.integers(1, 40),
    margin=st.sampled_from([1.0, 1.14]),
    orientation=st.integers(1, 8),
    mode=st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1"]),
    strip=st.integers(1, 500),
)
def test_a_crop_made_in_strips_is_the_crop_of_the_whole(width, height, size, margin, orientation, mode, strip):
    colours = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), np.uint8)
    image = Image.fromarray(colours)
    if mode == "I;16":
        image = Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
    elif mode != "RGBA":
        image = image.convert("L" if mode == "LA" else "RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = save(image, "PNG" if mode in ("P", "LA", "1") else "TIFF", exif=exif)
    resize = max(1, round(size * margin))
    with mock.patch.object(pillow_preprocessing, "STRIP", strip):
        got = read(body, PixelRule.square(size, resize))
    np.testing.assert_array_equal(got, crop(decode(body), PixelRule.square(size, resize)))


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_pillow_turns_it(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = save(gradient(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(body)), np.asarray(expected))


def test_xmp_turns_an_image_where_exif_does_not():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(save(gradient(40, 30), "JPEG", xmp=xmp)).size == (30, 40)


def test_of_exif_only_the_orientation_is_read(monkeypatch):
    body = png(png_header(16, 12), (b"eXIf", exif_of_rationals(1, 1_000)), png_pixels(16, 12), (b"IEND", b""))
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: pytest.fail("all of it is written anew"))
    monkeypatch.setattr(Image.Exif, "load", lambda *_: pytest.fail("all of it is read"))
    assert decode(body).size == (12, 16)


@pytest.mark.parametrize("name", ["png of one row", "png of one column", "tiff of fax lines", "bmp of runs"])
def test_a_side_that_is_too_long_is_refused_before_it_is_decoded(name, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="is too long: a side of at most 65,500 px is accepted") as caught:
        decode(IMAGES[name])
    assert caught.value.cause == "too_many_pixels"
    monkeypatch.undo()
    assert decode(save(Image.new("L", (65_500, 2)), "PNG")).size == (65_500, 2)


@pytest.mark.parametrize(
    ("name", "cause", "reason"),
    [
        ("tiff of a large tile", "too_many_pixels", "46336×46336 px"),
        ("tiff of a million strips", "unsupported_kind", "1,200,000 strips"),
        ("jpeg of exif", "unsupported_kind", "100000 EXIF segments"),
    ],
)
def test_what_a_header_promises_is_looked_at_before_pillow_opens_it(name, cause, reason, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    for attempt in (decode, lambda body: read(body, PixelRule.square(32, 36))):
        with pytest.raises(ImageError, match=reason) as caught:
            attempt(IMAGES[name])
        assert caught.value.cause == cause


def test_a_tiff_whose_directory_is_nowhere_is_damaged():
    body = tiff({256: (4, 1, 4)})
    for start in (len(body) - 3, 2**32 - 1):
        with pytest.raises(ImageError) as caught:
            decode(body[:4] + start.to_bytes(4, "little") + body[8:])
        assert caught.value.cause == "truncated"


@pytest.mark.parametrize("attempt", [decode, lambda body: read(body, PixelRule.square(32, 36))])
def test_a_lack_of_memory_is_a_cause_too(attempt, monkeypatch):
    def full(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(ImageError, match="no memory") as caught:
        attempt(GOOD["tiff"][0])
    assert caught.value.cause == "too_many_pixels"


def test_an_error_that_is_kept_keeps_no_decoder():
    with pytest.raises(ImageError) as caught:
        decode(BAD["jpeg cut in its pixels"][0])
    bare = caught.value.bare()
    assert (bare.cause, str(bare)) == (caught.value.cause, str(caught.value))
    assert bare.__traceback__ is bare.__context__ is bare.__cause__ is None


# HEIC


def test_the_photographs_of_phones_are_read_upright():
    """In libheif's hands: the file's own rotation has been applied, and its EXIF does not turn the image again."""
    image = decode(HEIC)
    assert (image.mode, image.size) == ("RGB", (40, 64))
    for place, colour in {(5, 10): (220, 30, 30), (5, 55): (30, 60, 220), (36, 30): (250, 250, 250)}.items():
        assert np.abs(np.subtract(image.getpixel(place), colour)).max() < 12
    assert not is_plain(HEIC)
    np.testing.assert_array_equal(read(HEIC, PixelRule.square(16)), crop(image, PixelRule.square(16)))


def test_a_heic_files_size_is_checked_before_it_is_decoded():
    with mock.patch("pi_heif.HeifImageFile.load", side_effect=AssertionError), pytest.raises(ImageError) as caught:
        decode(HEIC, max_pixels=64 * 40 - 1)
    assert caught.value.cause == "too_many_pixels"


def test_without_the_library_the_refusal_names_it():
    code = """
import sys
sys.modules["pi_heif"] = None
from predictor.pillow_preprocessing import KINDS, SUFFIXES, ImageError, decode
assert "HEIF" not in KINDS and ".heic" not in SUFFIXES
try:
    decode(sys.stdin.buffer.read())
except ImageError as error:
    print(error.cause, error)
"""
    done = subprocess.run([sys.executable, "-c", code], input=HEIC, capture_output=True, check=True)
    assert done.stdout.startswith(b"unsupported_kind HEIC is not supported; send JPEG,")
    assert b"install pi-heif" in done.stdout
