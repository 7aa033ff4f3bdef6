"""Starts TorchServe with exported archives, watches it and stops it: serve.py, the container and the tests use it."""

from launcher.archives import archives_of, check_freshness
from launcher.errors import ServerError
from launcher.ports import Ports
from launcher.process import CONFIG, LOGGING, exit_on_signals, serving, stop, wait
from launcher.server import RunningServer

__all__ = [
    "CONFIG",
    "LOGGING",
    "Ports",
    "RunningServer",
    "ServerError",
    "archives_of",
    "check_freshness",
    "exit_on_signals",
    "serving",
    "stop",
    "wait",
]
