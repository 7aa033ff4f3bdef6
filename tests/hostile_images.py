"""Image files that cost a decoder far more than their size says: seconds, gigabytes, or a log full of warnings.

`IMAGES` maps a name to the bytes of a file. Each is below 10 MB, so a server's limit of the body's size lets it pass.
"""

from __future__ import annotations

import io
import random
import struct
import zlib

from PIL import Image

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
SHORT, LONG, RATIONAL = 3, 4, 5  # types of a TIFF's tags


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def png_header(width: int, height: int, colours: int = 2, interlaced: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, interlaced)


def png_pixels(width: int, height: int, channels: int = 3, share: float = 1.0) -> tuple[bytes, bytes]:
    """Black, and only the first `share` of the compressed bytes."""
    packer, row = zlib.compressobj(9), bytes(1 + width * channels)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"IDAT", data[: int(len(data) * share)]


def jpeg(size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "JPEG", **options)
    return buffer.getvalue()


def segment(kind: int, data: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data


def tiff(tags: dict[int, tuple[int, int, int | bytes]], data: bytes = b"") -> bytes:
    """Little-endian, one directory behind the data at offset 8.

    Args:
        tags: number to (type, count, value), or the bytes of a value that does not fit in four.
    """
    place, outside = 8 + len(data), b""
    place += 2 + 12 * len(tags) + 4
    table = struct.pack("<H", len(tags))
    for tag, (kind, count, value) in sorted(tags.items()):
        if isinstance(value, bytes):
            table += struct.pack("<HHII", tag, kind, count, place + len(outside))
            outside += value
        else:
            table += struct.pack("<HHII", tag, kind, count, value)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + bytes(4) + outside


def grey_tiff(width: int, height: int, compression: int, more: dict[int, tuple[int, int, int | bytes]]) -> dict:  # type: ignore[type-arg]
    sized = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}
    return {tag: (LONG, 1, value) for tag, value in sized.items()} | more


def jpeg_of_markers() -> bytes:
    """104 kB that look like scans, then nothing but 0xFF: a search that backtracks takes minutes."""
    body = jpeg()
    false = segment(0xFE, b"\xff\xda" * 1_100)
    return body[:2] + false + body[2:-2] + b"\xff" * 100_000 + b"\0" + JPEG_END


def jpeg_of_exif(count: int = 450_000) -> bytes:
    """8.1 MB of EXIF segments, which Pillow joins one by one."""
    body = jpeg()
    return body[:2] + segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0") * count + body[2:]


def jpeg_of_rationals(count: int = 950_000) -> bytes:
    """7.6 MB of EXIF in 116 segments: a resolution of that many numbers, which Pillow reads as it opens the file."""
    values_at = 8 + 2 + 12 * 2 + 4
    block = b"II*\0\x08\0\0\0" + struct.pack("<HHHIIHHII", 2, 0x11A, RATIONAL, count, values_at, 0x128, SHORT, 1, 2)
    block += bytes(4) + struct.pack("<II", 1, 3) * count
    parts = (block[start : start + 65_527] for start in range(0, len(block), 65_527))
    body = jpeg()
    without_jfif = body[2 + 18 :]
    return body[:2] + b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts) + without_jfif


def jpeg_of_comments(count: int = 1_900_000) -> bytes:
    """7.6 MB of empty comments between scans, which have to be told from what only looks like scans."""
    body = jpeg(progressive=True)
    return body[:-2] + segment(0xFE, b"") * count + segment(0xDA, b"") * 70 + JPEG_END


def png_of_texts(count: int = 60) -> bytes:
    """63 kB that unpack to a megabyte for each text."""
    text = b"Comment\0\0" + zlib.compress(bytes(1_000_000), 9)
    return png(png_header(16, 12), *[(b"zTXt", text)] * count, png_pixels(16, 12), (b"IEND", b""))


