"""From the bytes of an image file to the square of pixels that a network sees, with Pillow.

Training reads its data with this file, and every archive carries a copy of it for its handler, so both see the same
pixels. It therefore needs nothing but Pillow and NumPy. Where simplejpeg is installed, small plain JPEG files are
decoded with it: the same libjpeg-turbo, the same pixels, half the time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageCms import ImageCmsTransform

from predictor.colour_profiles import conversion, foreign_profile, to_srgb
from predictor.image_headers import (
    KINDS,
    MAX_PIXELS,
    SUFFIXES,
    ImageError,
    check_exif_segments,
    check_scans,
    check_size,
    check_start,
    has_many_scans,
    is_large_webp,
    is_odd_jpeg,
    is_plain,
    refusal_of_unopened,
    tiff_tags,
)
from predictor.spec import PixelRule

try:
    import simplejpeg
except ImportError:  # everything works without it, small JPEG files more slowly
    simplejpeg = None

__all__ = [
    "KINDS",
    "MAX_PIXELS",
    "NO_MEMORY",
    "SUFFIXES",
    "ImageError",
    "crop",
    "crop_box",
    "decode",
    "is_plain",
    "read",
    "upright_size",
]

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns up to twice its value; `decode` has a strict one

SMALL = 128 * 128  # pixels, up to which the work of Pillow around its decoder, 40 µs a file, is worth avoiding

STRIP = 1 << 20  # pixels that are turned, put on white and converted at a time; a larger image is never copied whole

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_XMP = r'tiff:Orientation(="|>)([0-9])'

NO_MEMORY = "there is no memory for this image; send a smaller one"


def decode(
    body: bytes, max_pixels: int | None = MAX_PIXELS, at_least: int | None = None, colour: str = "srgb"
) -> Image.Image:
    """The image as upright 8-bit RGB.

    The first frame of an animation; transparency on white; 16-bit grey scaled to 8; CMYK converted; turned as its
    EXIF says. The number of pixels is checked in the header, before anything is decoded.

    Args:
        at_least: px; a JPEG file is decoded at a half, a quarter or an eighth of its size, which is faster, where its
            short edge stays that long.
        colour: as the pixel rule has it.

    Raises:
        ImageError: see there for the causes.
    """
    if (pixels := _small_jpeg(body, max_pixels, colour)) is not None:
        return Image.fromarray(pixels)
    try:
        image = _opened(body, max_pixels)
        if at_least:
            image.draft(None, (at_least, at_least))
        profile = foreign_profile(image) if colour == "srgb" else None
        transform = None if profile is None else conversion(profile)
        method = _load(image)
        return _to_rgb(image if method is None else image.transpose(method), transform)
    except MemoryError:
        raise ImageError("too_many_pixels", NO_MEMORY) from None


def read(
    body: bytes,
    rule: PixelRule,
    max_pixels: int | None = MAX_PIXELS,
    elsewhere: Callable[[bytes], np.ndarray] | None = None,
) -> np.ndarray:
    """`crop` of `decode`, without the copies of the whole image that `decode` makes of a large one.

    A small JPEG file that is its own crop, as of CIFAR-10, goes round Pillow altogether.

    Args:
        elsewhere: reads what is not plain, see `is_plain`, or needs its colours converted, in the place of this
            process.

    Returns:
        uint8 (height, width, 3), RGB.

    Raises:
        ImageError: see there for the causes.
    """
    if rule.height * rule.width <= SMALL and (pixels := _small_jpeg(body, max_pixels, rule.colour)) is not None:
        height, width, _ = pixels.shape
        if (height, width) == (rule.height, rule.width) and crop_box(width, height, rule) == (0, 0, width, height):
            return pixels
        return crop(Image.fromarray(pixels), rule)
    if elsewhere is not None and body and not is_plain(body):
        return elsewhere(body)
    try:
        image = _opened(body, max_pixels)
        profile = foreign_profile(image) if rule.colour == "srgb" else None
        if profile is not None and elsewhere is not None:
            return elsewhere(body)
        transform = None if profile is None else conversion(profile)
        method = _load(image)
        if image.width * image.height > STRIP:
            return _crop_in_strips(image, method, rule, transform)
        return crop(_to_rgb(image if method is None else image.transpose(method), transform), rule)
    except MemoryError:
        raise ImageError("too_many_pixels", NO_MEMORY) from None


def upright_size(head: bytes, max_pixels: int | None = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what `decode` makes of a file, px, by its headers: no pixel is decoded.

    Args:
        head: a file, of which what follows the headers may be left out.

    Raises:
        ImageError, MemoryError: the headers cannot be read, or say that `decode` refuses the file.
    """
    image = _opened(head, max_pixels)
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def crop_box(width: int, height: int, rule: PixelRule) -> tuple[int, int, int, int]:
    """The box that the network sees, in the image's own pixels: left, top, right, bottom.

    Centred; the whole image unless the rule crops. A crop of an image that is narrower than the network's aspect ratio
    is `width * min(rule) / resize` wide, and as high as the ratio says; else the other way round.
    """
    if rule.fit != "crop":
        return 0, 0, width, height
    least = min(rule.height, rule.width)
    if width * rule.height <= height * rule.width:
        across, down = (
            _rounded(width * least, rule.resize),
            _rounded(width * rule.height * least, rule.width * rule.resize),
        )
    else:
        across, down = (
            _rounded(height * rule.width * least, rule.height * rule.resize),
            _rounded(height * least, rule.resize),
        )
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def pad_box(width: int, height: int, rule: PixelRule) -> tuple[int, int, int, int]:
    """Where the image lies in what the network sees: left, top, right, bottom; all of it unless the rule pads."""
    across, down = rule.width, rule.height
    if rule.fit == "pad" and width * rule.height >= height * rule.width:
        down = _rounded(height * rule.width, width)
    elif rule.fit == "pad":
        across = _rounded(width * rule.height, height)
    left, top = (rule.width - across) // 2, (rule.height - down) // 2
    return left, top, left + across, top + down


