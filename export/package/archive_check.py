"""Whether an archive, and the folder from which it is packed, hold what an export writes and nothing else.

Nothing in them is run or unpickled, and no member is read before the names of all are known to be an export's.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from export.output_folder import MANIFEST, STAGED
from export.package import archive, serving_settings
from export.package.findings import ANEW, differs, noting, read_json, text_inside
from predictor.files import sha256


def check_staged(folder: Path, whole: Mapping[str, str], trusted: bool, findings: list[str]) -> None:
    """The files that the archiver's line packs again: those of the archive, and no other."""
    with noting(MANIFEST, findings):
        packed = read_json(folder / MANIFEST)["archive"]
        for file, digest in whole.items():
            top, _, member = file.partition("/")
            if top != STAGED:
                continue
            if member not in archive.IN_STAGE:
                findings.append(f"{file}: is nothing that an export packs; remove it")
            elif member in whole and digest != whole[member]:
                findings.append(f"{file}: is not the {member} of the export; export again")
            elif digest != packed.get(member):
                findings.append(f"{file}: is not the one that was packed ({MANIFEST}); export again")
            if not trusted and member in archive.CODE and digest != sha256(archive.CODE[member]):
                findings.append(differs(f"{file}:", archive.CODE[member].relative_to(archive.PROJECT).as_posix()))


def check_archive(folder: Path, name: str, whole: Mapping[str, str], trusted: bool, findings: list[str]) -> None:
    """The archive's members: those of an export and no other, undamaged, the same as in the folder and the checkout."""
    file = f"{name}.mar"
    with noting(file, findings), zipfile.ZipFile(folder / file) as packed:
        if wrong := _wrong_members(folder, packed, name):
            findings += [f"{file}: {words}; export again" for words in wrong]
            return
        if damaged := packed.testzip():
            findings.append(f"{file}: '{damaged}' inside is damaged; {ANEW}")
            return
        listed = read_json(folder / MANIFEST)
        findings += [f"{file}: {words}; export again" for words in _wrong_manifest(packed, name, listed["version"])]
        for member, digest in sorted(archive.hashes(folder / file).items()):
            if member in whole and digest != whole[member]:
                findings.append(f"{file}: '{member}' inside is not the {member} beside it; export again")
            elif digest != listed["archive"].get(member):
                findings.append(f"{file}: '{member}' inside is not the one that was packed ({MANIFEST}); export again")
            if not trusted and member in archive.CODE and digest != sha256(archive.CODE[member]):
                source = archive.CODE[member].relative_to(archive.PROJECT).as_posix()
                findings.append(differs(f"{file}: '{member}' inside", source))


def _wrong_members(folder: Path, packed: zipfile.ZipFile, name: str) -> list[str]:
    """What is wrong with the names of the members, before any of them is read."""
    there, needed = (
        packed.namelist(),
        archive.members(name, serving_settings.backend_of(folder / serving_settings.CONFIG_FILE)),
    )
    wrong = [f"'{one}' is inside {there.count(one)} times, not once" for one in sorted(needed) if there.count(one) != 1]
    for info in packed.infolist():
        if info.filename not in needed:
            wrong.append(f"'{info.filename}' inside is nothing that an export packs")
        elif (info.external_attr >> 28) not in (0, 8):  # the kind of file, of POSIX: 8 is an ordinary one
            wrong.append(f"'{info.filename}' inside is not an ordinary file")
    if not wrong and not _is_plain(packed):
        wrong.append("it holds bytes that its table of contents does not name")
    return wrong


def _is_plain(packed: zipfile.ZipFile) -> bool:
    """Whether a reader of the local headers, as Java's streams are, sees what one of the table of contents sees."""
    end, file = 0, packed.fp
    assert file is not None
    for info in sorted(packed.infolist(), key=lambda info: info.header_offset):
        file.seek(info.header_offset)
        header = file.read(30)
        flags, method = struct.unpack("<HH", header[6:10])
        crc, packed_size, size, name_length, extra_length = struct.unpack("<IIIHH", header[14:30])
        same = (method, crc) == (info.compress_type, info.CRC) and file.read(name_length) == info.filename.encode()
        sizes = {packed_size, size} == {0xFFFFFFFF} or (packed_size, size) == (info.compress_size, info.file_size)
        if info.header_offset != end or flags & 8 or not same or not sizes:
            return False
        end = info.header_offset + 30 + name_length + extra_length + info.compress_size
    return end == packed.start_dir


def _wrong_manifest(packed: zipfile.ZipFile, name: str, version: str) -> list[str]:
    """What is wrong with what the archive tells TorchServe to load."""
    content = json.loads(text_inside(packed, archive.ARCHIVE_MANIFEST))
    model, runtime = content["model"], content.get("runtime")
    expected = {
        "modelName": name,
        "modelVersion": version,
        "serializedFile": f"{name}.pt",
        "handler": archive.ENTRY,
        "configFile": serving_settings.CONFIG_FILE,
    }
    wrong = [f"its manifest names {model.get(key)} as {key}, not {value}" for key, value in expected.items()
             if model.get(key) != value]  # fmt: skip
    wrong += [f"its manifest has '{key}', which no export writes" for key in sorted(model.keys() - expected.keys())]
    return wrong + [f"its manifest names {runtime} as runtime, not python"] * (runtime != "python")
