"""Looks after what is kept of data sets on this machine.

python -m dataset store                    lists the stores of decoded images, with their size
python -m dataset store --clear NAME       removes one of them, or all

What was kept of images that have changed or were removed stays in a store until it is cleared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dataset.sources import DataError, printable
from dataset.store import ABOUT, VERSION, default_root
from dataset.store_list import Found, clear, list_stores


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    store = commands.add_parser("store", help="lists and clears the stores of decoded images")
    store.add_argument("--store", type=Path, default=default_root(), metavar="DIR", help="as in train.py (%(default)s)")
    store.add_argument("--clear", metavar="NAME", help="remove this store, or all")
    options = parser.parse_args(arguments)
    try:
        found = clear(options.store, options.clear) if options.clear else list_stores(options.store)
    except (DataError, OSError) as error:
        print(f"dataset: {printable(str(error))}", file=sys.stderr)
        return 2
    if not found:
        print(f"{options.store}: no stores")
    for one in found:
        print(("removed " if options.clear else "") + told(one))
    if found and not options.clear:
        print("images that have changed or were removed count too, until their store is cleared")
    return 0


def told(store: Found) -> str:
    """A store in a line."""
    about = printable(store.data) if store.version else f"{ABOUT} is damaged: clear it by its name"
    if store.version not in (0, VERSION):
        about += " (of another version of this program: not read)"
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(store.used))
    return f"{store.name}  {store.images:,} images  {store.bytes / 1e9:.2f} GB  last used {used}  {about}"


if __name__ == "__main__":
    sys.exit(main())
