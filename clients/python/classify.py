"""Asks a served classifier about pictures: a library in one file and a command. Needs nothing but `requests`.

    python classify.py --model digits --key-file key_file.json PICTURE [PICTURE …]
    python classify.py --model digits --key-file key_file.json FOLDER --out answers.csv

Without --out a line of JSON is printed for each picture. With --out the answers go into a .csv or .jsonl file. Either
way each picture has one row, in the order of the names, with an error where the server refused it. A folder is searched
through all its folders for names that end like pictures; hidden ones are left out.

A server that is full, starting anew or gone is asked again for --retry seconds; asking twice is harmless. The rows go
into OUT.part, which becomes OUT at the end. If the command is stopped before, the same command with --resume goes on.

Ends with 0 if every picture was answered, with 1 if some were refused, and with 2 if the command was wrong, or the
server could not be reached or refuses every request (a wrong key, an unknown model).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Statuses that say nothing about the picture and pass. What a real TorchServe 0.12 answers: 503 while its queue is full
# or no worker is up, and where the handler raised; 507 to the requests of a worker that was killed or has no memory
# left; 500 to those of a worker that was replaced because it took too long. 429, 502 and 504 come from proxies. While
# TorchServe starts its port is closed: it listens only once the models are known and the new keys are written.
TRANSIENT = frozenset({429, 500, 502, 503, 504, 507})

PICTURES_FAULT = frozenset({400, 413, 415, 422})  # these would be the same at every try

FIRST_WAIT = 0.1  # seconds before the second try; doubled at each further one, and shortened at random by up to a half
LONGEST_WAIT = 6.4  # seconds: a restarted TorchServe is found soon after it is ready

IN_FLIGHT = 32  # pictures for each thread that may be ahead of the oldest unanswered one; bounds the memory

HEADER = ("picture", "label", "probability", "error", "answer")  # of the .csv; `answer` is JSON, as in the .jsonl

log = logging.getLogger("classify")


class ClassifierError(RuntimeError):
    """The server refused a picture, or the request. `code` is the HTTP status, `type` the cause."""

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(f"{code} {type}: {message}")
        self.code, self.type = code, type

    @property
    def is_about_the_picture(self) -> bool:
        """False where every other picture would be refused too: a wrong key, an unknown model."""
        return self.code in PICTURES_FAULT and self.type != "InvalidKeyException"


class Unavailable(ConnectionError):
    """No answer within the retry time: connections were lost, or the server failed at every try."""


class KeyFileError(ValueError):
    """A key file that is missing or holds no inference key."""


class Client:
    """One served model. May be shared by threads: each has a connection of its own, which is kept open."""

    def __init__(
        self,
        url: str,
        model: str,
        token: str = "",
        timeout: float = 60.0,
        *,
        key_file: Path | str | None = None,
        connect_timeout: float = 5.0,
        retry_seconds: float = 60.0,
    ) -> None:
        """
        Args:
            token: the inference key, where it does not change.
            key_file: TorchServe's key_file.json, read again whenever the key is refused: each start of the server
                writes another key.
            timeout: seconds for each answer; above the server's own 30, so that its word comes first.
            connect_timeout: seconds for connecting.
            retry_seconds: from a request's first failure to giving up; 0 for a single try.

        Raises:
            KeyFileError: the key file is missing or holds no key.
        """
        if token and key_file:
            raise ValueError("both a token and a key file are given; give one of them")
        self.url, self.model, self.retry_seconds = url.rstrip("/"), model, retry_seconds
        self._timeouts = (connect_timeout, timeout)
        self._key_file = key_file
        self._key = read_key(key_file) if key_file else token
        self._lock = threading.Lock()
        self._threads = threading.local()
        self._is_out = False

    def is_healthy(self) -> bool:
        """One question, without another try."""
        try:
            return self._send("GET", "/ping").ok
        except (requests.RequestException, KeyFileError):
            return False

    def classify(self, picture: bytes, *, cancelled: threading.Event | None = None) -> dict[str, float]:
        """The bytes of a picture file to {label: probability}, best first.

        Args:
            cancelled: ends the waiting for another try when it is set.

        Raises:
            ClassifierError: refused; `type` says why. Final: another try would be refused too.
            Unavailable: no answer within the retry time.
        """
        return self._ask(cancelled, data=picture, headers={"Content-Type": "application/octet-stream"})

    def classify_many(self, pictures: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Several in one request: {name: answer}, where the answer of a refused one is its error.

        The names are the mapping's keys, so none is repeated: TorchServe would keep only the last of them.

        Raises:
            ClassifierError: all were refused.
            Unavailable: no answer within the retry time.
        """
        if len(pictures) == 1:
            ((name, body),) = pictures.items()
            return {name: self.classify(body)}
        return self._ask(
            None, files={name: ("picture", body, "application/octet-stream") for name, body in pictures.items()}
        )

    def _ask(self, cancelled: threading.Event | None, **body: Any) -> dict[str, Any]:
        """Asks until there is an answer that stays. A request only asks and changes nothing: twice is harmless."""
        cancelled = cancelled or threading.Event()
        attempt, failed_first = 0, None
        while True:
            at_least = 0.0
            try:
                reply = self._send("POST", f"/predictions/{self.model}", **body)
                if reply.status_code not in TRANSIENT:
                    self._is_out = False
                    return _read(reply)
                failure: Exception = _refusal(reply)
                at_least = _retry_after(reply)
            except (
                requests.ConnectionError,
                requests.Timeout,
                requests.exceptions.ChunkedEncodingError,  # cut off within the answer
                KeyFileError,  # a server that starts has removed the file, or has not written all of it
            ) as error:
                failure = error
            now = time.monotonic()
            failed_first = now if failed_first is None else failed_first
            left = failed_first + self.retry_seconds - now
            if left <= 0 or at_least > left or cancelled.is_set():
                raise self._unavailable(failure, at_least) from failure
            if now - failed_first > 1:  # a full queue is no news
                self._say_once(failure)
            cancelled.wait(max(at_least, min(_back_off(attempt), left)))
            attempt += 1

    def _send(self, method: str, path: str, **body: Any) -> requests.Response:
        """One request; another one for each new key that the key file holds where the key is refused."""
        while True:
            key = self._key
            reply = self._session.request(method, self.url + path, timeout=self._timeouts, **body)
            refused = reply.status_code == 400 and _values(reply).get("type") == "InvalidKeyException"
            if not refused or not self._has_another_key(key):
                return reply

    @property
    def _session(self) -> requests.Session:
        """This thread's own, with the key of now."""
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = self._threads.session = requests.Session()
            session.trust_env = False  # no proxy and no .netrc between a client and its own server
        if self._key:
            session.headers["Authorization"] = f"Bearer {self._key}"
        return session

    def _has_another_key(self, refused: str) -> bool:
        """Whether there is a key to try in the place of `refused`: another thread may have read it already."""
        with self._lock:
            if self._key == refused and self._key_file:
                self._key = read_key(self._key_file)
            return self._key != refused

    def _unavailable(self, failure: Exception, at_least: float) -> Unavailable:
        asked = f", which asks to wait {at_least:.0f} s" if at_least > self.retry_seconds else ""
        return Unavailable(f"{self.url}: no answer within {self.retry_seconds:g} s ({_reason(failure)}{asked})")

    def _say_once(self, failure: Exception) -> None:
        """One line for an outage, not one for each thread and try."""
        with self._lock:
            if not self._is_out:
                log.warning("%s: %s; asking again for up to %g s", self.url, _reason(failure), self.retry_seconds)
            self._is_out = True


