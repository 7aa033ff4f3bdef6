"""What a file's headers say before anything is decoded: its kind, its size, and what decoding it would cost.

All walks over a file are of bounded length. `is_plain` tells a worker what it may decode itself; the checks refuse what
would take a decoder minutes or gigabytes. Which kinds there are, and how an unusable file is refused, stands here too.
"""

from __future__ import annotations

import re
import struct

try:
    from pi_heif import register_heif_opener
except ImportError:  # an extra; without it HEIC files are refused, with its name
    HAS_HEIF = False
else:
    HAS_HEIF = True
    register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(["HEIF"] if HAS_HEIF else []))
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(HEIF_SUFFIXES if HAS_HEIF else ()),
)

MAX_PIXELS = 50_000_000  # 200 MB in Pillow: more than a camera's 48 megapixels, and too few to exhaust a worker
MAX_SIDE = 65_500  # px, the longest that a JPEG encoder writes: Pillow's memory also grows with the number of rows

# `is_plain`: what a worker decodes itself, which includes the photographs of phones.
PLAIN_BYTES = 8_000_000
PLAIN_PIXELS = 16 << 20
HELD_OFTEN = 4  # a decoder that holds an image up to this many times over gets as many times fewer pixels
PLAIN_PARTS = 128  # segments of a JPEG file before its pixels, chunks of PNG and WebP other than pixels
PLAIN_SCANS = 64
PLAIN_METADATA = 1 << 18  # bytes of such segments and chunks: Pillow parses some, at up to 0.35 s a megabyte
PLAIN_PACKED = 4  # compressed texts and profiles in a PNG file, which Pillow unpacks to a megabyte each
PLAIN_IDAT = 4_096  # chunks; encoders write at least 8 KiB into each

# A JPEG file may hold a scan after the other, of a hundred bytes each, and each goes over all pixels: 25 ms for 50
# megapixels. An encoder writes about ten.
MAX_SCANNED = 1_000_000_000  # pixels times scans: ten scans of 100 megapixels, and half a second
MAX_MARKERS = 100_000  # of a JPEG file, that are looked at to count these: 50 ms
MAX_EXIF = 1_000  # segments of a JPEG file, which Pillow joins in quadratic time: 64 MB of XMP
MAX_STRIPS = 100_000  # of a TIFF file, each a Python object in Pillow
_SCAN, _EXIF = b"\xff\xda", b"\xff\xe1"
_MARKER = re.compile(rb"\xff([^\0\xff\xd0-\xd7])")  # but for those within a scan's data; finds in linear time

# How the supported kinds begin; a body that begins so and cannot be opened is damaged, not foreign.
_SUPPORTED_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# What the files of phones begin with, from the fifth byte on, after "ftyp".
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")

