"""The commands of MODEL_CARD.md in a folder that holds nothing of this project: with TorchServe's own defaults."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

from launcher import Ports
from launcher.environment import environment

pytestmark = pytest.mark.server

SECONDS = 120  # until it is ready, or stopped


@pytest.fixture
def alone(exported, run, tmp_path):
    """A folder with the archive, an image, and the ports of this test: TorchServe's own may be taken."""
    ports = Ports.free()
    shutil.copy(exported / "digits.mar", tmp_path)
    shutil.copy(run / "samples" / "7-0.png", tmp_path / "image.jpg")
    lines = [
        f"{kind}_address=http://127.0.0.1:{getattr(ports, kind)}" for kind in ("inference", "management", "metrics")
    ]
    lines += [f"grpc_{kind}_port={getattr(ports, f'grpc_{kind}')}" for kind in ("inference", "management")]
    (tmp_path / "config.properties").write_text("\n".join(lines))
    (tmp_path / "tmp").mkdir()
    return tmp_path, ports


def commands(exported, ports):
    """Those of the card: one that starts the server, and those that ask it."""
    text = (exported / "MODEL_CARD.md").read_text()
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) if "torchserve" in block)
    start, *ask = block.strip().splitlines()
    return start, "\n".join(ask).replace("127.0.0.1:8080", f"127.0.0.1:{ports.inference}")


def wait_until(is_so, what):
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_the_card_s_commands_serve_the_archive_without_this_project(alone, exported):
    folder, ports = alone
    start, ask = commands(exported, ports)
    values = environment(folder, folder / "tmp") | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = {"shell": True, "cwd": folder, "env": values, "timeout": SECONDS}

    def is_ready():
        with contextlib.suppress(OSError, ValueError, KeyError):
            keys = json.loads((folder / "key_file.json").read_text())
            headers = {"Authorization": f"Bearer {keys['management']['key']}"}
            url = f"http://127.0.0.1:{ports.management}/models/digits"
            (state,) = requests.get(url, headers=headers, timeout=5).json()
            return [worker["status"] for worker in state["workers"]] == ["READY"] * len(state["workers"]) != []
        return False

    try:
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **shell)
        log = folder / "logs" / "model_log.log"
        wait_until(is_ready, log.read_text() if log.exists() else "no log")
        done = subprocess.run(ask, capture_output=True, text=True, **shell)
        assert len(json.loads(done.stdout)) == 5, done.stdout + done.stderr
        text = log.read_text()
        assert text.count("no metrics of the handler") == text.count("Torch worker started")  # one warning of each
        assert "Traceback" not in text
    finally:
        stop(folder / "tmp" / ".model_server.pid")


def stop(file):
    if not file.is_file():
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(int(file.read_text()))
        family = [server, *server.children(recursive=True)]
        server.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