@dataclass(frozen=True)
class Row:
    """What became of one picture."""

    picture: str
    answer: dict[str, float]  # {label: probability}, best first; empty if refused
    error: str = ""

    def as_json(self) -> str:
        outcome = {"error": self.error} if self.error else {"answer": self.answer}
        return json.dumps({"picture": self.picture} | outcome) + "\n"

    def as_csv(self) -> str:
        if self.error:
            return _csv_line(self.picture, "", "", self.error, "")
        label, probability = next(iter(self.answer.items()))
        return _csv_line(self.picture, label, probability, "", json.dumps(self.answer))


def classify_files(client: Client, paths: Iterable[Path], *, threads: int = 8) -> Iterator[Row]:
    """A row for each path, in their order, while `threads` of them are asked about at once.

    `paths` may have no end: only IN_FLIGHT of them for each thread are taken ahead of the row that is next. A picture
    that is refused, or a file that cannot be read, is a row with an error.

    Raises:
        ClassifierError: the server refuses every picture.
        Unavailable: no answer about a picture within the client's retry time. All rows before it have been given out.
    """
    cancelled = threading.Event()
    rows: deque[Future[Row]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for path in paths:
            rows.append(pool.submit(_classify_file, client, path, cancelled))
            while len(rows) >= IN_FLIGHT * threads or (rows and rows[0].done()):
                yield rows.popleft().result()
        while rows:
            yield rows.popleft().result()
    finally:
        cancelled.set()
        pool.shutdown(wait=False, cancel_futures=True)


def find_pictures(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among `paths`, and the pictures in the folders among them: always in the same order.

    Holds the names of one folder at a time, and of those around it. Links are followed, except in a circle.
    """
    for path in paths:
        if path.is_dir():
            yield from _walk(path, frozenset())
        else:
            yield path


def read_key(path: Path | str) -> str:
    """The inference key from TorchServe's key_file.json. It changes at each start of the server.

    Raises:
        KeyFileError: the file is missing or holds no such key.
    """
    try:
        key: str = json.loads(Path(path).read_text())["inference"]["key"]
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; it lies in the folder where TorchServe was started") from None
    except (ValueError, KeyError, TypeError):
        raise KeyFileError(f"{path}: holds no inference key; name TorchServe's key_file.json") from None
    return key


def _classify_file(client: Client, path: Path, cancelled: threading.Event) -> Row:
    try:
        body = path.read_bytes()
    except OSError as error:
        return Row(str(path), {}, f"cannot be read: {error.strerror}")
    try:
        return Row(str(path), client.classify(body, cancelled=cancelled))
    except ClassifierError as error:
        if not error.is_about_the_picture:
            raise
        return Row(str(path), {}, str(error))
    except Unavailable as error:
        raise Unavailable(f"{path}: {error}") from None


def _walk(folder: Path, around: frozenset[str]) -> Iterator[Path]:
    around |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        found = [(e.name, e.is_dir()) for e in entries if e.is_dir() or e.name.lower().endswith(SUFFIXES)]
    for name, is_folder in sorted(found):
        if name.startswith(".") or name == "__MACOSX":  # what macOS leaves beside pictures ends like them
            continue
        if not is_folder:
            yield folder / name
        elif os.path.realpath(folder / name) not in around:
            yield from _walk(folder / name, around)


def _values(reply: requests.Response) -> dict[str, Any]:
    """The reply's JSON object; empty where it is none."""
    try:
        values = reply.json()
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _read(reply: requests.Response) -> dict[str, Any]:
    if not reply.ok:
        raise _refusal(reply)
    if not (values := _values(reply)):
        raise ClassifierError(reply.status_code, "no_answer", f"{reply.url} is no classifier: it answers no labels")
    return values


def _refusal(reply: requests.Response) -> ClassifierError:
    values = _values(reply)
    message = values.get("message") or reply.reason or "no message"
    if reply.status_code == 413 and not values:  # TorchServe's own, which names no limit
        message += "; the server's limit is max_request_size in its config.properties, 10 MB unless it was raised"
    return ClassifierError(reply.status_code, values.get("type", "http"), message)


def _retry_after(reply: requests.Response) -> float:
    """Seconds that the server asks to wait; 0 where it says nothing that can be read."""
    value = reply.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _back_off(attempt: int) -> float:
    """Seconds. At random, so that threads and clients which failed together do not come back together."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1)


def _reason(error: BaseException) -> str:
    """What lies under requests' and urllib3's wrappings."""
    while under := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = under
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        error: object = "interrupted"
        status = 130
    except (ClassifierError, OSError, ValueError) as caught:  # requests' errors are OSErrors
        error, status = caught, 2
    if options.out and _has_rows(_part(options.out)):
        error = f"{error}; {_part(options.out)} holds the rows so far: --resume goes on, or delete it to begin anew"
    print(f"classify.py: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a picture, or a folder of pictures")
    server = parser.add_argument_group("the server")
    server.add_argument("--url", default="http://127.0.0.1:8080", help="its address (http://127.0.0.1:8080)")
    server.add_argument("--model", required=True, help="name of the served model")
    server.add_argument("--key-file", type=Path, help="TorchServe's key_file.json; or set TORCHSERVE_KEY")
    server.add_argument("--threads", type=int, default=8, help="pictures asked about at once: 2 for each worker (8)")
    server.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds for each answer (60)")
    server.add_argument(
        "--retry",
        type=float,
        metavar="S",
        help="seconds to keep asking a server that fails or is gone (60 with --out, else 5)",
    )
    output = parser.add_argument_group("the answers")
    output.add_argument("--out", type=Path, metavar="FILE", help=f".jsonl, or .csv with {', '.join(HEADER)}")
    output.add_argument("--resume", action="store_true", help="keep the rows of FILE.part and ask about the rest")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.resume and not options.out:
        raise ValueError("--resume goes on with a file; name it with --out")
    if options.out and options.out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out {options.out}: must end in .csv or .jsonl")
    if options.threads < 1:
        raise ValueError(f"--threads is {options.threads}; it must be at least 1")
    for path in options.paths:
        if not path.exists():
            raise ValueError(f"{path}: no such picture or folder")
    token = "" if options.key_file else os.environ.get("TORCHSERVE_KEY", "")
    retry = options.retry if options.retry is not None else (60.0 if options.out else 5.0)
    client = Client(options.url, options.model, token, options.timeout, key_file=options.key_file, retry_seconds=retry)
    if options.out:
        return _to_file(client, options)
    refused = 0
    for row in classify_files(client, find_pictures(options.paths), threads=options.threads):
        print(row.as_json(), end="", flush=True)
        refused += bool(row.error)
    return 1 if refused else 0


def _to_file(client: Client, options: argparse.Namespace) -> int:
    out, part, pictures = options.out, _part(options.out), find_pictures(options.paths)
    if _has_rows(part) and not options.resume:
        raise ValueError(f"{out}: an earlier run was stopped")
    total = sum(1 for _ in find_pictures(options.paths))
    if not total:
        raise ValueError(f"{options.paths[0]}: holds no pictures ({', '.join(SUFFIXES)})")
    done, refused = _keep(part, pictures) if part.exists() else (0, 0)
    started = time.monotonic()
    with (
        part.open("a", encoding="utf-8", errors="surrogateescape", newline="") as file,  # names may be any bytes
        _Progress(total, done) as progress,
    ):
        if out.suffix == ".csv" and not file.tell():
            file.write(_csv_line(*HEADER))
        for row in classify_files(client, pictures, threads=options.threads):
            file.write(row.as_csv() if out.suffix == ".csv" else row.as_json())
            file.flush()  # a killed command loses no row
            refused += bool(row.error)
            progress.step()
        os.fsync(file.fileno())
    part.replace(out)
    print(f"{out}: {progress.done} pictures, {refused} refused, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if refused else 0


def _part(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _has_rows(part: Path) -> bool:
    return part.exists() and any(_whole_rows(part))


def _keep(part: Path, pictures: Iterator[Path]) -> tuple[int, int]:
    """Cuts off what is not whole rows, and takes the pictures of the rows from `pictures`.

    Returns:
        How many rows there are, and how many of them are errors.

    Raises:
        ValueError: the rows are not those of `pictures`.
    """
    done = refused = size = 0
    for picture, error, end in _whole_rows(part):
        expected = next(pictures, "nothing")
        if picture != str(expected):
            raise ValueError(
                f"row {done + 1} of {part} is {picture} where {expected} is now; name the same, unchanged PATH"
            )
        done, refused, size = done + 1, refused + bool(error), end
    os.truncate(part, size)
    return done, refused


def _whole_rows(part: Path) -> Iterator[tuple[str, str, int]]:
    """Picture, error and the place of the end of each row, up to the first that was not written to its end."""
    with part.open("rb") as file:
        try:
            yield from (_csv_rows if part.name.endswith(".csv.part") else _json_rows)(file)
        except (csv.Error, ValueError, KeyError, TypeError):  # half of a row, or what a broken disk made of one
            return


def _json_rows(file: Iterable[bytes]) -> Iterator[tuple[str, str, int]]:
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        values = json.loads(line)
        yield values["picture"], values.get("error", ""), end


def _csv_rows(file: Iterable[bytes]) -> Iterator[tuple[str, str, int]]:
    end, last = 0, b""

    def lines() -> Iterator[str]:
        nonlocal end, last
        for last in file:
            end += len(last)
            yield last.decode("utf-8", "surrogateescape")

    rows = csv.reader(lines(), strict=True)  # takes no line ahead; strict: a file that ends within quotes is an error
    next(rows, None)  # the header
    for picture, _, _, error, _ in rows:
        if not last.endswith(b"\r\n"):
            return
        yield picture, error, end


def _csv_line(*fields: object) -> str:
    line = io.StringIO(newline="")
    csv.writer(line).writerow(fields)
    return line.getvalue()


class _Progress:
    """A bar on a terminal where tqdm is installed, else a line every ten seconds, on stderr."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._first, self._started = done, time.monotonic()
        self._next = self._started + 10
        self._bar = _bar(total, done)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        elif now >= self._next:
            rate = (self.done - self._first) / (now - self._started)
            print(f"{self.done} of {self.total} pictures, {rate:.0f} a second", file=sys.stderr, flush=True)
            self._next = now + 10


def _bar(total: int, done: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit="picture")


if __name__ == "__main__":
    status = main()
    if status > 1:
        os._exit(status)  # at once, though threads may wait for an answer
    sys.exit(status)
