"""Bodies of requests that nobody sends by accident, made anew at each run and the same each time.

`BODIES` are Hostile(name, body, headers, kind): "bad" must be refused with a status of 4xx; "any" is odd and may be
read or refused; "broken" is a form that TorchServe's Java cannot take apart, which it calls its own error (500).
None of them may cost anybody else anything.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from tests.icc import NOT_A_CURVE
from tests.kinds import gradient, save

JSON = {"Content-Type": "application/json"}
MIB = 1 << 20


class Hostile(NamedTuple):
    name: str
    body: bytes
    headers: dict[str, str | bytes]
    kind: str


IMAGE = gradient(96, 72)
FILES = {
    "jpeg": save(IMAGE, "JPEG", quality=90),
    "progressive": save(IMAGE, "JPEG", progressive=True),
    "png": save(IMAGE, "PNG"),
    "gif": save(IMAGE.quantize(64), "GIF"),
    "webp": save(IMAGE, "WEBP", lossless=True),
    "bmp": save(IMAGE, "BMP"),
    "tiff": save(IMAGE, "TIFF", compression="tiff_lzw"),
}
NOISE = random.Random(1)
B64 = base64.b64encode(FILES["png"]).decode()


# Parts of files


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def ihdr(width: int, height: int, depth: int = 8, colours: int = 2, interlaced: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)


def idat(data: bytes = bytes(4 * (1 + 3 * 4))) -> tuple[bytes, bytes]:
    return b"IDAT", zlib.compress(data)


END = (b"IEND", b"")


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(n + struct.pack("<I", len(d)) + d + bytes(len(d) % 2) for n, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, flags: int) -> tuple[bytes, bytes]:
    return b"VP8X", struct.pack("<I", flags) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]


def tiff(*entries: tuple[int, int, int, int], data: bytes = b"", following: int = 0) -> bytes:
    """Entries are (tag, type, count, value or offset); `data` lies behind them."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", following) + data


def grey_tiff(width: int, height: int, strip: bytes, compression: int = 1, **tags: int) -> bytes:
    values = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    values |= {279: len(strip)} | {int(tag[1:]): value for tag, value in tags.items()}
    return tiff(*((tag, 4, 1, value) for tag, value in sorted(values.items())), data=strip)


