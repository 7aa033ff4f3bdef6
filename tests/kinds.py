"""Image files of every kind that is read, and of kinds that are refused, each with what it must become."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps


def gradient(width: int = 24, height: int = 18) -> Image.Image:
    """A smooth image without symmetry, so that a turned or mirrored one is noticed."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8))


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(_stored(orientation), "JPEG", exif=exif, quality=95, subsampling=0)


def _stored(orientation: int) -> Image.Image:
    """The pixels as a camera stores them, for the image to come out as `gradient()`."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    return gradient() if undo is None else gradient().transpose(undo)


def _on_white(rgba: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _rgba() -> Image.Image:
    rgba = gradient().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    return rgba


def _palette_with_transparency() -> tuple[bytes, Image.Image]:
    palette = gradient().quantize(16)
    body = save(palette, "PNG", transparency=3)
    pixels = np.asarray(palette.convert("RGB")).copy()
    pixels[np.asarray(palette) == 3] = 255
    return body, Image.fromarray(pixels)


def _grey16() -> tuple[Image.Image, Image.Image]:
    values = np.linspace(0, 65535, 24 * 18).reshape(18, 24).astype(np.uint16)
    return Image.fromarray(values), Image.fromarray(np.round(values / 257).astype(np.uint8))


def _animation() -> bytes:
    frames = [gradient().quantize(64), Image.new("P", (24, 18), 0)]
    return save(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


def _cmyk() -> tuple[bytes, Image.Image]:
    cmyk = gradient().convert("CMYK")
    return save(cmyk, "JPEG", quality=100), cmyk.convert("RGB")


ADAM7 = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))


def _interlaced(image: Image.Image) -> bytes:
    """As Adam7, which Pillow does not write: seven passes, each (first row, row step, first column, column step)."""
    pixels = np.asarray(image)
    rows = [row.tobytes() for y, dy, x, dx in ADAM7 for row in pixels[y::dy, x::dx]]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1)),  # 8-bit RGB, interlaced
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),  # 0: no filter
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


PLAIN = gradient()
GREY = PLAIN.convert("L")
PALETTE = PLAIN.quantize(64)

# name: (file, the image that it must become, mean difference in grey levels that its compression may cost)
GOOD: dict[str, tuple[bytes, Image.Image, float]] = {
    "jpeg": (save(PLAIN, "JPEG", quality=95), PLAIN, 2),
    "jpeg progressive": (save(PLAIN, "JPEG", quality=95, progressive=True), PLAIN, 2),
    "jpeg grey": (save(GREY, "JPEG", quality=95), GREY, 2),
    "jpeg cmyk": (*_cmyk(), 3),
    **{f"jpeg turned {o}": (_turned(o), PLAIN, 2) for o in range(1, 9)},
    "png": (save(PLAIN, "PNG"), PLAIN, 0),
    "png grey": (save(GREY, "PNG"), GREY, 0),
    "png interlaced": (_interlaced(PLAIN), PLAIN, 0),
    "png bilevel": (
        save(GREY.point(lambda v: 255 * (v > 90)).convert("1"), "PNG"),
        GREY.point(lambda v: 255 * (v > 90)),
        0,
    ),
    "png grey 16": (save(_grey16()[0], "PNG"), _grey16()[1], 0.51),
    "png palette": (save(PALETTE, "PNG"), PALETTE.convert("RGB"), 0),
    "png palette with transparency": (*_palette_with_transparency(), 0),
    "png alpha": (save(_rgba(), "PNG"), _on_white(_rgba()), 0),
    "png grey alpha": (save(_rgba().convert("LA"), "PNG"), _on_white(_rgba().convert("LA").convert("RGBA")), 0),
    "webp": (save(PLAIN, "WEBP", lossless=True), PLAIN, 0),
    "webp alpha": (save(_rgba(), "WEBP", lossless=True, exact=True), _on_white(_rgba()), 0),
    "bmp": (save(PLAIN, "BMP"), PLAIN, 0),
    "gif animation": (_animation(), PLAIN.quantize(64).convert("RGB"), 1),
    "tiff": (save(PLAIN, "TIFF"), PLAIN, 0),
    "tiff lzw": (save(PLAIN, "TIFF", compression="tiff_lzw"), PLAIN, 0),
    "tiff cmyk": (save(PLAIN.convert("CMYK"), "TIFF"), PLAIN.convert("CMYK").convert("RGB"), 0),
    "tiff grey 16": (save(_grey16()[0], "TIFF"), _grey16()[1], 0.51),
    "one pixel": (save(ImageOps.fit(PLAIN, (1, 1)), "PNG"), ImageOps.fit(PLAIN, (1, 1)), 0),
}

# 64×40 px stored, 40×64 px upright: red above blue, with a white band on the right.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAA"
    "AAAERAAAIAAQAAAAAB7AABAAAAAAAAAJYAAgAAAAACggABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVp"
    "bmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcnAAAADmaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGE"
    "ABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkA"
    "AAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAKAAAAAEAAAAAAAAAAv///+gAAAACAAAAEH"
    "BpeGkAAAAAAwgICAAAAAlpcm90AwAAABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEAAQAAAMJtZGF0AAAA"
    "kigBrwngZ8DjxDrx4/k6i2cN//6spUFdjPmmkfqysXby95TrusMNhsMxe37PwvycjisRwwzZo1NOL+yj/9Z0fmw2TDyLKR+YxQa46PHLjP9lPp"
    "bY8BvqrYEwGdbNPXmQqmAJ87rf1jQRQYfnH3GG7votRAcHTkK1f+dUs6Pzh/X8qWnxAANzqaQkPzVAHFYfhRn1AAAABkV4aWYAAElJKgAIAAAA"
    "AQASAQMAAQAAAAYAAAAAAAAA"
)

# 5,712×4,284 px, of 24 megapixels as today's phones take them: red above blue.
LARGE_HEIC = zlib.decompress(
    base64.b64decode(
        "eNpjYGCQSSupLMhIzUxmAILczDRDEDs3MzGNgYExMje1JJEBAhQzUnKKoGyGgszkEgY0oJSZkw82xMWBgREIgYCxFkIzMIjVAAnlzMy8NDAXJCoK5K"
        "QyQXkZZcmGICZfQWZJLlzJzcyCogIgvSuzIDkfSFcDlTkzMoOEJoAVbfnA8Ofvjx8MDPzMCUAdEg6MPIz//4MUMINUMIPQll1MDolAST0nRkY0mQUM"
        "mzoYnNnvRa9UWbZzB0eGgQJQmBlEMCgmAbWwuzAeLNqQ5AC0STg5P6coLzmnAijMy8DWABQSySwuSIV6L4CBQWAPkCFQkFmRCRJh5uDgAFLimQW5sB"
        "AEBgpLIxMzC1B5S25KIjAAxSo0GNezCCjOd1319XXYyqClXiUvLy/3m2uFTM3jwiIIoyz+VFq8/v9zQv/5AzFaR/LfCM+8eIcrMSkN6kOqoagDy1+8"
        "Y0s4akttg5kZqh0m85ocoL65TGXt1DcUiAQn0MRYtik0MfZ+Aw2MZXWhgaEStAhXLwcaGNpPgzBltKZBDuijvpnMTUMj6XPeoL6ZfCeob6YIDVK9VA"
        "D1zVRWoL6Z2jQw05AGZtotoL6ZnjSo8cJoUNgl0MDMAhqYWe5Ai5YJ9c2kRd0xhQZmLqWBmQtoYOaahtz9egz137QVH635t/sM9S0woEGB4keDzD+Z"
        "JoFLfTNXjJo5aiaV0NZRM0fNHDVz1MxRM0fNHDWTaLStAQBKetd6"
    )
)

_PNG = save(gradient(200, 150), "PNG")
_JPEG = save(gradient(200, 150), "JPEG")

# name: (body, cause)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"hello", "not_an_image"),
    "zeros": (bytes(100), "not_an_image"),
    "html": (b"<!doctype html><title>404</title>", "not_an_image"),
    "png cut in its pixels": (_PNG[: len(_PNG) // 2], "truncated"),
    "png cut in its header": (_PNG[:12], "truncated"),
    "jpeg cut in its pixels": (_JPEG[: len(_JPEG) // 2], "truncated"),
    "jpeg cut in its header": (_JPEG[:20], "truncated"),
    "bomb": (save(Image.new("1", (9000, 9000)), "PNG"), "too_many_pixels"),
    "bomb beyond pillow's limit": (save(Image.new("1", (20_000, 20_000)), "PNG"), "too_many_pixels"),
    "heic cut in its header": (HEIC[:200], "truncated"),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(64), "unsupported_kind"),
    "mp4": (b"\0\0\0\x18ftypisom" + bytes(64), "unsupported_kind"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_kind"),
    "pdf": (b"%PDF-1.7\n", "unsupported_kind"),
    "psd": (b"8BPS" + bytes(64), "unsupported_kind"),
    "ico": (save(PLAIN, "ICO"), "unsupported_kind"),
    "float tiff": (save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unsupported_kind"),
}
