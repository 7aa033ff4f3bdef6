"""ICC profiles to put into image files: sRGB's as LittleCMS writes it, and variants of it."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

from PIL import ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
D50 = struct.pack(">3i", 63190, 65536, 54061)  # the white point of all profiles, XYZ
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


def _of_one_space(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2. space, connection: ICC's names of the pixels' colours, and of those they relate to."""
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", space, connection) + bytes(12)
    header += b"acsp" + bytes(28) + D50 + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


def of_grey(gamma: float) -> bytes:
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(256 * gamma))
    return _of_one_space(b"GRAY", b"XYZ ", {b"wtpt": b"XYZ " + bytes(4) + D50, b"kTRC": curve})


def of_ink() -> bytes:
    """CMYK, by a table of its 16 corners in Lab, 8 bits each."""
    corners = itertools.product((0, 1), repeat=4)
    labs = [
        (255 * (1 - 0.9 * k) * (1 - 0.4 * c) * (1 - 0.5 * m), 128 + 70 * m - 35 * c, 128 + 85 * y - 45 * c)
        for c, m, y, k in corners
    ]
    straight = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = bytes(max(0, min(255, round(value))) for lab in labs for value in lab)
    tag = struct.pack(">4sI4B", b"mft1", 0, 4, 3, 2, 0) + matrix + 4 * straight + table + 3 * straight
    return _of_one_space(b"CMYK", b"Lab ", {b"A2B0": tag})


P3 = with_primaries(SRGB, DISPLAY_P3)
NOT_A_CURVE = {  # in the places of sRGB's: what they compute is NaN or infinite
    "zero to the power of minus one": with_curve(SRGB, -1, 1, 0, 0, -1),
    "a power beyond all numbers": with_curve(SRGB, 32767, 32767, 0, 0, 0),
}
