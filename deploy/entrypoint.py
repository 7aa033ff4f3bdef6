"""What the container runs: every archive of a folder, until the container is told to stop.

    python -m deploy.entrypoint /models

Inference and metrics listen on all of the container's addresses, or with --loopback on loopback only, for a sidecar in
the same pod; management stays on loopback. Keys are on, as in config.properties. Nothing is written outside --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.healthcheck import READY, WORK
from launcher import CONFIG, Ports, ServerError, archives_of, exit_on_signals, serving, wait
from launcher.properties import read_properties


def everywhere(ports: Ports) -> dict[str, str]:
    """The lines of config.properties that open what clients and Prometheus ask, and nothing else."""
    host = "0.0.0.0"  # noqa: S104  (a container decides itself what is published)
    return {
        "inference_address": f"http://{host}:{ports.inference}",
        "metrics_address": f"http://{host}:{ports.metrics}",
        "grpc_inference_address": host,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="entrypoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, help="folder of .mar files; each model has its file's name")
    parser.add_argument("--work", type=Path, default=WORK, help=f"writable folder of keys and logs (default: {WORK})")
    parser.add_argument("--loopback", action="store_true", help="listen on loopback only")
    parser.add_argument("--port", type=int, help="first of five ports (default: those of config.properties)")
    options = parser.parse_args(arguments)
    archives = archives_of(options.models)
    if not archives:
        print(f"entrypoint.py: {options.models}: no .mar in it; mount or copy an exported archive", file=sys.stderr)
        return 2
    exit_on_signals()
    ready = options.work / READY
    ready.unlink(missing_ok=True)  # of a container that was killed and started again
    try:
        ports = Ports.of_config(read_properties(CONFIG)) if options.port is None else Ports.from_first(options.port)
        settings = {} if options.loopback else everywhere(ports)
        with serving(archives, options.work, ports=ports, settings=settings, console=sys.stdout.fileno()) as server:
            ready.touch()
            print(f"entrypoint.py: {wait(server)}", file=sys.stderr)
            return 1
    except (ServerError, OSError) as error:
        print(f"entrypoint.py: {error}", file=sys.stderr)
        return 2
    finally:
        ready.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
