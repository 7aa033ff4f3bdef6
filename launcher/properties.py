"""Java's .properties files, config.properties among them: read and written by Java's own rules."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

BLANKS = " \t\f"  # of a .properties file
PAIR = (
    rf"((?:\\.|[^\\=:{BLANKS}])*)[{BLANKS}]*[=:]?[{BLANKS}]*"  # name, and what parts it from the value
    rf"((?:\\.|[^\\])*?)[{BLANKS}]*"  # value, without blanks at its end
)


def read_properties(path: Path) -> dict[str, str]:
    """The pairs of a .properties file, by Java's rules: continued lines, escapes, `!` and `#`, `=`, `:` or a blank.

    Read as UTF-8, which editors write, or as Latin-1, which is Java's own reading.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    lines = (line.lstrip(BLANKS) for line in re.split(r"\r\n|[\r\n]", text))
    properties = {}
    for line in lines:
        if not line or line[0] in "#!":
            continue
        while re.search(r"(?<!\\)(\\\\)*\\$", line):  # an odd number of backslashes
            line = line[:-1] + next(lines, "")
        if found := re.fullmatch(PAIR, line, re.DOTALL):
            properties[_unescaped(found[1])] = _unescaped(found[2])
    return properties


def write_properties(path: Path, properties: dict[str, str]) -> None:
    """For its owner only, as there may be a password in it. Whole or not at all; as Java reads it: ASCII, with escapes.

    `vmargs` is read by the launcher, which knows no escapes.
    """
    lines = (f"{name}={value if name == 'vmargs' else _escaped(value)}\n" for name, value in properties.items())
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.writelines(lines)
    part.replace(path)


def _escaped(value: str) -> str:
    doubled = value.replace("\\", r"\\")
    return re.sub(r"[^ -~]|^ | $", lambda found: "".join(rf"\u{unit:04x}" for unit in _utf16(found[0])), doubled)


def _utf16(character: str) -> tuple[int, ...]:
    encoded = character.encode("utf-16-be", "surrogatepass")
    return struct.unpack(f">{len(encoded) // 2}H", encoded)


def _unescaped(value: str) -> str:
    letters = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}

    def character(found: re.Match[str]) -> str:
        return chr(int(found[1], 16)) if found[1] else letters.get(found[2], found[2])

    units = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", character, value, flags=re.DOTALL)
    return units.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "replace")  # two units may be one character
