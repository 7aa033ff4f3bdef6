"""From the bytes of a picture file to the square of pixels that a network sees, with Pillow.

Training reads its data with this file, and every archive carries a copy of it for its handler, so both see the same
pixels. It therefore needs nothing but Pillow and NumPy, and imports nothing of this repository. Where simplejpeg is
installed, small plain JPEG files are decoded with it: the same libjpeg-turbo, the same pixels, half the time.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # everything works without it, small JPEG files more slowly
    simplejpeg = None

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

MAX_PIXELS = 50_000_000  # 200 MB in Pillow: more than a camera's 48 megapixels, and too few to exhaust a worker
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns up to twice its value; `decode` has a strict one

SMALL = 128 * 128  # pixels, up to which the work of Pillow around its decoder, 40 µs a file, is worth avoiding

STRIP = 1 << 20  # pixels that are put on white at a time

# A JPEG file may hold a scan after the other, of a hundred bytes each, and each goes over all pixels: 25 ms for 50
# megapixels. An encoder writes about ten.
MAX_SCANNED = 1_000_000_000  # pixels times scans: ten scans of 100 megapixels, and half a second
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff+([^\0\xff\xd0-\xd7])", re.DOTALL)  # but for those within a scan's data

# How the supported kinds begin; a body that begins so and cannot be opened is damaged, not foreign.
_SUPPORTED_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Kinds that people send and that are not read here: (offset, bytes, name).
_FOREIGN_STARTS = (
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "MP4 or another video"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or another XML"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"%!PS", "PostScript"),
)


class PictureError(ValueError):
    """Bytes that are not a picture we can use.

    `cause` is one of: empty, not_a_picture, unsupported_kind, truncated, too_many_pixels; and in a handler bad_json,
    bad_base64, too_many_pictures, no_time.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def decode(body: bytes, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """The picture as upright 8-bit RGB.

    The first frame of an animation; transparency on white; 16-bit grey scaled to 8; CMYK converted; turned as its
    EXIF says. The number of pixels is checked in the header, before anything is decoded.

    Raises:
        PictureError: see there for the causes.
    """
    if not body:
        raise PictureError("empty", "the body is empty; send the bytes of a picture")
    if (pixels := _small_jpeg(body, max_pixels)) is not None:
        return Image.fromarray(pixels)
    picture = _open(body)
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        limit = f"{width}×{height} px is too large: at most {max_pixels:,} pixels are accepted"
        raise PictureError("too_many_pixels", f"{limit}; send a smaller picture")
    if picture.format in ("JPEG", "MPO"):
        most = max(20, MAX_SCANNED // max(width * height, 1_000_000))
        if body.count(_SCAN) > most and (scans := _scans(body)) > most:
            raise PictureError("unsupported_kind", f"a JPEG file of {scans} scans is not read; save it as baseline")
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever the damage leads them into
        raise PictureError("truncated", f"the {picture.format} picture is truncated or damaged ({error})") from None
    return _to_rgb(_upright(picture))


def read(body: bytes, size: int, resize: int, max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
    """`crop` of `decode`; a small JPEG file that is its own crop, as of CIFAR-10, goes round Pillow altogether.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        PictureError: see there for the causes.
    """
    if size * size <= SMALL and (pixels := _small_jpeg(body, max_pixels)) is not None:
        height, width, _ = pixels.shape
        if (height, width) == (size, size) and crop_box(width, height, size, resize) == (0, 0, size, size):
            return pixels
        return crop(Image.fromarray(pixels), size, resize)
    return crop(decode(body, max_pixels), size, resize)


def crop_box(width: int, height: int, size: int, resize: int) -> tuple[int, int, int, int]:
    """The centred square that the network sees, in the picture's own pixels: left, top, right, bottom."""
    side = max(1, (2 * min(width, height) * size + resize) // (2 * resize))  # rounds half up
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop(picture: Image.Image, size: int, resize: int) -> np.ndarray:
    """The pixel rule of the spec, the reference that `model.preprocessing.resize_crop` equals bit for bit.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    box = crop_box(*picture.size, size, resize)
    square = picture if box == (0, 0, *picture.size) else picture.crop(box)
    return np.asarray(square if square.size == (size, size) else square.resize((size, size), Image.Resampling.BILINEAR))


def _small_jpeg(body: bytes, max_pixels: int | None) -> np.ndarray | None:
    """A JPEG file without EXIF or oddities, uint8 (H, W, 3), without Pillow; None for all else, damage included."""
    if simplejpeg is None or not body.startswith(b"\xff\xd8\xff") or b"\xff\xe1" in body:  # APP1: EXIF or XMP
        return None
    if body.count(_SCAN) > 16:  # `decode` looks at those
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(body)
        if colours not in ("YCbCr", "Gray") or width * height > min(SMALL, max_pixels or SMALL):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(body, "RGB", fastdct=False, fastupsample=False)
        return pixels
    except MemoryError:
        raise
    except Exception:  # damage, or what it warns of: Pillow may read it yet, or say what is wrong
        return None


def _open(body: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(body), formats=KINDS)
    except MemoryError:
        raise
    except Exception as error:
        if body.startswith(_SUPPORTED_STARTS):
            reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else error
            raise PictureError("truncated", f"the picture is truncated or damaged ({reason})") from None
    for offset, start, name in _FOREIGN_STARTS:
        if body[offset:].startswith(start):
            raise PictureError("unsupported_kind", f"{name} is not supported; send {', '.join(KINDS)}")
    raise PictureError("not_a_picture", f"the body is not a picture; send {', '.join(KINDS)}")


def _scans(body: bytes) -> int:
    """How many a JPEG file has. What lies in its other segments, or behind its end, such as a film, does not count."""
    count, place = 0, 2
    while (marker := _MARKER.search(body, place)) and (kind := marker[1]) != b"\xd9":  # the end
        count += kind == b"\xda"
        place = marker.end() + int.from_bytes(body[marker.end() : marker.end() + 2], "big")
    return count


def _upright(picture: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except MemoryError:
        raise
    except Exception:  # EXIF that cannot be read says nothing; the pixels are good
        return picture
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB, a strip of rows after the other: the whole would be there four times over."""
    opaque = Image.new("RGB", picture.size)
    rows = max(1, STRIP // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return opaque


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise PictureError("unsupported_kind", "32-bit grey has no agreed white; send 8-bit or 16-bit grey, or RGB")
    try:
        if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
            return _on_white(picture)
        return picture.convert("RGB")
    except ValueError as error:  # a mode with no way to RGB, such as LAB
        raise PictureError("unsupported_kind", f"pixels of mode {picture.mode} are not supported ({error})") from None
