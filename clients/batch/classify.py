"""Classifies millions of image files with an archive, without a server: one row for each, in Parquet files.

    python classify.py NAME.mar IMAGES [IMAGES …] --out predictions
    python classify.py NAME.mar --list names.txt --out predictions --workers 8
    python classify.py NAME.mar /shared/images --out /shared/predictions --address auto --gpus-per-worker 0.25

IMAGES are files and folders, which are searched through all their folders. The archive's own code reads the images
and runs the network, so the predictions are the endpoint's. An image that cannot be used is a row with an error.

The work is a Ray Data job over parts of --part-size images. A worker writes its part aside and then gives it its
name, so a file with that name is whole and never written again. Whatever was killed, a worker, this program or the
machine: the same command does the parts that are missing. OUT holds

    part-000000.parquet …  columns path, label, probability, predictions, error, message
    _SUCCESS               JSON with the number of rows by error, once everything is there
    _job/                  the list of the images, and the archive it was started with

On a cluster the images and OUT lie in a folder that all its machines share under the same name. Needs `ray[data]`,
`pillow` and `onnxruntime`, or `torch` where the archive's backend is not ONNX.

Ends with 0 if every image was classified, with 1 if some rows are errors, and with 2 if the command was wrong, or the
images or the archive are not those that the job was started with.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif"),  # read where pi-heif is installed
)
PART_SIZE = 1000  # images: seconds of work, which is what a kill costs, and a file of about 100 kB
BATCH = 64  # images that are decoded and put through the network at a time, as in the handler
MAX_BYTES = 100_000_000  # of one file; the endpoint takes 10 MB
OBJECT_STORE = 80 << 20  # bytes: Ray's least, and enough, since only numbers go through it
COLUMNS = ("path", "label", "probability", "predictions", "error", "message")

Part = dict[str, int]  # number; start: byte in the list; count: images
Row = dict[str, Any]


class JobError(ValueError):
    """What a user can mend. The message is one line."""


def classify(
    archive: Path,
    images: Iterable[str],
    out: Path,
    *,
    part_size: int = PART_SIZE,
    workers: int | None = None,
    gpus: float = 0.0,
    address: str | None = None,
) -> Counter[str]:
    """Does what is missing in `out`.

    Args:
        images: files and folders.
        part_size: images in a file of the output.
        workers: None for one for each core, or as many as the GPUs take.
        gpus: of one worker; a fraction lets several share one.
        address: of a Ray cluster (`auto` on one of its machines); None for this machine alone.

    Returns:
        The number of rows by error type; `ok` for predictions.

    Raises:
        JobError: the message says what to mend.
    """
    out = out.resolve()
    with _alone(out):
        parts = _parts(archive, images, out, part_size)
        missing = [part for part in parts if not _file(out, part["number"]).exists()]
        if missing:
            (out / "_SUCCESS").unlink(missing_ok=True)
            shutil.rmtree(out / "_job" / "archive", ignore_errors=True)
            _unpack(archive, out / "_job" / "archive")
            _work(out, missing, sum(part["count"] for part in parts), workers, gpus, address)
        sums = _sums(out, parts)
        _write(out / "_SUCCESS", json.dumps({"images": sum(sums.values()), "rows": sums}, indent=1).encode())
        return sums


# The list of the images.


def _parts(archive: Path, images: Iterable[str], out: Path, part_size: int) -> list[Part]:
    """The parts of the job, which is new or the same as before.

    Raises:
        JobError: there are no images, or the job was started with others or with another archive.
    """
    parts: list[Part] = []
    names, listed = (path for name in images for path in _walk(name)), out / "_job" / "images.new"
    with listed.open("wb") as lines:
        while chunk := list(islice(names, part_size)):
            parts.append({"number": len(parts), "start": lines.tell(), "count": len(chunk)})
            lines.writelines(json.dumps(os.path.abspath(path)).encode() + b"\n" for path in chunk)  # noqa: PTH100
    if not parts:
        raise JobError(f"no images there ({', '.join(SUFFIXES)}); name files, folders or --list")
    try:
        now = {"archive": _sha256(archive), "images": _sha256(listed), "part_size": part_size, "columns": list(COLUMNS)}
    except OSError as error:
        raise JobError(f"{archive}: {error.strerror}; `python -m export RUN` makes an archive") from None
    started = out / "_job" / "started.json"
    if started.exists():
        before = json.loads(started.read_text())
        if changed := [name.replace("_", " ") for name in now if now[name] != before.get(name)]:
            raise JobError(f"{out}: the job there differs in {' and '.join(changed)}; name the same, or another --out")
    listed.replace(out / "_job" / "images.jsonl")
    _write(started, json.dumps(now).encode())
    return parts


def _walk(name: str) -> Iterator[str]:
    """Always in the same order; hidden files and folders are left out.

    Raises:
        JobError: a folder cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise JobError(f"{error.filename}: the folder cannot be listed ({error.strerror}); make it readable")

    if not os.path.isdir(name):  # noqa: PTH112 – a Path for each of millions takes as long as the rest
        yield name
        return
    for folder, folders, files in os.walk(name, onerror=stop):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in sorted(files):
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.path.join(folder, file)  # noqa: PTH118


