"""ICC profiles: whether one means sRGB, and the conversion of pixels from those that do not.

Browsers show a photograph so; Pillow hands its numbers on as they are stored. Whether a profile is sRGB's is read here
in its own tables, so that the many files that say so cost nothing; the conversion is LittleCMS's (Pillow's ImageCms).
A profile that is damaged, too large or of another kind than the pixels is ignored, as browsers do.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageCms

MAX_BYTES = 4 << 20  # of a profile: a printer's has 3 MB, a display's 500 bytes
MAX_TAGS = 100
CACHED = 4  # profiles; the photographs of a batch tend to have the same
ENOUGH = 32 << 20  # bytes of memory, with which LittleCMS fails because of the profile

_HEADER = 128  # bytes
_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
_PRIMARIES = {  # of sRGB, in XYZ adapted to D50 (IEC 61966-2-1, ICC's own profile)
    b"rXYZ": (0.4361, 0.2225, 0.0139),
    b"gXYZ": (0.3851, 0.7169, 0.0971),
    b"bXYZ": (0.1431, 0.0606, 0.7141),
}
_PRIMARY_TOLERANCE = 0.002  # profiles of sRGB differ by 0.0005; those of Display P3 by 0.08
_LEVEL_TOLERANCE = 1.5  # of 255: tables of 1,024 entries are less than that from the formula, gamma 2.2 is 8 from it


def foreign_profile(image: Image.Image) -> bytes | None:
    """The profile embedded in an image, which may still be undecoded, if its colours are not sRGB's."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not _HEADER < len(profile) <= MAX_BYTES:
        return None
    is_grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    mode = "CMYK" if image.mode == "CMYK" else "L" if is_grey else "RGB"
    return profile if _MODES.get(profile[16:20]) == mode and not is_srgb(profile) else None


@lru_cache(CACHED)
def conversion(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """To sRGB, perceptual, which is what browsers choose and what all profiles with tables have.

    To be made before an image's pixels are loaded: where there is too little memory for both, the pixels then lack it.

    Args:
        profile: of `foreign_profile`.

    Returns:
        None where LittleCMS cannot use the profile.

    Raises:
        MemoryError: that may be for lack of memory; it is tried again for the next image.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        return ImageCms.ImageCmsTransform(source, target, _MODES[profile[16:20]], "RGB", ImageCms.Intent.PERCEPTUAL)
    except (OSError, ValueError, TypeError):  # LittleCMS does not say why
        bytearray(ENOUGH)
        return None


def to_srgb(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """The pixels in sRGB, mode RGB, without transparency."""
    mode = transform.input_mode
    return transform.apply(image if image.mode == mode else image.convert(mode))


@lru_cache(CACHED)
def is_srgb(profile: bytes) -> bool:
    """Whether a profile has the primaries and the curves of sRGB, and no tables that override them."""
    try:
        tags = _tags(profile)
        if b"A2B0" in tags or b"D2B0" in tags:
            return False
        is_close = all(
            abs(value / 65536 - wanted) <= _PRIMARY_TOLERANCE
            for name, primary in _PRIMARIES.items()
            for value, wanted in zip(struct.unpack_from(">3i", tags[name], 8), primary, strict=True)
        )
        return is_close and all(_is_srgb_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
    except (KeyError, struct.error, ArithmeticError):  # a tag is missing or cut, or its numbers make no curve
        return False


def _is_srgb_curve(tag: memoryview) -> bool:
    """
    Raises:
        struct.error: it ends too soon.
        ArithmeticError: a power of what it holds is infinite.
    """
    curve = _curve(tag)
    return curve is not None and all(
        abs(255 * (_encoded(curve(i / 51)) - i / 51)) <= _LEVEL_TOLERANCE for i in range(52)
    )


def _tags(profile: bytes) -> dict[bytes, memoryview]:
    """Views, no copies: a hundred tags may each claim all of the profile.

    Raises:
        struct.error: it ends too soon.
    """
    (count,) = struct.unpack_from(">I", profile, _HEADER)
    entries = [struct.unpack_from(">4sII", profile, _HEADER + 4 + 12 * i) for i in range(min(count, MAX_TAGS))]
    view = memoryview(profile)
    return {name: view[start : start + length] for name, start, length in entries}


def _curve(tag: memoryview) -> Callable[[float], float] | None:
    """From stored to linear, both 0..1; None for kinds that sRGB is not written in.

    Raises:
        struct.error: it ends too soon.
    """
    kind, number = struct.unpack_from(">4s4xI", tag)
    if kind == b"curv" and 2 <= number <= 65_536:
        table = struct.unpack_from(f">{number}H", tag, 12)

        def of_table(x: float) -> float:
            low = min(int(x * (number - 1)), number - 2)
            share = x * (number - 1) - low
            return (table[low] * (1 - share) + table[low + 1] * share) / 65535

        return of_table
    if kind == b"para" and number >> 16 == 3:
        gamma, a, b, c, d = (value / 65536 for value in struct.unpack_from(">5i", tag, 12))
        return lambda x: max(0.0, a * x + b) ** gamma if x >= d else c * x
    return None


def _encoded(linear: float) -> float:
    """sRGB's curve (IEC 61966-2-1), both 0..1."""
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