def jpeg_of_scans(side: int = 7_000, count: int = 2_000) -> bytes:
    """Each scan of a few bytes goes over all pixels."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "JPEG", progressive=True)
    body = buffer.getvalue()
    return body[:-2] + body[body.rindex(b"\xff\xc4") : -2] * count + JPEG_END


def tiff_of_a_large_tile(side: int = 46_336) -> bytes:
    """4×4 px in one LZW tile of 2.1 billion."""
    tile = b"\x80\x0b\x60\x50\x22\x0c\x0c\x85"
    tags = {322: (LONG, 1, side), 323: (LONG, 1, side), 324: (LONG, 1, 8), 325: (LONG, 1, len(tile))}
    return tiff(grey_tiff(4, 4, 5, tags), tile)


def tiff_of_fax(height: int = 50_000_000) -> bytes:
    """One column of fax lines: libtiff writes 60 bytes to stderr about each."""
    data = random.Random(1).randbytes(300)
    tags = {273: (LONG, 1, 8), 278: (LONG, 1, height), 279: (LONG, 1, len(data)), 258: (LONG, 1, 1)}
    return tiff(grey_tiff(1, height, 2, tags), data)


def tiff_of_strips(count: int = 1_200_000) -> bytes:
    """A row in each strip, all at the same offset."""
    tags: dict[int, tuple[int, int, int | bytes]] = {
        273: (SHORT, count, struct.pack("<H", 8) * count),
        278: (LONG, 1, 1),
        279: (SHORT, count, struct.pack("<H", 1) * count),
    }
    return tiff(grey_tiff(1, count, 1, tags), bytes(8))


def exif_of_rationals(entries: int = 1, count: int = 1_000_000) -> bytes:
    """A directory in a directory: its entries are the same 8 MB of rationals, and the image is turned."""
    values = struct.pack("<II", 1, 3) * count
    nested_at = 8 + 2 + 12 * 2 + 4
    values_at = nested_at + 2 + 12 * entries + 4
    first = struct.pack("<H", 2)
    first += struct.pack("<HHII", 274, SHORT, 1, 6) + struct.pack("<HHII", 0x8769, LONG, 1, nested_at) + bytes(4)
    nested = struct.pack("<H", entries)
    nested += b"".join(struct.pack("<HHII", 0x9200 + i, RATIONAL, count, values_at) for i in range(entries)) + bytes(4)
    return b"II*\0\x08\0\0\0" + first + nested + values


def png_of_rationals() -> bytes:
    return png(png_header(16, 12), (b"eXIf", exif_of_rationals()), png_pixels(16, 12), (b"IEND", b""))


def bmp_of_runs(width: int = 50_000_000, height: int = 1) -> bytes:
    """1,084 bytes: a run-length encoded row that ends after a few pixels."""
    data = b"\x03\x01\0\0\0\x01"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + header + bytes(1024) + data


def gif_of_frames(side: int = 7_000) -> bytes:
    """A canvas of 49 megapixels around a frame of a few pixels."""
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "GIF")
    body = buffer.getvalue()
    return body[:6] + struct.pack("<HH", side, side) + body[10:]


def webp(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


IMAGES: dict[str, bytes] = {
    "jpeg of markers": jpeg_of_markers(),
    "jpeg of exif": jpeg_of_exif(),
    "jpeg of rationals": jpeg_of_rationals(),
    "jpeg of comments": jpeg_of_comments(),
    "jpeg of scans": jpeg_of_scans(),
    "png truncated at 50 megapixels": png(png_header(7_071, 7_071), png_pixels(7_071, 7_071, share=0.5)),
    "png of 16 megapixels": png(png_header(4_000, 4_000), png_pixels(4_000, 4_000), (b"IEND", b"")),
    "png interlaced at 16 megapixels": png(png_header(4_000, 4_000, 2, 1), png_pixels(4_000, 4_000), (b"IEND", b"")),
    "png with nested rationals": png_of_rationals(),
    "png of texts": png_of_texts(),
    "png of one row": png(png_header(50_000_000, 1, 0), png_pixels(50_000_000, 1, 1), (b"IEND", b"")),
    "png of one column": png(
        png_header(1, 50_000_000, 0), (b"IDAT", zlib.compress(bytes(100_000_000))), (b"IEND", b"")
    ),
    "tiff of a large tile": tiff_of_a_large_tile(),
    "tiff of fax lines": tiff_of_fax(),
    "tiff of a million strips": tiff_of_strips(),
    "bmp of runs": bmp_of_runs(),
    "bmp of runs in a square": bmp_of_runs(7_071, 7_071),
    "gif of a large canvas": gif_of_frames(),
    "webp of 49 megapixels": webp(7_000),
}
assert all(len(body) < 10_000_000 for body in IMAGES.values())
