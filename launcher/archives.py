"""Which archives of a folder a server starts with, and whether they are up to date."""

from __future__ import annotations

import json
import shlex
import zipfile
from pathlib import Path

from launcher.errors import ServerError


def archives_of(folder: Path) -> list[Path]:
    """The .mar files that a server starts with; not what a rollout keeps as NAME-VERSION.mar beside NAME.mar.

    Nor what it kept before the run was renamed and exported again: beside the archive that the export's manifest names.
    """
    exported = _exported(folder)

    def is_kept(archive: Path) -> bool:
        try:
            with zipfile.ZipFile(archive) as files:
                model = json.loads(files.read("MAR-INF/MANIFEST.json"))["model"]
            is_named = archive.stem == f"{model['modelName']}-{model['modelVersion']}"
            current = exported | {archive.with_name(f"{model['modelName']}.mar")}
            return is_named and any(path.exists() for path in current - {archive})
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
            return False  # damaged, which its use will say

    return [archive for archive in sorted(folder.glob("*.mar")) if not is_kept(archive)]


def _exported(folder: Path) -> set[Path]:
    """The archive that the last export of a run wrote there, by its manifest; empty without one."""
    try:
        name = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["name"]
        return {folder / f"{name}.mar"}
    except (OSError, KeyError, TypeError, ValueError):
        return set()


def check_freshness(archive: Path, run: Path) -> None:
    """Raises ServerError unless the archive was made from the run as it is now."""
    from predictor.spec import ModelSpec  # not at the top: the container has archives, and no run to compare them with

    command = f"python -m export {shlex.quote(str(run))}"
    try:
        with zipfile.ZipFile(archive) as files:
            fresh = ModelSpec.from_json(files.read("spec.json").decode()) == ModelSpec.load(run)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ServerError(f"{archive}: cannot be checked ({error}); run `{command}`") from None
    if not fresh:
        raise ServerError(f"{archive}: is of an earlier training; run `{command}`, or move it away")
