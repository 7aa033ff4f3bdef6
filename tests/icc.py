"""ICC profiles to put into image files: sRGB's as LittleCMS writes it, and variants of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from PIL import ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CURVES = (b"rTRC", b"gTRC", b"bTRC")
DISPLAY_P3 = {  # XYZ adapted to D50
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}


def _places(profile: bytes) -> Iterator[tuple[bytes, int]]:
    """The name of each tag and its offset."""
    (count,) = struct.unpack_from(">I", profile, 128)
    for i in range(count):
        name, start, _ = struct.unpack_from(">4sII", profile, 132 + 12 * i)
        yield name, start


def with_primaries(profile: bytes, primaries: dict[bytes, tuple[float, ...]]) -> bytes:
    changed = bytearray(profile)
    for name, start in _places(profile):
        if name in primaries:
            struct.pack_into(">3i", changed, start + 8, *(round(65536 * value) for value in primaries[name]))
    return bytes(changed)


def with_curve(profile: bytes, *numbers: float) -> bytes:
    """The same with another parametric curve: gamma alone, or gamma, a, b, c and d, which sRGB's is written with."""
    changed = bytearray(profile)
    kind = {1: 0, 5: 3}[len(numbers)]
    for name, start in _places(profile):
        if name in CURVES:
            values = (round(65536 * number) for number in numbers)
            struct.pack_into(f">4sIHH{len(numbers)}i", changed, start, b"para", 0, kind, 0, *values)
    return bytes(changed)


P3 = with_primaries(SRGB, DISPLAY_P3)
NOT_A_CURVE = {  # in the places of sRGB's: what they compute is NaN or infinite
    "zero to the power of minus one": with_curve(SRGB, -1, 1, 0, 0, -1),
    "a power beyond all numbers": with_curve(SRGB, 32767, 32767, 0, 0, 0),
}
