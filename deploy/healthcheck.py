"""Exit status 0 if the server of this container is ready and healthy, else 1 and why: Docker's and Kubernetes' probe.

    python -m deploy.healthcheck [WORK]

It has the key that a request to /ping must carry. Python's own library only: it is started every few seconds.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

WORK = Path("/serving")
READY = "ready"  # the file that says that every worker has loaded and the server is warm
TIMEOUT = 4.0  # seconds, less than the probes wait


def problem(work: Path) -> str:
    """What is wrong with the server that works in `work`; empty if nothing is."""
    if not (work / READY).exists():
        return "not ready yet"
    try:
        found = re.search(r"^inference_address=.*:(\d+)$", (work / "config.properties").read_text(), re.MULTILINE)
        key = json.loads((work / "key_file.json").read_text())["inference"]["key"]
        with closing(HTTPConnection("127.0.0.1", int(found[1]) if found else 8080, timeout=TIMEOUT)) as connection:
            connection.request("GET", "/ping", headers={"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            text = response.read(200).decode(errors="replace")
        return "" if response.status == 200 else f"/ping returns {response.status}: {text}"
    except (OSError, HTTPException, ValueError, KeyError) as error:
        return f"/ping cannot be asked: {error!r}"


def main() -> int:
    wrong = problem(Path(sys.argv[1]) if len(sys.argv) > 1 else WORK)
    if wrong:
        print(wrong, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
