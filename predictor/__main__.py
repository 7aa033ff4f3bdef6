"""Classifies image files on this machine, without a server.

    python -m predictor runs/digits/export/digits.mar images/ seven.png
    python -m predictor runs/digits/export/digits.mar images/ --json > predictions.jsonl

The model is an archive NAME.mar, a folder into which one was unpacked, or the folder of an export. It proves its golden
images first, and predicts as it would behind TorchServe. A folder is searched through all its folders. An image that
cannot be used is a row with an error.

Ends with 0 if every image got a prediction, with 1 if some did not, and with 2 if the command was wrong. Needs NumPy,
Pillow and ONNX Runtime, or PyTorch where the archive's backend is not ONNX.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from predictor.image_headers import SUFFIXES, ImageError
from predictor.predictor import Prediction, Predictor

BATCH = 64  # images that are read at a time
MAX_BYTES = 100_000_000  # of one file; the endpoint takes 10 MB
SHOWN = 48  # characters of a file's name in the table

Outcome = Prediction | ImageError


def classify(predictor: Predictor, paths: Sequence[Path]) -> Iterator[tuple[Path, Outcome]]:
    """Each file with its prediction or its error, in order. No file stops the others."""
    files = iter(paths)
    while some := list(islice(files, BATCH)):
        bodies = [_body(path) for path in some]
        predictions = iter(predictor.predict([body for body in bodies if isinstance(body, bytes)]))
        for path, body in zip(some, bodies, strict=True):
            yield path, body if isinstance(body, ImageError) else next(predictions)


def find_images(names: Iterable[Path]) -> list[Path]:
    """The files that are named, and those of images in the folders that are; hidden ones are left out.

    Raises:
        ValueError: there is no such file or folder, no image in any, or a folder that cannot be listed.
    """
    found: list[Path] = []
    for name in names:
        if name.is_dir():
            found += sorted(_images_in(name))
        elif name.exists():
            found.append(name)
        else:
            raise ValueError(f"{name}: no such image or folder")
    if not found:
        raise ValueError(f"no images there ({', '.join(SUFFIXES)}); name files or folders")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        paths = find_images(options.images)
        predictor = Predictor.open(options.model)
        predictor.check_golden()
        predictor.topk = options.top or predictor.topk
        errors = 0
        write = _as_json if options.json else _as_row(paths)
        for path, outcome in _with_bar(classify(predictor, paths), len(paths)):
            errors += isinstance(outcome, ImageError)
            print(write(path, outcome), flush=sys.stdout.isatty())
        sys.stdout.flush()
        return 1 if errors else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 1
    except ImportError as error:
        print(f"predictor: {error}; pip install onnxruntime, or torch where the backend is not ONNX", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"predictor: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _images_in(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise ValueError(f"{error.filename}: the folder cannot be listed ({error.strerror}); make it readable")

    for place, folders, files in os.walk(folder, onerror=stop):
        folders[:] = (name for name in folders if not name.startswith("."))
        paths = (Path(place, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.suffix.lower() in SUFFIXES)


def _body(path: Path) -> bytes | ImageError:
    try:
        if not path.is_file():  # a pipe would wait for ever
            return ImageError("unreadable", "no such file")
        with path.open("rb") as file:
            body = file.read(MAX_BYTES + 1)
    except OSError as error:
        return ImageError("unreadable", f"the file cannot be read ({error.strerror or error})")
    if len(body) > MAX_BYTES:
        return ImageError("too_many_bytes", f"the file has more than {MAX_BYTES:,} bytes")
    return body


def _as_json(path: Path, outcome: Outcome) -> str:
    """One object on one line; the name of a file may be any bytes."""
    row: dict[str, Any] = {"image": os.fsencode(path).decode("utf-8", "backslashreplace")}
    if isinstance(outcome, ImageError):
        return json.dumps(row | {"error": outcome.cause, "message": str(outcome)}, ensure_ascii=False)
    label, probability = next(iter(outcome.items()))
    return json.dumps(row | {"label": label, "probability": probability, "predictions": outcome}, ensure_ascii=False)


def _as_row(paths: Sequence[Path]) -> Any:
    """A function that writes a row of the table, whose first column is as wide as the names are."""
    width = min(SHOWN, max(len(_printable(path)) for path in paths))

    def row(path: Path, outcome: Outcome) -> str:
        name = _printable(path)
        name = name if len(name) <= width else f"…{name[1 - width :]}" if width > 1 else "…"
        if isinstance(outcome, ImageError):
            return f"{name:<{width}}  error: {outcome.cause}: {' '.join(str(outcome).split())}"
        return f"{name:<{width}}  " + "  ".join(f"{label} {value:.4f}" for label, value in outcome.items())

    return row


def _printable(path: Path) -> str:
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _with_bar(rows: Iterator[tuple[Path, Outcome]], total: int) -> Iterator[tuple[Path, Outcome]]:
    """With a bar where the rows go into a file and somebody watches; on one terminal they tell how far it is."""
    bar: Any = None
    if sys.stderr.isatty() and not sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm
    return rows if bar is None else bar(rows, total=total, unit="images")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m predictor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="ARCHIVE-OR-EXPORT", help="made by `python -m export RUN`")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files and folders")
    parser.add_argument("--json", action="store_true", help="an object for each image, one on a line, for programs")
    parser.add_argument("--top", type=_count, metavar="N", help="labels of each (the archive's topk)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