def bmp(width: int, height: int, bits: int = 8, compression: int = 0, data: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + header + bytes(1024) + data


def jpeg_with(segment: bytes, body: bytes = FILES["jpeg"]) -> bytes:
    return body[:2] + segment + body[2:]


def app(number: int, data: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


def sized_jpeg(width: int, height: int, body: bytes = FILES["jpeg"]) -> bytes:
    """With another size in its header."""
    place = max(body.find(b"\xff\xc0"), body.find(b"\xff\xc2"))
    return body[: place + 5] + struct.pack(">HH", height, width) + body[place + 9 :]


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: a few bytes each, and a pass over all pixels."""
    body = save(Image.new("L", (side, side)), "JPEG", progressive=True)
    return body[:-2] + body[body.rindex(b"\xff\xc4") : -2] * count + body[-2:]


# Families of bodies: (name, body, kind), or with headers (name, body, kind, headers)


def cut() -> Iterator[tuple[str, bytes, str]]:
    """At the borders of the parts of each file, within their heads, and anywhere."""
    for kind, body in FILES.items():
        marks = {"jpeg": b"\xff", "progressive": b"\xff", "png": b"IDAT", "webp": b"VP8"}.get(kind, b"\0\0")
        borders = [place for place in range(len(body)) if body.startswith(marks, place)][:6]
        places = {1, 2, 3, 4, 8, 12, 17, 26, 33, *borders, *(place + 3 for place in borders[:3])}
        for place in sorted(places | {len(body) // 3, len(body) // 2, len(body) - 9, len(body) - 1} - {0}):
            yield f"{kind} cut at {place}", body[:place], "bad" if place <= len(body) // 2 else "any"


def magic() -> Iterator[tuple[str, bytes, str]]:
    starts = {"jpeg": 3, "png": 8, "gif": 6, "webp": 12, "bmp": 2, "tiff": 4}
    for kind, body in FILES.items():
        yield f"{kind} without its magic", body[8:], "bad"
        yield f"{kind} after a space", b" " + body, "bad"
        for other, length in starts.items():
            if other != kind and (kind, other) != ("progressive", "jpeg"):
                yield f"{kind} as {other}", FILES[other][:length] + body[length:], "bad"


def bombs() -> Iterator[tuple[str, bytes, str]]:
    for width, height in ((60_000, 60_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (50_000_001, 1), (1, 50_000_001)):
        yield f"png {width}×{height}", png(ihdr(width, height), idat(), END), "bad"
        yield f"tiff {width}×{height}", grey_tiff(width, height, bytes(9)), "bad"
        yield f"bmp {width}×{height}", bmp(width, height, data=bytes(9)), "bad"
    yield "png with a side that Pillow cannot hold", png(ihdr(40_000_000, 1, 16, 6), idat(), END), "bad"
    for side in (8_000, 16_383, 65_535):
        yield f"gif canvas of {side}", FILES["gif"][:6] + struct.pack("<HH", side, side) + FILES["gif"][10:], "bad"
        yield f"jpeg {side}", sized_jpeg(side, side), "bad"
        yield f"webp canvas of {side}", riff(canvas(side, side, 0), (b"VP8L", FILES["webp"][20:])), "bad"
        frame = bytes(6) + struct.pack("<IH", 95, 71)[:3] + struct.pack("<I", 71)[:3] + bytes(4) + FILES["webp"][12:]
        animation = riff(canvas(side, side, 2), (b"ANIM", bytes(6)), (b"ANMF", frame))
        yield f"webp animation of {side}", animation, "bad"
    yield "webp canvas of 4000", riff(canvas(4_000, 4_000, 2), (b"ANIM", bytes(6)), (b"ANMF", frame)), "any"
    yield "gif frame beyond its canvas", FILES["gif"].replace(struct.pack("<HH", 96, 72), b"\xff" * 4), "bad"
    yield "bmp of runs", bmp(1_000_000, 50, compression=1, data=b"\0\2\0\xff" * 3), "any"
    yield "bmp of runs of one", bmp(2_000, 2_000, compression=1, data=b"\1\1" * 20_000), "any"
    yield "jpeg of 2,000 scans", scans(7_000, 2_000), "bad"
    yield "jpeg of 90,000 scans", scans(100, 90_000), "bad"
    zeros = zlib.compress(bytes(64 * MIB))
    for name, data in (("zTXt", b"a\0\0"), ("iTXt", b"a\0\1\0\0\0"), ("iCCP", b"a\0\0")):
        yield f"png bomb in {name}", png(ihdr(4, 4), (name.encode(), data + zeros), idat(), END), "any"
    yield "png bomb in IDAT", png(ihdr(4, 4), (b"IDAT", zeros), END), "any"
    yield "tiff bomb in a strip", grey_tiff(4, 4, zeros, 8), "any"
    for name, count in (("teSt", 50_000), ("tEXt", 20_000)):
        yield f"png of {count} {name}", png(ihdr(4, 4), *[(name.encode(), b"a\0b")] * count, idat(), END), "any"
    yield "webp with a large profile", riff(canvas(96, 72, 32), (b"ICCP", bytes(4 * MIB)), (b"VP8L", b"")), "bad"
    for name, segment in (("APP1", app(1, b"")), ("APP2", app(2, b"ICC_PROFILE\0\1\1")), ("COM", b"\xff\xfe\0\2")):
        yield f"jpeg of 50,000 {name}", jpeg_with(segment * 50_000), "any"
    yield "jpeg filled up", jpeg_with(b"\xff" * MIB), "any"
    for name, extension in (("one comment", b"!\xfe" + b"\1a" * 50_000 + b"\0"), ("comments", b"!\xfe\1a\0" * 50_000)):
        yield f"gif of {name}", FILES["gif"].replace(b",\0\0\0\0", extension + b",\0\0\0\0", 1), "any"


def exif() -> Iterator[tuple[str, bytes, str]]:
    blocks = {f"orientation {value}": tiff((274, 3, 1, value)) for value in (0, 9, 255, 65535)}
    blocks |= {f"type {kind}": tiff((274, kind, 1, 6)) for kind in (0, 1, 2, 5, 7, 12, 13, 99, 65535)}
    blocks |= {f"count {count}": tiff((274, 3, count, 6)) for count in (0, 2, 65536, 2**31, 2**32 - 1)}
    for tag, name in ((0x8769, "Exif"), (0x8825, "GPS"), (0xA005, "interop"), (0x014A, "SubIFDs"), (0x927C, "maker")):
        blocks |= {f"{name} at {place}": tiff((274, 3, 1, 6), (tag, 4, 1, place)) for place in (0, 8, 2**32 - 1)}
    blocks["next is itself"] = tiff((274, 3, 1, 6), following=8)
    blocks["of 65535 tags"] = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 274, 3, 1, 6) * 5_000
    blocks["starts nowhere"] = b"MM\0*\xff\xff\xff\xff"
    blocks["trash"] = NOISE.randbytes(500)
    blocks["nothing"] = b""
    for name, block in blocks.items():
        yield f"exif {name}, jpeg", jpeg_with(app(1, b"Exif\0\0" + block)), "any"
        yield f"exif {name}, png", png(ihdr(4, 4), (b"eXIf", block), idat(), END), "any"
        yield f"exif {name}, webp", riff(canvas(96, 72, 8), (b"VP8L", FILES["webp"][20:]), (b"EXIF", block)), "any"


def sizes() -> Iterator[tuple[str, bytes, str]]:
    for width, height in ((0, 0), (0, 9), (9, 0)):
        yield f"png {width}×{height}", png(ihdr(width, height), idat(), END), "bad"
        yield f"bmp {width}×{height}", bmp(width, height, data=bytes(99)), "bad"
        yield f"tiff {width}×{height}", grey_tiff(width, height, bytes(99)), "bad"
        yield f"jpeg {width}×{height}", sized_jpeg(width, height), "bad"
        gif = FILES["gif"].replace(struct.pack("<HH", 96, 72), struct.pack("<HH", width, height))
        yield f"gif {width}×{height}", gif, "bad"
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        long = 16_383 if kind == "WEBP" else 30_000
        for size in ((1, long), (long, 1)):
            yield f"{kind} {size}", save(Image.new("L", size, 99), kind), "any"
    for height in (-72, -1, -(2**31)):
        yield f"bmp of height {height}", bmp(96, height, data=bytes(96 * 72)), "any"


def oddities() -> Iterator[tuple[str, bytes, str]]:
    for depth, colours in itertools.product((0, 1, 2, 3, 4, 8, 16, 32), range(8)):
        yield f"png depth {depth} colours {colours}", png(ihdr(4, 4, depth, colours), idat(bytes(200)), END), "any"
    for mode, kinds in {
        "CMYK": ("JPEG", "TIFF"), "I;16": ("PNG", "TIFF"), "I": ("TIFF",), "F": ("TIFF",), "LAB": ("TIFF",),
        "YCbCr": ("JPEG", "TIFF"), "1": ("PNG", "TIFF", "BMP", "GIF"), "LA": ("PNG",), "P": ("PNG", "TIFF", "BMP"),
    }.items():  # fmt: skip
        for kind in kinds:
            yield f"{kind} of mode {mode}", save(Image.new(mode, (40, 30)), kind), "any"
    frames = [Image.new("RGB", (24, 18), (i, 0, 0)) for i in range(60)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        yield f"{kind} of 60 frames", save(frames[0], kind, save_all=True, append_images=frames[1:]), "any"
        if kind != "GIF":
            yield f"{kind} with trash as its profile", save(IMAGE, kind, icc_profile=NOISE.randbytes(3_000)), "any"
    for name, profile in NOT_A_CURVE.items():
        yield f"png of a colour curve with {name}", save(IMAGE, "PNG", icc_profile=profile), "any"
    yield "jpeg with trash as its profile", save(IMAGE, "JPEG", icc_profile=b"\0\0\0\1acsp" * 400), "any"
    first, last = ihdr(4, 4), idat()
    for name, chunks in {
        "twice its header": (first, first, last, END), "no header": (last, END), "no pixels": (first, END),
        "no end": (first, last), "only an end": (END,), "pixels before the header": (last, first, END),
        "a palette of two bytes": (ihdr(4, 4, 8, 3), (b"PLTE", b"ab"), idat(), END),
        "a palette that is too short": (ihdr(4, 4, 8, 3), (b"PLTE", b"abc"), idat(b"\0\xff\xff\xff\xff" * 4), END),
        "transparency without a palette": (ihdr(4, 4, 8, 3), (b"tRNS", bytes(300)), idat(), END),
        "an unknown critical chunk": (first, (b"EVIL", b"x" * 9), last, END),
        "a name of no letters": (first, (b"\0\0\0\0", b""), last, END),
        "an animation of no frames": (first, (b"acTL", bytes(8)), last, END),
        "an animation of 2^32 frames": (first, (b"acTL", b"\xff" * 8), last, END),
        "a frame of a size of its own": (first, (b"acTL", b"\0\0\0\1" * 2), (b"fcTL", b"\xff" * 26), last, END),
        "filters that do not exist": (first, idat(b"\xff" * 52), END), "trash": (first, (b"IDAT", b"trash"), END),
    }.items():  # fmt: skip
        yield f"png with {name}", png(*chunks), "any"
    for length in (2**31 - 1, 2**31, 2**32 - 1):
        yield f"png with a chunk of {length}", png(first) + struct.pack(">I", length) + b"IDAT" + bytes(99), "bad"
    body = FILES["jpeg"]
    for name, marker in (
        ("tables", b"\xff\xdb"),
        ("codes", b"\xff\xc4"),
        ("frame", b"\xff\xc0"),
        ("scan", b"\xff\xda"),
    ):
        place = body.index(marker)
        yield f"jpeg without its {name}", body[:place] + body[place + 2 :], "any"
        yield f"jpeg with trash as its {name}", body[: place + 4] + NOISE.randbytes(30) + body[place + 34 :], "any"
    for number in (0xC1, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB):
        yield f"jpeg of SOF{number - 0xC0}", body.replace(b"\xff\xc0", bytes([0xFF, number]), 1), "any"
    for name, (offset, value) in {
        "12 bits": (4, 12), "no colours": (9, 0), "five colours": (9, 5), "sampling 0": (11, 0),
        "sampling 15": (11, 255),
    }.items():  # fmt: skip
        place = body.index(b"\xff\xc0") + offset
        yield f"jpeg with {name}", body[:place] + bytes([value]) + body[place + 1 :], "any"
    for tag, value in itertools.product((258, 259, 262, 273, 277, 278, 279), (0, 7, 2**32 - 1)):
        yield f"tiff {tag}={value}", grey_tiff(4, 4, bytes(16), **{f"t{tag}": value}), "any"
    yield (
        "tiff of 20,000 strips",
        tiff(
            *(
                (256, 3, 1, 1),
                (257, 4, 1, 20_000),
                (258, 3, 1, 8),
                (259, 3, 1, 1),
                (262, 3, 1, 1),
                (273, 4, 20_000, 122),
            ),
            *((277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 20_000, 122)),
            data=struct.pack("<I", 122) * 20_000,
        ),
        "any",
    )
    yield "tiff that is its own next", tiff((256, 3, 1, 1), following=8), "bad"


def foreign() -> Iterator[tuple[str, bytes, str]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo("../../etc/passwd"), FILES["png"])
    texts = {
        "html": "<!doctype html><script>alert(1)</script>", "xml bomb": '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "'
        + "a" * 999 + '"><!ENTITY b "' + "&a;" * 999 + '">]><svg>&b;</svg>', "template": "{{7*7}}${7*7}<%= 7*7 %>",
        "svg": '<svg xmlns:x="http://www.w3.org/1999/xlink"><image x:href="file:///etc/passwd"/></svg>',
        "pdf": "%PDF-1.7\n%%EOF", "postscript": "%!PS\n(/etc/passwd) run", "shell": "; rm -rf / #", "path": "../" * 99,
        "url": "http://127.0.0.1:1/", "data url": f"data:image/png;base64,{B64}", "base64": B64, "sql": "' OR 1=1 --",
        "format": "%s%n" * 99, "log": "${jndi:ldap://127.0.0.1:1/a}", "lines": "\r\n\r\n" * 99, "epsf": "P6 4 4 255\n",
    }  # fmt: skip
    for name, text in texts.items():
        yield name, text.encode(), "bad"
        yield f"{name} in utf-16", text.encode("utf-16"), "bad"
    for name, body in {
        "zip": archive.getvalue(), "pickle": pickle.dumps({"w": print}), "gzip": b"\x1f\x8b\x08" + bytes(40),
        "elf": b"\x7fELF" + bytes(99), "class": b"\xca\xfe\xba\xbe" + bytes(99), "icns": b"icns" + bytes(99),
        "heic": b"\0\0\0\x18ftypheic" + bytes(99), "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "one": b"x",
        "jpeg xl": b"\xff\x0a" + bytes(99), "psd": b"8BPS" + bytes(99), "ico": b"\0\0\1\0\1\0" + b"\xff" * 99,
        "zeros": bytes(MIB), "ones": b"\xff" * MIB, "empty": b"", "null": b"\0", "new lines": b"\n" * 100,
        "big tiff": b"II+\0" + b"\xff" * 99, "riff": b"RIFF\xff\xff\xff\xffWEBPVP8 ", "wave": b"RIFF\0\0\0\0WAVE",
    }.items():  # fmt: skip
        yield name, body, "bad"
    for length in (2, 7, 100, 10_000, 300_000):
        for kind, magic in (
            ("nothing", b""),
            ("jpeg", b"\xff\xd8\xff"),
            ("png", b"\x89PNG\r\n\x1a\n"),
            ("gif", b"GIF89a"),
        ):
            yield f"{length} random bytes after {kind}", magic + NOISE.randbytes(length), "any"


def json_bodies() -> Iterator[tuple[str, bytes, str, dict[str, str]]]:
    deep, many = 100_000, 100_000
    texts = {
        "deep lists": "[" * deep, "deep and closed": "[" * deep + "]" * deep, "deep objects": '{"b64":' * deep,
        "deep instances": '{"instances":[' * deep, "number": "1" * 5_000, "exponent": '{"b64":1e999999}', "nan": "NaN",
        "open text": '{"b64":"', "open object": "{", "comma": '{"b64":"AAAA",}', "two": "{}{}", "quotes": "{'b64':1}",
        "null byte": '{"b64":"\0"}', "escaped null": '{"b64":"\\u0000"}', "surrogate": '{"b64":"\\ud800"}',
        "surrogate alone": '"\\ud800"', "surrogate instance": '{"instances":["\\udfff"]}', "empty text": '""',
        "not base64": '{"b64":"????"}', "short base64": '{"b64":"A"}', "padding": '{"b64":"===="}',
        "none": '{"b64":""}',
        "url-safe base64": '{"b64":"_-_-"}', "data url": json.dumps({"b64": f"data:image/png;base64,{B64}"}),
        "no image": json.dumps({"b64": base64.b64encode(b"x" * 999).decode()}), "unknown name": '{"image":"x"}',
        "100,000 instances": '{"instances":[' + "1," * (many - 1) + "1]}", "no instances": '{"instances":[]}',
        "257 instances": json.dumps({"instances": [{"b64": ""}] * 257}), "url": '{"url":"http://127.0.0.1:1/"}',
        "100,000 names": json.dumps({str(i): i for i in range(many)}), "proto": '{"__proto__":{"b64":"x"}}',
        "both": '{"instances":[],"inputs":[]}', "bom": "\ufeff{}", "path": '{"b64":"/etc/passwd"}',
        "mixed": '{"b64":"é"}', "zeros": '{"instances":[' + "0," * 2 * MIB + "0]}",
        "objects": '{"instances":[' + "{}," * MIB + "{}]}", "spaces": '{"b64":"' + "AA " * MIB + '"}',
        "texts": '{"inputs":[{"datatype":"BYTES","shape":[9],"data":[' + '"",' * MIB + '""]}]}',
        "pixels": '{"inputs":[{"datatype":"UINT8","shape":[699051,1,1,3],"data":[' + "0," * (2 * MIB) + "0]}]}",
    }  # fmt: skip
    for value in (None, True, 7, -0.5, [], [[]], {}, "x", ["x"], [{"b64": B64}]):
        called = "an image" if B64 in str(value) else repr(value)
        texts[called] = json.dumps(value)
        for name in ("b64", "instances", "inputs"):
            texts[f"{name}={called}"] = json.dumps({name: value})
        texts[f"instances of {called}"] = json.dumps({"instances": [value]})
    del texts["instances=an image"]  # that is a good one
    for name, text in texts.items():
        yield f"json {name}", text.encode(), "bad", JSON
    yield "json in latin-1", b'{"b64":"\xe9"}', "bad", JSON
    yield "json of an image", FILES["png"], "any", JSON
    yield "json with a wrong type", json.dumps({"b64": B64}).encode(), "any", {"Content-Type": "image/png"}


def v2(datatype: object, shape: object, data: object, **more: object) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}], **more}).encode()


def kserve() -> Iterator[tuple[str, bytes, str, dict[str, str]]]:
    for datatype in ("FP32", "INT64", "BOOL", "bytes", "", None, 7, ["BYTES"], {}):
        yield f"v2 {datatype!r}", v2(datatype, [1], [B64]), "bad", JSON
    for shape in (None, 1, "1", [], [1], [1, 2, 2], [1, 2, 2, 4], [1, 3, 2, 2], [-1, -2, 2, 3], [0, 0, 0, 3], [1e9] * 4,
                  [2**31, 2**31, 2**31, 3], [10**30, 1, 1, 3], ["1", 2, 2, 3], [[1], 2, 2, 3],
                  [1.0, 2, 2, 3]):  # fmt: skip
        yield f"v2 pixels of shape {shape!r}", v2("UINT8", shape, [1] * 12), "bad", JSON
    yield "v2 pixels of shape [true, 2, 2, 3]", v2("UINT8", [True, 2, 2, 3], [1] * 12), "any", JSON
    wide = ["a" * 500_000, *[1] * 11]
    for name, data in {
        "none": None, "empty": [], "text": "x", "texts": ["1"] * 12, "fractions": [0.5] * 12, "negative": [-1] * 12,
        "large": [256] * 12, "huge": [10**40] * 12, "mixed": [1] * 11 + ["1"], "ragged": [[1], [2, 3]],
        "one wide": wide,
        "wide and long": ["a" * 2_000_000, *[1] * 1_000_000], "nothing": [None] * 12, "objects": [{}] * 12,
        "deep": json.loads("[" * 90 + "]" * 90),
    }.items():  # fmt: skip
        yield f"v2 pixels as {name}", v2("UINT8", [1, 2, 2, 3], data), "bad", JSON
    for name, data in {"number": [7], "none": [None], "no base64": ["?"], "nested": [[B64]], "surrogate": ["\ud800"],
                       "nothing": [], "bytes": ["AAAA"], "half bad": [B64, "AAAA"],
                       "257": [""] * 257}.items():  # fmt: skip
        yield f"v2 texts of {name}", v2("BYTES", [len(data)], data), "bad", JSON
    for identity in ("\ud800", "\0", None, 7, [1], {"a": "\udfff"}, "x" * 100_000):
        yield f"v2 id {identity!r:.9}", v2("BYTES", [1], [B64], id=identity), "any", JSON


def multipart() -> Iterator[tuple[str, bytes, str, dict[str, str]]]:
    def part(disposition: str, body: bytes = b"x", more: str = "") -> bytes:
        return f"--B\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode() + body + b"\r\n"

    form, closing, kind = 'form-data; name="data"; filename="x"', b"--B--\r\n", "multipart/form-data; boundary=B"
    bodies = {
        "no fields": closing, "nothing": b"", "an open end": part(form), "only a boundary": b"--B\r\n",
        "trash": b"trash",
        "no name": part("form-data") + closing, "an empty field": part(form, b"") + closing,
        "a bad part": part(form) + closing,
        "no disposition": b"--B\r\n\r\nx\r\n" + closing,
        "two bad": part(form) + part('form-data; name="x"; filename="x"') + closing,
        "3,000 fields": b"".join(part(f'form-data; name="f{i}"') for i in range(3_000)) + closing,
        "3,000 files": b"".join(part(f'form-data; name="f{i}"; filename="x"') for i in range(3_000)) + closing,
        "a path": part('form-data; name="data"; filename="../../../../etc/passwd"') + closing,
        "a null byte": part('form-data; name="a\0b"; filename="\0"') + closing,
        "quotes": part('form-data; name="""') + closing,
        "a long name": part(f'form-data; name="{"n" * 60_000}"') + closing,
        "a header of trash": b"--B\r\n:::\r\n\r\n" + closing,
        "an unknown encoding": part(form, b"x", "Content-Transfer-Encoding: evil\r\n") + closing,
        "json in it": part(form, b'{"b64": 7}', "Content-Type: application/json\r\n") + closing,
        "an unknown charset": part(form, b"x", "Content-Type: text/plain; charset=evil\r\n") + closing,
        "mixed in mixed": part(form, b"--C--", "Content-Type: multipart/mixed; boundary=C\r\n") + closing,
    }  # fmt: skip
    for name, body in bodies.items():
        is_broken = name in (
            *("no name", "no disposition", "quotes", "a header of trash"),
            *("an unknown encoding", "an unknown charset"),
        )
        yield f"multipart with {name}", body, "broken" if is_broken else "bad", {"Content-Type": kind}
    whole = part(form, FILES["png"]) + closing
    for other in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=C",
                  "multipart/form-data; boundary=" + "B" * 5_000, 'multipart/form-data; boundary="B',
                  "multipart/mixed"):  # fmt: skip
        yield f"multipart as {other:.40}", whole, "broken" if other[-1] == "=" else "bad", {"Content-Type": other}
    yield "urlencoded", b"data=" + b"%00" * 999, "bad", {"Content-Type": "application/x-www-form-urlencoded"}
    many = b"&".join(b"f%d=x" % i for i in range(5_000))
    yield "5,000 urlencoded", many, "bad", {"Content-Type": "application/x-www-form-urlencoded"}


