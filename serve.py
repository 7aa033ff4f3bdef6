"""Serves exported runs with TorchServe in the foreground, until Ctrl-C.

    python serve.py runs/digits
    python serve.py runs/digits --port 9000

Reads config.properties (or --config) and log4j2.xml. Its keys (key_file.json) and logs lie in RUN/serve, where one
server at a time may run. `--port P` takes P for inference, P+1 for management, P+2 for metrics, P+3 and P+4 for gRPC;
without it the ports are those of config.properties. `--console` shows TorchServe's own lines on the terminal, too.

Ends with 0 when it is stopped (Ctrl-C, SIGTERM, or the terminal is closed), 2 if it cannot start, and 1 if TorchServe
ends by itself. If it is killed (SIGKILL), TorchServe and its workers end too.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import (
    CONFIG,
    Ports,
    RunningServer,
    ServerError,
    archives_of,
    check_freshness,
    exit_on_signals,
    serving,
    wait,
)

READ_KEY = 'import json, sys; print(json.load(open(sys.argv[1]))["inference"]["key"])'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder that `python -m export` has exported")
    parser.add_argument("--port", type=int, help="first of five ports (default: those of config.properties)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another config.properties, e.g. with TLS")
    parser.add_argument("--console", action="store_true", help="show TorchServe's own lines too")
    options = parser.parse_args(arguments)
    if not options.config.is_file():
        print(f"serve.py: --config {options.config}: no such file", file=sys.stderr)
        return 2
    archives = archives_of(options.run / "export")
    if not archives:
        command = f"python -m export {shlex.quote(str(options.run))}"
        print(f"serve.py: {options.run}: nothing exported; run `{command}`", file=sys.stderr)
        return 2
    exit_on_signals()
    folder, console = options.run / "serve", sys.stdout.fileno() if options.console else None
    try:
        ports = None if options.port is None else Ports.from_first(options.port)
        for archive in archives:
            check_freshness(archive, options.run)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)  # one of an earlier version: the keys are its owner's
        print(f"starting TorchServe; its logs are in {folder / 'logs'}", flush=True)
        with serving(archives, folder, ports=ports, config=options.config, console=console) as server:
            print(f"\n{_greeting(server, archives[0].stem)}\nCtrl-C stops it.\n", flush=True)
            print(f"serve.py: {wait(server)}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 0
    except (ServerError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2


def _greeting(server: RunningServer, name: str) -> str:
    """How to ask it. Not the key itself, as what is printed may end in a log."""
    keys = shlex.quote(str((server.folder / "key_file.json").resolve()))
    trust = f"--cacert {shlex.quote(server.verify)} " if isinstance(server.verify, str) else ""
    return (
        f"{name} is ready. Try it from another terminal:\n"
        f"  KEY=$(python3 -c '{READ_KEY}' {keys})\n"
        f'  curl {trust}-H "Authorization: Bearer $KEY" {server.url}/predictions/{name} -T IMAGE'
    )


if __name__ == "__main__":
    sys.exit(main())