# Ray.


def _work(out: Path, parts: list[Part], total: int, workers: int | None, gpus: float, address: str | None) -> None:
    """Has `parts` done.

    Raises:
        JobError: a worker says what is wrong, or there is no place for them.
    """
    with _ray(workers, address) as ray:
        resources = ray.cluster_resources()
        places = int(resources.get("GPU", 0) / gpus) if gpus else int(resources.get("CPU", 0))
        if not places:
            raise JobError(f"there is no place for a worker with {gpus:g} GPUs; change --gpus-per-worker")
        compute = ray.data.ActorPoolStrategy(size=min(workers or places, len(parts)))
        rows = ray.data.from_items(parts, override_num_blocks=len(parts))
        done = rows.map(Worker, fn_constructor_args=(str(out), gpus > 0), compute=compute, num_cpus=1, num_gpus=gpus)
        with _progress(total, total - sum(part["count"] for part in parts)) as step:
            problem = ""
            for row in done.iter_rows():  # to the end: Ray may take this program with it when it is stopped at work
                problem = problem or row["problem"]
                step(row["count"])
        if problem:
            raise JobError(problem)


@contextmanager
def _ray(workers: int | None, address: str | None) -> Iterator[Any]:
    """Ray, of the cluster or of its own: then on loopback, with a key against this machine's other users."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    own: dict[str, Any] = {}
    folder = None
    if address is None:
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the names of sockets begin with it
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # in spite of its name: no cluster, so loopback only
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        own = {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_temp_dir": folder,
        }
    import ray
    import ray.data

    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a row's `problem` says it better
        yield ray
    except (ConnectionError, ray.exceptions.RayError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise JobError(f"Ray: {lines[-1]}; the same command goes on") from error
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


class Worker:
    """A process that does one part after the other, until something goes wrong, which the rows that it returns say."""

    def __init__(self, out: str, gpu: bool) -> None:
        self.out, self.gpu, self.problem = Path(out), gpu, ""
        self.model: Model | None = None

    def __call__(self, part: Part) -> Row:
        try:
            if not self.problem:
                self._do(**part)
        except Exception as error:  # of the archive's code, or of the disk
            where = f"part {part['number']} on {os.uname().nodename}"
            self.problem = f"{where}: {type(error).__name__}: {error}; the same command goes on"
        return {"count": 0 if self.problem else part["count"], "problem": self.problem}

    def _do(self, number: int, start: int, count: int) -> None:
        file = _file(self.out, number)
        if file.exists():  # Ray asks again when a worker was killed after it had written
            return
        self.model = self.model or Model(self.out / "_job" / "archive", 0 if self.gpu else None)
        with (self.out / "_job" / "images.jsonl").open("rb") as lines:
            lines.seek(start)
            paths = [json.loads(line) for line in islice(lines, count)]
        rows = [row for i in range(0, count, BATCH) for row in self.model.rows(paths[i : i + BATCH])]
        _write(file, _parquet(rows))


class Model:
    """The archive's own predictor and settings: what the handler makes of an image, without TorchServe."""

    def __init__(self, folder: Path, gpu: int | None) -> None:
        """
        Raises:
            ValueError: a golden image's probabilities differ on this machine.
        """
        sys.path.insert(0, str(folder))  # the archive's programs, whatever is installed or checked out on this machine
        from predictor.pillow_preprocessing import ImageError
        from predictor.predictor import Predictor

        self.image_error = ImageError
        self.predictor = Predictor.open(folder, gpu=gpu)
        self.predictor.check_golden()

    def rows(self, paths: list[str]) -> list[Row]:
        """A row for each image."""
        outcomes = [self._crop(path) for path in paths]
        good = [outcome for outcome in outcomes if isinstance(outcome, np.ndarray)]
        predictions = iter(self.predictor.infer(np.stack(good)) if good else [])
        rows = []
        for path, outcome in zip(paths, outcomes, strict=True):
            row: Row = dict.fromkeys(COLUMNS)
            row["path"] = os.fsencode(path).decode("utf-8", "backslashreplace")  # names may be any bytes
            if isinstance(outcome, np.ndarray):
                prediction = next(predictions)
                row["label"], row["probability"] = next(iter(prediction.items()))
                row["predictions"] = json.dumps(prediction, ensure_ascii=False)
            else:
                row["error"], row["message"] = outcome
            rows.append(row)
        return rows

    def _crop(self, path: str) -> np.ndarray | tuple[str, str]:
        """uint8 (S, S, 3), or the type and message of the image's error."""
        try:
            if not os.path.isfile(path):  # noqa: PTH113 – a pipe would keep the worker waiting
                return "unreadable", "no such file"
            with open(path, "rb") as file:  # noqa: PTH123
                body = file.read(MAX_BYTES + 1)
            if len(body) > MAX_BYTES:
                return "too_many_bytes", f"the file has more than {MAX_BYTES:,} bytes"
            return self.predictor.decode(body)
        except OSError as error:
            return "unreadable", f"the file cannot be read ({error.strerror or error})"
        except self.image_error as error:
            return error.cause, str(error)
        except MemoryError:
            return "too_large", "the image needs more memory than there is"
        except Exception as error:  # of a decoder: if it ended the part, no start of this command could ever finish it
            return "unreadable", f"the image cannot be read ({type(error).__name__}: {error})"


