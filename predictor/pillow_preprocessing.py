"""From the bytes of an image file to the square of pixels that a network sees, with Pillow.

Training reads its data with this file, and every archive carries a copy of it for its handler, so both see the same
pixels. It therefore needs nothing but Pillow and NumPy, and imports nothing of this repository. Where simplejpeg is
installed, small plain JPEG files are decoded with it: the same libjpeg-turbo, the same pixels, half the time.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # everything works without it, small JPEG files more slowly
    simplejpeg = None

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

MAX_PIXELS = 50_000_000  # 200 MB in Pillow: more than a camera's 48 megapixels, and too few to exhaust a worker
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns up to twice its value; `decode` has a strict one

MAX_SIDE = 65_500  # px, the longest that a JPEG encoder writes: Pillow's memory also grows with the number of rows

SMALL = 128 * 128  # pixels, up to which the work of Pillow around its decoder, 40 µs a file, is worth avoiding

STRIP = 1 << 20  # pixels that are turned, put on white and converted at a time; a larger image is never copied whole

# `is_plain`: what a worker decodes itself, which includes the photographs of phones.
PLAIN_BYTES = 8_000_000
PLAIN_PIXELS = 16 << 20
HELD_OFTEN = 4  # a decoder that holds an image up to this many times over gets as many times fewer pixels
PLAIN_PARTS = 128  # segments of a JPEG file before its pixels, chunks of PNG and WebP other than pixels
PLAIN_SCANS = 64
PLAIN_METADATA = 1 << 20  # bytes of such chunks; a JPEG's segment has at most 64 KiB
PLAIN_IDAT = 4_096  # chunks; encoders write at least 8 KiB into each

# A JPEG file may hold a scan after the other, of a hundred bytes each, and each goes over all pixels: 25 ms for 50
# megapixels. An encoder writes about ten.
MAX_SCANNED = 1_000_000_000  # pixels times scans: ten scans of 100 megapixels, and half a second
MAX_EXIF = 1_000  # segments of a JPEG file, which Pillow joins in quadratic time: 64 MB of XMP
MAX_STRIPS = 100_000  # of a TIFF file, each a Python object in Pillow
_SCAN, _EXIF = b"\xff\xda", b"\xff\xe1"
_MARKER = re.compile(rb"\xff([^\0\xff\xd0-\xd7])")  # but for those within a scan's data; finds in linear time

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP = r'tiff:Orientation(="|>)([0-9])'

NO_MEMORY = "there is no memory for this image; send a smaller one"

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


class ImageError(ValueError):
    """Bytes that are not an image we can use.

    `cause` is one of: empty, not_an_image, unsupported_kind, truncated, too_many_pixels; and in a handler bad_json,
    bad_base64, too_many_images, too_slow, no_time.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def bare(self) -> ImageError:
        """The same without its traceback, whose frames hold the decoder and its pixels: to be kept for a while."""
        return ImageError(self.cause, str(self))