# Kinds that people send and that are not read here: (offset, bytes, name).
_FOREIGN_STARTS = (
    (4, b"ftypavif", "AVIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in _HEIF_BRANDS),
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

    `cause` is one of: empty, not_an_image, unsupported_kind, truncated, too_many_pixels; in a worker too_slow, no_time
    and the other types of handler/errors.py; of files on a disk unreadable, too_many_bytes.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def bare(self) -> ImageError:
        """The same without its traceback, whose frames hold the decoder and its pixels: to be kept for a while."""
        return ImageError(self.cause, str(self))


def is_plain(body: bytes) -> bool:
    """Whether a walk over a file's headers, of bounded length, promises that decoding it takes little of anything.

    So are 8-bit JPEG, PNG and WebP files without oddities, of at most 8 MB and 16 megapixels; of 4 megapixels where
    a decoder holds the image more than once (progressive JPEG, interlaced PNG, WebP).
    """
    return len(body) <= PLAIN_BYTES and 0 < _plain_pixels(body) <= PLAIN_PIXELS


def is_photograph(body: bytes) -> bool:
    """Whether a file may be a camera's, which takes its time because of its pixels and not of any oddity.

    It is plain but for its size, or HEIC.
    """
    return is_heif(body) or _plain_pixels(body) > 0


def is_heif(body: bytes) -> bool:
    return body[4:8] == b"ftyp" and body[8:12] in _HEIF_BRANDS


def check_start(body: bytes, max_pixels: int | None) -> None:
    """What must be known before Pillow opens a file.

    Raises:
        ImageError: it is empty, or a TIFF file that would take Pillow's time and memory as it is opened.
    """
    if not body:
        raise ImageError("empty", "the body is empty; send the bytes of an image")
    if body.startswith((b"II", b"MM")):
        _check_tiff(body, max_pixels)


def is_odd_jpeg(body: bytes) -> bool:
    """Whether it must be searched for scans and EXIF segments, for 1 ms a MB."""
    return body.startswith(b"\xff\xd8") and not is_plain(body)


def check_exif_segments(body: bytes) -> None:
    """
    Raises:
        ImageError: an odd JPEG file has more of them than Pillow joins in good time.
    """
    if body.count(_EXIF) > MAX_EXIF and (count := counts(body)[1]) > MAX_EXIF:
        raise ImageError("unsupported_kind", f"a JPEG file of {count} EXIF segments is not read; save it again")


def check_scans(body: bytes, pixels: int) -> None:
    """
    Raises:
        ImageError: an odd JPEG file of so many `pixels` has more scans than its decoder goes through in good time.
    """
    most = max(20, MAX_SCANNED // max(pixels, 1_000_000))
    if body.count(_SCAN) > most and (scans := counts(body)[0]) > most:
        raise ImageError("unsupported_kind", f"a JPEG file of {scans} scans is not read; save it as baseline")


def check_size(width: int, height: int, max_pixels: int | None) -> None:
    """
    Raises:
        ImageError: `too_many_pixels`: width times height, or one of them.
    """
    if max_pixels is not None and width * height > max_pixels:
        limit = f"{width}×{height} px is too large: at most {max_pixels:,} pixels are accepted"
        raise ImageError("too_many_pixels", f"{limit}; send a smaller image")
    if max(width, height) > MAX_SIDE:
        limit = f"{width}×{height} px is too long: a side of at most {MAX_SIDE:,} px is accepted"
        raise ImageError("too_many_pixels", f"{limit}; send a smaller image")


def refusal_of_unopened(body: bytes, reason: str) -> ImageError:
    """Why Pillow does not open a file: it is damaged, of a kind that is not supported, or no image.

    Args:
        reason: what Pillow says, if it is damaged.
    """
    if body.startswith(_SUPPORTED_STARTS) or (HAS_HEIF and is_heif(body)):
        return ImageError("truncated", f"the image is truncated or damaged ({reason})")
    for offset, start, name in _FOREIGN_STARTS:
        if body[offset:].startswith(start):
            way_out = f"send {', '.join(KINDS)}" + (", or install pi-heif where it is read" if is_heif(body) else "")
            return ImageError("unsupported_kind", f"{name} is not supported; {way_out}")
    return ImageError("not_an_image", f"the body is not an image; send {', '.join(KINDS)}")


def has_many_scans(body: bytes) -> bool:
    """At a glance: more scans than encoders write."""
    return body.count(_SCAN) > 16


def is_large_webp(body: bytes) -> bool:
    """Whether a WebP file takes more memory than a plain one may: libwebp does not say why it fails."""
    try:
        return _plain_webp(body) > PLAIN_PIXELS
    except struct.error:
        return False


def tiff_tags(block: bytes) -> dict[int, tuple[int, int, int]]:
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


def _check_tiff(body: bytes, max_pixels: int | None) -> None:
    """What Pillow does not look at before it has taken the time and the memory: tiles and strips."""
    tags = tiff_tags(body)
    width, height = (tags.get(tag, (0, 0, 0))[2] for tag in (322, 323))  # of a tile
    check_size(width, height, max_pixels)
    if (count := max(tags.get(tag, (0, 0, 0))[1] for tag in (273, 324))) > MAX_STRIPS:  # offsets of strips and tiles
        raise ImageError("unsupported_kind", f"a TIFF file of {count:,} strips is not read; save it in fewer")


def counts(body: bytes) -> tuple[int, int]:
    """Scans of a JPEG file, and EXIF segments before the first; what lies in other segments or behind its end, such as
    a film, does not count. Of a file with MAX_MARKERS, that many of each."""
    scans, exif, offset = 0, 0, 2
    for _ in range(MAX_MARKERS):
        if not (marker := _MARKER.search(body, offset)) or (kind := marker[1]) == b"\xd9":  # the end
            return scans, exif
        scans += kind == b"\xda"
        exif += kind == b"\xe1" and not scans
        offset = marker.end() + int.from_bytes(body[marker.end() : marker.end() + 2], "big")
    return MAX_MARKERS, MAX_MARKERS


def _plain_pixels(body: bytes) -> int:
    """Pixels, counted as often as the decoder holds them; 0 if the file has oddities."""
    try:
        if body.startswith(b"\xff\xd8\xff"):
            return _plain_jpeg(body)
        if body.startswith(b"\x89PNG\r\n\x1a\n"):
            return _plain_png(body)
        if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
            return _plain_webp(body)
    except struct.error:  # it ends within a header
        pass
    return 0


def _plain_jpeg(body: bytes) -> int:
    """As `_plain_pixels`, and the next two.

    Raises:
        struct.error: the body ends within a header.
    """
    offset, frames, metadata, exif = 2, [], 0, 0
    for _ in range(PLAIN_PARTS):
        start, kind, length = struct.unpack_from(">BBH", body, offset)
        if start != 0xFF or length < 2:
            return 0
        if kind == 0xDA:
            break
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xCC):  # a frame; those are tables
            frames.append((kind, *struct.unpack_from(">BHHB", body, offset + 4)))
        elif kind == 0xFE or 0xE0 <= kind <= 0xEF:
            metadata += length
            exif += kind == 0xE1 and body.startswith(b"Exif\0\0", offset + 4)
        elif kind not in (0xC4, 0xDB, 0xDD):
            return 0
        offset += 2 + length
    else:
        return 0
    if len(frames) != 1 or metadata > PLAIN_METADATA or exif > 1:  # Pillow would join several EXIF segments
        return 0
    ((kind, bits, height, width, colours),) = frames
    (scanned,) = struct.unpack_from(">B", body, offset + 4)  # colours in the first scan
    if kind not in (0xC0, 0xC1, 0xC2) or bits != 8 or colours not in (1, 3):
        return 0
    if kind != 0xC2 and scanned == colours:  # the decoder stops after this scan
        return width * height
    if body.count(_SCAN) > PLAIN_SCANS:
        return 0
    return HELD_OFTEN * width * height


def _plain_png(body: bytes) -> int:
    if body[12:16] != b"IHDR":
        return 0
    width, height, bits, _, _, _, interlaced = struct.unpack_from(">IIBBBBB", body, 16)
    offset, pixel_chunks, others, metadata, packed = 8, 0, 0, 0, 0
    while (
        pixel_chunks <= PLAIN_IDAT and others <= PLAIN_PARTS and metadata <= PLAIN_METADATA and packed <= PLAIN_PACKED
    ):
        length, kind = struct.unpack_from(">I4s", body, offset)
        offset += 12 + length
        if kind == b"IDAT":
            pixel_chunks += 1
            continue
        if kind == b"IEND":
            return width * height * (HELD_OFTEN if interlaced else 1) if bits <= 8 else 0
        if kind == b"acTL":  # an animation
            return 0
        others, metadata = others + 1, metadata + length
        packed += kind in (b"zTXt", b"iTXt", b"iCCP")
    return 0


def _plain_webp(body: bytes) -> int:
    offset, others, metadata, canvas = 12, 0, 0, 0
    while others <= PLAIN_PARTS and metadata <= PLAIN_METADATA:
        kind, length = struct.unpack_from("<4sI", body, offset)
        if kind in (b"VP8 ", b"VP8L"):
            lossless = kind == b"VP8L"
            (bits,) = struct.unpack_from("<I", body, offset + (9 if lossless else 14))  # sides of 14 bits
            width, height = bits & 0x3FFF, bits >> (14 if lossless else 16) & 0x3FFF
            return HELD_OFTEN * max(canvas, (width + lossless) * (height + lossless))
        if kind == b"VP8X":
            flags, *sides = struct.unpack_from("<B3x3s3s", body, offset + 8)
            if flags & 2:  # an animation
                return 0
            width, height = (1 + int.from_bytes(side, "little") for side in sides)
            canvas = width * height
        elif kind != b"ALPH":
            metadata += length
        others, offset = others + 1, offset + 8 + length + length % 2
    return 0