def headers() -> Iterator[tuple[str, bytes, str, dict[str, str | bytes]]]:
    for kind in ("text/plain", "text/plain; charset=evil", "text/html", "application/octet-stream", "a" * 4_000, "/",
    ";",
                 "image/svg+xml", "application/x-python-pickle", "application/json; charset=utf-7",
                 b"\xff\xfe"):  # fmt: skip
        yield f"content type {kind!r:.30}", FILES["jpeg"], "any", {"Content-Type": kind}
        yield f"content type {kind!r:.30} of trash", b"\xff\0trash", "bad", {"Content-Type": kind}
    for name, value in (("X-Junk", b"\xff\xfe"), ("X-Junk", "x" * 7_000), ("describe", "True"), ("explain", "True"),
                        ("body", "x"), ("Content-Encoding", "gzip"), ("Upgrade", "h2c"),
                        ("url", "file:///etc/passwd"), ("X-Forwarded-For",
                        "${jndi:ldap://127.0.0.1:1/a}")):  # fmt: skip
        yield f"header {name}: {value!r:.20}", FILES["gif"], "any", {name: value}


FAMILIES = (cut, magic, bombs, exif, sizes, oddities, foreign, json_bodies, kserve, multipart, headers)
BODIES = [
    Hostile(f"{family.__name__}: {name}", body, dict(*more), kind)
    for family in FAMILIES
    for name, body, kind, *more in family()
]
assert len({one.name for one in BODIES}) == len(BODIES) > 300
