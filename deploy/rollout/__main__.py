"""Replaces the version of a model that TorchServe serves, without losing a request, and undoes it if it fails.

    python -m deploy.rollout digits.mar --to http://127.0.0.1:8081 --key-file key_file.json --store MODEL_STORE

  1. checks the archive and the server; nothing is changed if anything is wrong here
  2. copies the archive into the model store as NAME-VERSION.mar, and registers it next to the version that serves
  3. sends it the golden images of the archive, compares the predictions, and goes on until it is warm
  4. makes it the default, which /predictions/NAME uses; the old version finishes what it has begun
  5. watches for --watch seconds: images of its own, TorchServe's count of failed requests, workers that die
  6. makes NAME.mar in the store the new archive, so that the next start of the server takes it, and drops the old
     version when it can have no request under way

If anything is wrong in 2 to 5, and at Ctrl-C, the old version is the default again, and the new one is removed. In 6
the new version stays, whatever happens. If this program is killed, one of the two goes on serving; the same command
then goes on from there.

The server must allow it: `enable_model_api=true` in its config.properties, with the management port closed to everybody
else. Start it with `--models NAME=NAME.mar`, not with `all`: the store keeps NAME-VERSION.mar of each version, so that

    python -m deploy.rollout STORE/NAME-OLD.mar …

goes back. For the time of a rollout both versions have their workers, and the server needs twice the memory. Requests
that name the old version (/predictions/NAME/OLD) get 404 when it has been dropped; --keep-old keeps it.

Ends with 0 if the new version serves, 1 if it was rolled back (the last line says why), 2 if nothing was tried because
of a mistake or because the server responds as TorchServe would not, 3 if the new version serves but step 6 was not
done (at Ctrl-C, too), and 130 after a Ctrl-C that was rolled back.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from deploy.rollout.archive import Archive
from deploy.rollout.errors import Failed, Mistake, Unfinished, reason
from deploy.rollout.steps import log, rollout
from deploy.rollout.torchserve_client import TorchServeClient


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, signal.default_int_handler)  # is undone as Ctrl-C is
    try:
        with _steps_on_terminal():
            _rollout(options)
        return 0
    except (Mistake, OSError) as error:
        said, status = reason(error), 2
    except Failed as error:
        said, status = str(error), 1
    except Unfinished as error:
        said, status = str(error), 3
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    _print(f"rollout: {said}", is_error=True)
    return status


def _rollout(options: argparse.Namespace) -> None:
    server = TorchServeClient(
        options.to,
        options.inference or _neighbour(options.to, -1),
        options.metrics or f"{_neighbour(options.to, 1)}/metrics",
        options.key_file,
    )
    rollout(
        Archive.read(options.archive),
        options.store or options.archive.parent,
        server,
        watch=options.watch,
        max_errors=options.max_errors,
        keep_old=options.keep_old,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, metavar="NAME.mar", help="made by `python -m export RUN --version …`")
    parser.add_argument("--store", type=Path, metavar="DIR", help="the server's model store (the archive's folder)")
    parser.add_argument(
        "--to", type=_url, default="http://127.0.0.1:8081", metavar="URL", help="management (http://127.0.0.1:8081)"
    )
    parser.add_argument("--inference", type=_url, metavar="URL", help="inference (the port before that of --to)")
    parser.add_argument("--metrics", type=_url, metavar="URL", help="metrics (/metrics at the port after that of --to)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="TorchServe's key_file.json; none without keys")
    parser.add_argument("--watch", type=_seconds, default=30, metavar="S", help="seconds after the switch (30)")
    parser.add_argument("--keep-old", action="store_true", help="leave the old version registered, under its number")
    parser.add_argument(
        "--max-errors",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="share of the requests during the watch, of all models, that may fail with a 5xx status (0.01)",
    )
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be a share from 0 to below 1, like 0.01")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError("must be a number of seconds, 0 or more")
    return value


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError("must be like http://127.0.0.1:8081")
    return text


def _neighbour(management: str, step: int) -> str:
    """The address whose port is `step` from the management port: 8080, 8081 and 8082, or those of `serve.py --port`."""
    parts = urlsplit(management)
    return f"{parts.scheme}://{parts.hostname}:{(parts.port or 8081) + step}"


class _Terminal(logging.Handler):
    """Shows what the steps report, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        _print(self.format(record))


@contextmanager
def _steps_on_terminal() -> Iterator[None]:
    terminal = _Terminal()
    log.addHandler(terminal)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(terminal)


def _print(line: str, *, is_error: bool = False) -> None:
    """Whoever reads the output may be gone (`| head`, a closed terminal); what is under way is done all the same."""
    stream = sys.stderr if is_error else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:  # what was not written would be tried again when Python ends, and the exit code be 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