def decode(body: bytes, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """The image as upright 8-bit RGB.

    The first frame of an animation; transparency on white; 16-bit grey scaled to 8; CMYK converted; turned as its
    EXIF says. The number of pixels is checked in the header, before anything is decoded.

    Raises:
        ImageError: see there for the causes.
    """
    if (pixels := _small_jpeg(body, max_pixels)) is not None:
        return Image.fromarray(pixels)
    try:
        image, method = _loaded(body, max_pixels)
        return _to_rgb(image if method is None else image.transpose(method))
    except MemoryError:
        raise ImageError("too_many_pixels", NO_MEMORY) from None


def read(
    body: bytes,
    size: int,
    resize: int,
    max_pixels: int | None = MAX_PIXELS,
    elsewhere: Callable[[bytes], np.ndarray] | None = None,
) -> np.ndarray:
    """`crop` of `decode`, without the copies of the whole image that `decode` makes of a large one.

    A small JPEG file that is its own crop, as of CIFAR-10, goes round Pillow altogether.

    Args:
        elsewhere: reads what is not plain, see `is_plain`, in the place of this process.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        ImageError: see there for the causes.
    """
    if size * size <= SMALL and (pixels := _small_jpeg(body, max_pixels)) is not None:
        height, width, _ = pixels.shape
        if (height, width) == (size, size) and crop_box(width, height, size, resize) == (0, 0, size, size):
            return pixels
        return crop(Image.fromarray(pixels), size, resize)
    if elsewhere is not None and body and not is_plain(body):
        return elsewhere(body)
    try:
        image, method = _loaded(body, max_pixels)
        if image.width * image.height > STRIP:
            return _crop_in_strips(image, method, size, resize)
        return crop(_to_rgb(image if method is None else image.transpose(method)), size, resize)
    except MemoryError:
        raise ImageError("too_many_pixels", NO_MEMORY) from None


def is_plain(body: bytes) -> bool:
    """Whether a walk over a file's headers, of bounded length, promises that decoding it takes little of anything.

    So are 8-bit JPEG, PNG and WebP files without oddities, of at most 8 MB and 16 megapixels; of 4 megapixels where
    a decoder holds the image more than once (progressive JPEG, interlaced PNG, WebP).
    """
    if len(body) > PLAIN_BYTES:
        return False
    try:
        if body.startswith(b"\xff\xd8\xff"):
            pixels = _plain_jpeg(body)
        elif body.startswith(b"\x89PNG\r\n\x1a\n"):
            pixels = _plain_png(body)
        elif body.startswith(b"RIFF") and body[8:12] == b"WEBP":
            pixels = _plain_webp(body)
        else:
            return False
    except struct.error:  # it ends within a header
        return False
    return 0 < pixels <= PLAIN_PIXELS


def crop_box(width: int, height: int, size: int, resize: int) -> tuple[int, int, int, int]:
    """The centred square that the network sees, in the image's own pixels: left, top, right, bottom."""
    side = max(1, (2 * min(width, height) * size + resize) // (2 * resize))  # rounds half up
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """The pixel rule of the spec, the reference that `model.tensor_preprocessing.resize_crop` equals bit for bit.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    box = crop_box(*image.size, size, resize)
    square = image if box == (0, 0, *image.size) else image.crop(box)
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


def _loaded(body: bytes, max_pixels: int | None) -> tuple[Image.Image, Image.Transpose | None]:
    """The pixels as they are stored, and how they must be turned.

    Raises:
        ImageError, MemoryError.
    """
    if not body:
        raise ImageError("empty", "the body is empty; send the bytes of an image")
    if body.startswith((b"II", b"MM")):
        _check_tiff(body, max_pixels)
    is_odd_jpeg = body.startswith(b"\xff\xd8") and not is_plain(body)  # else it need not be searched, for 1 ms a MB
    if is_odd_jpeg and body.count(_EXIF) > MAX_EXIF and (count := _counts(body)[1]) > MAX_EXIF:
        raise ImageError("unsupported_kind", f"a JPEG file of {count} EXIF segments is not read; save it again")
    image = _open(body)
    width, height = image.size
    _check_size(width, height, max_pixels)
    if is_odd_jpeg:
        most = max(20, MAX_SCANNED // max(width * height, 1_000_000))
        if body.count(_SCAN) > most and (scans := _counts(body)[0]) > most:
            raise ImageError("unsupported_kind", f"a JPEG file of {scans} scans is not read; save it as baseline")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever the damage leads them into
        raise ImageError("truncated", f"the {image.format} image is truncated or damaged ({error})") from None
    return image, _TURNED.get(_orientation(image))


def _open(body: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(body), formats=KINDS)
    except MemoryError:
        raise
    except Exception as error:
        if body.startswith(b"RIFF") and _is_large_webp(body):  # libwebp does not say why it fails
            raise MemoryError from None
        if body.startswith(_SUPPORTED_STARTS):
            reason = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else error
            raise ImageError("truncated", f"the image is truncated or damaged ({reason})") from None
    for offset, start, name in _FOREIGN_STARTS:
        if body[offset:].startswith(start):
            raise ImageError("unsupported_kind", f"{name} is not supported; send {', '.join(KINDS)}")
    raise ImageError("not_an_image", f"the body is not an image; send {', '.join(KINDS)}")


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        limit = f"{width}×{height} px is too large: at most {max_pixels:,} pixels are accepted"
        raise ImageError("too_many_pixels", f"{limit}; send a smaller image")
    if max(width, height) > MAX_SIDE:
        limit = f"{width}×{height} px is too long: a side of at most {MAX_SIDE:,} px is accepted"
        raise ImageError("too_many_pixels", f"{limit}; send a smaller image")


def _check_tiff(body: bytes, max_pixels: int | None) -> None:
    """What Pillow does not look at before it has taken the time and the memory: tiles and strips."""
    tags = _tags(body)
    width, height = (tags.get(tag, (0, 0, 0))[2] for tag in (322, 323))  # of a tile
    _check_size(width, height, max_pixels)
    if (count := max(tags.get(tag, (0, 0, 0))[1] for tag in (273, 324))) > MAX_STRIPS:  # offsets of strips and tiles
        raise ImageError("unsupported_kind", f"a TIFF file of {count:,} strips is not read; save it in fewer")


def _tags(block: bytes) -> dict[int, tuple[int, int, int]]:
    """The first directory of a TIFF file or an EXIF block: tag to type, count and value (0 unless a short or long)."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or 42 not in block[2:4]:
        return {}
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
    except struct.error:
        return {}
    entries = block[start + 2 : start + 2 + 12 * count]
    tags = {}
    for tag, kind, number, value in struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12]):
        form = {3: "H", 4: "I"}.get(kind)
        tags[tag] = kind, number, struct.unpack_from(order + form, value)[0] if form else 0
    return tags


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF says, or XMP where it does not; anything else, 0 too, says nothing.

    Only this tag is read: Pillow's `exif_transpose` writes all others anew, for which a file can have it take minutes.
    """
    info = image.info
    if hasattr(image, "tag_v2"):
        value = image.tag_v2.get(274)
        return value if isinstance(value, int) else 0
    exif = info.get("exif") or b""
    if not exif and "Raw profile type exif" in info:  # PNG, as ImageMagick writes it
        try:
            exif = bytes.fromhex("".join(str(info["Raw profile type exif"]).split("\n")[3:]))
        except ValueError:
            exif = b""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    tags = _tags(exif)
    if 274 in tags:
        return tags[274][2] if tags[274][1] == 1 else 0
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    found = re.search(_XMP, xmp) if isinstance(xmp, str) else re.search(_XMP.encode(), xmp)
    return int(found[2]) if found else 0


def _counts(body: bytes) -> tuple[int, int]:
    """Scans of a JPEG file, and EXIF segments before the first; what lies in other segments or behind its end, such as
    a film, does not count."""
    scans, exif, place = 0, 0, 2
    while (marker := _MARKER.search(body, place)) and (kind := marker[1]) != b"\xd9":  # the end
        scans += kind == b"\xda"
        exif += kind == b"\xe1" and not scans
        place = marker.end() + int.from_bytes(body[marker.end() : marker.end() + 2], "big")
    return scans, exif


def _plain_jpeg(body: bytes) -> int:
    """Pixels, counted as often as the decoder holds them; 0 if the file is not plain. As the next two.

    Raises:
        struct.error: the body ends within a header.
    """
    place, frames = 2, []
    for _ in range(PLAIN_PARTS):
        start, kind, length = struct.unpack_from(">BBH", body, place)
        if start != 0xFF or length < 2:
            return 0
        if kind == 0xDA:
            break
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xCC):  # a frame; those are tables
            frames.append((kind, *struct.unpack_from(">BHHB", body, place + 4)))
        elif not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF):
            return 0
        place += 2 + length
    else:
        return 0
    if len(frames) != 1:
        return 0
    ((kind, bits, height, width, colours),) = frames
    (scanned,) = struct.unpack_from(">B", body, place + 4)  # colours in the first scan
    if kind not in (0xC0, 0xC1, 0xC2) or bits != 8 or colours not in (1, 3):
        return 0
    if kind != 0xC2 and scanned == colours:  # the decoder stops after this scan
        return width * height
    if body.count(_SCAN) > PLAIN_SCANS and _counts(body)[0] > PLAIN_SCANS:
        return 0
    return HELD_OFTEN * width * height


def _plain_png(body: bytes) -> int:
    if body[12:16] != b"IHDR":
        return 0
    width, height, bits, _, _, _, interlaced = struct.unpack_from(">IIBBBBB", body, 16)
    place, pixel_chunks, others, metadata = 8, 0, 0, 0
    while pixel_chunks <= PLAIN_IDAT and others <= PLAIN_PARTS and metadata <= PLAIN_METADATA:
        length, kind = struct.unpack_from(">I4s", body, place)
        place += 12 + length
        if kind == b"IDAT":
            pixel_chunks += 1
            continue
        if kind == b"IEND":
            return width * height * (HELD_OFTEN if interlaced else 1) if bits <= 8 else 0
        if kind == b"acTL":  # an animation
            return 0
        others, metadata = others + 1, metadata + length
    return 0


def _plain_webp(body: bytes) -> int:
    place, others, metadata, canvas = 12, 0, 0, 0
    while others <= PLAIN_PARTS and metadata <= PLAIN_METADATA:
        kind, length = struct.unpack_from("<4sI", body, place)
        if kind in (b"VP8 ", b"VP8L"):
            lossless = kind == b"VP8L"
            (bits,) = struct.unpack_from("<I", body, place + (9 if lossless else 14))  # sides of 14 bits
            width, height = bits & 0x3FFF, bits >> (14 if lossless else 16) & 0x3FFF
            return HELD_OFTEN * max(canvas, (width + lossless) * (height + lossless))
        if kind == b"VP8X":
            flags, *sides = struct.unpack_from("<B3x3s3s", body, place + 8)
            if flags & 2:  # an animation
                return 0
            width, height = (1 + int.from_bytes(side, "little") for side in sides)
            canvas = width * height
        elif kind != b"ALPH":
            metadata += length
        others, place = others + 1, place + 8 + length + length % 2
    return 0


def _is_large_webp(body: bytes) -> bool:
    try:
        return _plain_webp(body) > PLAIN_PIXELS
    except struct.error:
        return False


def _crop_in_strips(image: Image.Image, method: Image.Transpose | None, size: int, resize: int) -> np.ndarray:
    """`crop` of an image that is still to be turned and to become RGB: strip by strip, to the same bit.

    Pillow resizes in two passes, rows first and rounded, so the first can be made of strips.
    """
    is_on_side = method is not None and method.name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")
    width, height = image.size[::-1] if is_on_side else image.size
    left, top, right, bottom = crop_box(width, height, size, resize)
    rows = max(1, STRIP // (right - left))
    narrow = Image.new("RGB", (size, bottom - top))
    for start in range(top, bottom, rows):
        end = min(start + rows, bottom)
        strip = image.crop(_stored((left, start, right, end), width, height, method))
        strip = _to_rgb(strip if method is None else strip.transpose(method))
        narrow.paste(strip.resize((size, end - start), Image.Resampling.BILINEAR), (0, start - top))
    return np.asarray(narrow.resize((size, size), Image.Resampling.BILINEAR))


def _stored(
    box: tuple[int, int, int, int], width: int, height: int, method: Image.Transpose | None
) -> tuple[int, int, int, int]:
    """Where a box of the upright image, of `width` times `height`, lies in the pixels that `method` turns."""
    left, top, right, bottom = box
    name = "" if method is None else method.name
    if name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "TRANSVERSE", "ROTATE_270"):
        left, right = width - right, width - left
    if name in ("FLIP_TOP_BOTTOM", "ROTATE_180", "TRANSVERSE", "ROTATE_90"):
        top, bottom = height - bottom, height - top
    if name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270"):
        return top, left, bottom, right
    return left, top, right, bottom


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, a strip of rows after the other: the whole would be there four times over."""
    opaque = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return opaque


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("unsupported_kind", "32-bit grey has no agreed white; send 8-bit or 16-bit grey, or RGB")
    try:
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            return _on_white(image)
        return image.convert("RGB")
    except ValueError as error:  # a mode with no way to RGB, such as LAB
        raise ImageError("unsupported_kind", f"pixels of mode {image.mode} are not supported ({error})") from None
