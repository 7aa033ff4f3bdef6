"""A TorchServe that runs: its addresses, keys and logs."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from launcher.ports import Ports


@dataclass(frozen=True)
class RunningServer:
    """A running TorchServe. `folder` holds key_file.json, logs/ and its temporary files."""

    process: subprocess.Popen[bytes]
    folder: Path
    ports: Ports
    properties: dict[str, str]  # its config.properties
    earlier: dict[str, int] = field(default_factory=dict)  # bytes of each log that an earlier start wrote

    @property
    def url(self) -> str:
        return self._url("inference")

    @property
    def management_url(self) -> str:
        return self._url("management")

    @property
    def metrics_url(self) -> str:
        return self._url("metrics") + "/metrics"

    @property
    def verify(self) -> str | bool:
        """What `requests` takes as `verify`: the server's own certificate where it has one."""
        return self.properties.get("certificate_file", True)

    def _url(self, kind: str) -> str:
        return self.properties[f"{kind}_address"].replace("//0.0.0.0:", "//127.0.0.1:")

    def key(self, kind: str = "inference") -> str:
        """The token that a request must carry: `Authorization: Bearer KEY`. `kind`: inference or management."""
        keys = json.loads((self.folder / "key_file.json").read_text())
        return keys[kind]["key"]