def _rounded(numerator: int, denominator: int) -> int:
    """The quotient rounded half up, and at least 1."""
    return max(1, (2 * numerator + denominator) // (2 * denominator))


def crop(image: Image.Image, rule: PixelRule) -> np.ndarray:
    """The pixel rule of the spec, the reference that `model.tensor_preprocessing.Resize` equals bit for bit.

    Args:
        image: RGB.

    Returns:
        uint8 (height, width, 3), RGB.
    """
    box = crop_box(*image.size, rule)
    inside = image if box == (0, 0, *image.size) else image.crop(box)
    return _padded(_resized(inside, _inner_size(*image.size, rule), rule), rule)


def _inner_size(width: int, height: int, rule: PixelRule) -> tuple[int, int]:
    left, top, right, bottom = pad_box(width, height, rule)
    return right - left, bottom - top


def _resized(image: Image.Image, size: tuple[int, int], rule: PixelRule) -> Image.Image:
    """Across, then down, with whole grey levels between: left to itself, Pillow 13 orders the passes by the shape."""
    for step in ((size[0], image.height), size):
        if image.size != step:
            image = image.resize(step, FILTERS[rule.interpolation])
    return image


def _padded(image: Image.Image, rule: PixelRule) -> np.ndarray:
    if image.size == (rule.width, rule.height):
        return np.asarray(image)
    whole = Image.new("RGB", (rule.width, rule.height), rule.fill)
    whole.paste(image, ((rule.width - image.width) // 2, (rule.height - image.height) // 2))
    return np.asarray(whole)


def _small_jpeg(body: bytes, max_pixels: int | None, colour: str) -> np.ndarray | None:
    """A JPEG file without EXIF or oddities, uint8 (H, W, 3), without Pillow; None for all else, damage included."""
    if simplejpeg is None or not body.startswith(b"\xff\xd8\xff") or b"\xff\xe1" in body:  # APP1: EXIF or XMP
        return None
    if has_many_scans(body) or (colour == "srgb" and b"ICC_PROFILE\0" in body):  # `decode` looks at those
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


def _opened(body: bytes, max_pixels: int | None) -> Image.Image:
    """A file whose header was read and checked, and no pixel.

    Raises:
        ImageError, MemoryError.
    """
    check_start(body, max_pixels)
    if is_odd := is_odd_jpeg(body):
        check_exif_segments(body)
    image = _open(body)
    width, height = image.size
    check_size(width, height, max_pixels)
    if is_odd:
        check_scans(body, width * height)
    return image


def _load(image: Image.Image) -> Image.Transpose | None:
    """Reads the pixels, as they are stored; returns how they must be turned.

    Raises:
        ImageError, MemoryError.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever the damage leads them into
        raise ImageError("truncated", f"the {image.format} image is truncated or damaged ({error})") from None
    return _TURNED.get(_orientation(image))


def _open(body: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(body), formats=KINDS)
    except MemoryError:
        raise
    except Exception as error:
        if body.startswith(b"RIFF") and is_large_webp(body):
            raise MemoryError from None
        is_unknown = isinstance(error, UnidentifiedImageError)
        raise refusal_of_unopened(body, "its header cannot be read" if is_unknown else str(error)) from None


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
    tags = tiff_tags(exif)
    if 274 in tags:
        return tags[274][2] if tags[274][1] == 1 else 0
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    found = re.search(_XMP, xmp) if isinstance(xmp, str) else re.search(_XMP.encode(), xmp)
    return int(found[2]) if found else 0


def _crop_in_strips(
    image: Image.Image, method: Image.Transpose | None, rule: PixelRule, transform: ImageCmsTransform | None
) -> np.ndarray:
    """`crop` of an image that is still to be turned and to become RGB: strip by strip, to the same bit.

    Pillow resizes in two passes, rows first and rounded, so the first can be made of strips.
    """
    is_on_side = method is not None and method.name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")
    width, height = image.size[::-1] if is_on_side else image.size
    left, top, right, bottom = crop_box(width, height, rule)
    across, down = _inner_size(width, height, rule)
    rows = max(1, STRIP // (right - left))
    narrow = Image.new("RGB", (across, bottom - top))
    for start in range(top, bottom, rows):
        end = min(start + rows, bottom)
        strip = image.crop(_stored((left, start, right, end), width, height, method))
        strip = _to_rgb(strip if method is None else strip.transpose(method), transform)
        narrow.paste(_resized(strip, (across, end - start), rule), (0, start - top))
    return _padded(_resized(narrow, (across, down), rule), rule)


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


def _on_white(image: Image.Image, transform: ImageCmsTransform | None) -> Image.Image:
    """RGB, a strip of rows after the other: the whole would be there four times over."""
    opaque = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        if transform is not None:
            alpha = strip.getchannel("A")
            strip = to_srgb(strip, transform)
            strip.putalpha(alpha)
        white = Image.new("RGBA", strip.size, "white")
        opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return opaque


def _to_rgb(image: Image.Image, transform: ImageCmsTransform | None = None) -> Image.Image:
    """
    Args:
        transform: of the colours, where they are not sRGB's.
    """
    if image.mode == "RGB" and "transparency" not in image.info and transform is None:
        return image
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError("unsupported_kind", "32-bit grey has no agreed white; send 8-bit or 16-bit grey, or RGB")
    try:
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            return _on_white(image, transform)
        return image.convert("RGB") if transform is None else to_srgb(image, transform)
    except ValueError as error:  # a mode with no way to RGB, such as LAB
        raise ImageError("unsupported_kind", f"pixels of mode {image.mode} are not supported ({error})") from None