# Files.


def _file(out: Path, number: int) -> Path:
    return out / f"part-{number:06d}.parquet"


def _parquet(rows: list[Row]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    types = {"probability": pyarrow.float64()}
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in rows[0]])
    with pyarrow.BufferOutputStream() as stream:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), stream)
        return stream.getvalue().to_pybytes()


def _sums(out: Path, parts: list[Part]) -> Counter[str]:
    """Rows by error, counted in the files.

    Raises:
        JobError: a file has not the rows that it must have.
    """
    from pyarrow import parquet

    sums: Counter[str] = Counter()
    for part in parts:
        file = _file(out, part["number"])
        try:
            errors = parquet.read_table(file, columns=["error"]).column(0).to_pylist()
        except (OSError, ValueError) as error:
            raise JobError(f"{file}: cannot be read ({error}); remove it and start again") from None
        if len(errors) != part["count"]:
            raise JobError(f"{file}: has {len(errors)} rows and not {part['count']}; remove it and start again")
        sums.update(error or "ok" for error in errors)
    return sums


def _write(path: Path, content: bytes) -> None:
    """To the disk and not only to its cache, so that what has its name is whole after a power cut too."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One start at a time works in `out`, which is new or of an earlier start."""
    if out.exists() and not (out / "_job").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise JobError(f"{out}: holds something else; name a new folder as --out")
    (out / "_job").mkdir(parents=True, exist_ok=True)
    with (out / "_job" / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(f"{out}: another start of this command works on it; wait for it, or stop it") from None
        for left in out.glob(".part-*"):  # of a worker that was killed
            left.unlink()
        yield


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as files:
            needed = {
                "MAR-INF/MANIFEST.json",
                "model-config.yaml",
                "spec.json",
                "golden.json",
                "predictor/predictor.py",
            }
            if lacking := needed - set(files.namelist()):
                raise JobError(f"{archive}: has no {min(lacking)}; name an archive that `python -m export` has made")
            files.extractall(folder)
    except zipfile.BadZipFile as error:
        raise JobError(f"{archive}: no whole archive ({error}); `python -m export RUN` makes one") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A bar on a terminal, where tqdm is installed; elsewhere a line every ten seconds. On stderr."""
    try:
        if not sys.stderr.isatty():
            raise ImportError
        from tqdm import tqdm
    except ImportError:
        last = time.monotonic()

        def step(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last > 10:
                last = time.monotonic()
                print(f"{done:,} of {total:,} images", file=sys.stderr, flush=True)

        yield step
        return
    with tqdm(total=total, initial=done, unit="images") as bar:
        yield bar.update


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Ray is stopped too
    try:
        sums = classify(
            options.archive,
            _names(options),
            options.out,
            part_size=options.part_size,
            workers=options.workers,
            gpus=options.gpus_per_worker,
            address=options.address,
        )
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        print(f"classify.py: {error}; pip install 'ray[data]' pillow onnxruntime", file=sys.stderr)
        return 2
    except (JobError, OSError) as error:
        print(f"classify.py: {error}", file=sys.stderr)
        return 2
    total, errors = sum(sums.values()), sum(sums.values()) - sums["ok"]
    print(f"{options.out}: {total:,} images, {errors:,} with errors")
    return 1 if errors else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="classify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, metavar="NAME.mar", help="made by `python -m export RUN`")
    parser.add_argument("images", nargs="*", help="files and folders")
    parser.add_argument("--list", type=Path, metavar="FILE", help="a file with the name of one of these on each line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the predictions; the same one to go on")
    parser.add_argument("--workers", type=int, metavar="N", help="one for each core, or as many as the GPUs take")
    parser.add_argument("--gpus-per-worker", type=float, default=0, metavar="X", help="0.25: four workers share a GPU")
    parser.add_argument("--address", help="of a Ray cluster: `auto` on one of its machines; none: this machine alone")
    parser.add_argument("--part-size", type=int, default=PART_SIZE, metavar="N", help=f"images in a file ({PART_SIZE})")
    options = parser.parse_args(arguments)
    for name in ("workers", "part_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return options


def _names(options: argparse.Namespace) -> list[str]:
    """The files and folders of the command line and of --list.

    Raises:
        JobError: one of the command line is not there.
    """
    listed = options.list.read_text("utf-8", "surrogateescape").splitlines() if options.list else []
    if absent := next((name for name in options.images if not Path(name).exists()), None):
        raise JobError(f"{absent}: no such image or folder")
    return [*options.images, *listed]


if __name__ == "__main__":
    sys.exit(main())
