"""Asks a served classifier about images: a library in one file and a command. Needs nothing but `requests`.

    python classify.py --model digits --key-file key_file.json IMAGE [IMAGE …]
    python classify.py --model digits --key-file key_file.json FOLDER --out predictions.csv

Without --out a line of JSON is printed for each image. With --out the predictions go into a .csv or .jsonl file. Either
way each image has one row, in the order of the names, with an error where the server refused it. A folder is searched
through all its folders for names that end like images; hidden ones are left out.

A server that is full, starting anew or gone is asked again for --retry seconds; asking twice is harmless. The rows go
into OUT.part, which becomes OUT at the end. If the command is stopped before, the same command with --resume goes on.
Each prediction names the model, its version and the SHA-256 of its weights; one file holds those of one model only.
In a .csv a cell that begins with = + - @ or ' has another ' before it, so that no spreadsheet runs it as a formula.

Ends with 0 if every image was classified, with 1 if some were refused, and with 2 if the command was wrong, or the
server could not be reached or refuses every request (a wrong key, an unknown model).
"""

from __future__ import annotations

import argparse
import csv
import http.client
import io
import json
import logging
import os
import random
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO

import requests
import urllib3

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two commands from writing one file
    fcntl = None  # type: ignore[assignment]

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif"),  # read where pi-heif is installed
)

# Statuses that say nothing about the image and pass. What a real TorchServe 0.12 returns: 503 while its queue is full
# or no worker is up, and where the handler raised; 507 to the requests of a worker that was killed or has no memory
# left; 500 to those of a worker that was replaced because it took too long. 429, 502 and 504 come from proxies. While
# TorchServe starts its port is closed: it listens only once the models are known and the new keys are written.
TRANSIENT = frozenset({429, 500, 502, 503, 504, 507})

IMAGES_FAULT = frozenset({400, 413, 415, 422})  # these would be the same at every try

# What TorchServe says to the whole batch of an image that kills its worker, or makes the handler or its memory fail.
# The image is then asked about alone, as its neighbours may be innocent, and after MOST_DEATHS no more.
DEATHS = ("Worker died", "Prediction failed", "Out of resources")
MOST_DEATHS = 2
DEADLY_IN_A_ROW = 10  # images: then it is the server that is broken

LARGEST_RESPONSE = 4_000_000  # bytes: 1,000 labels for each of 100 images
LONGEST_MESSAGE = 500  # characters of what a server says

FIRST_WAIT = 0.1  # seconds before the second try; doubled at each further one, and shortened at random by up to a half
LONGEST_WAIT = 6.4  # seconds: a restarted TorchServe is found soon after it is ready

IN_FLIGHT = 32  # images for each thread that may be ahead of the oldest pending one; bounds the memory

HEADER = ("image", "label", "probability", "error", "predictions", "model")  # of the .csv; `predictions`: as JSON
OTHER_VERSION = "was begun by another version of classify.py, whose rows differ; finish it with that version"
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")  # a cell that begins so gets a ' before it; a reader drops one

log = logging.getLogger("classify")


class ClassifierError(RuntimeError):
    """The server refused an image, or the request. `code` is the HTTP status, `type` the cause."""

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(f"{code} {type}: {message}")
        self.code, self.type, self.message = code, type, message

    @property
    def is_about_the_image(self) -> bool:
        """False where every other image would be refused too: a wrong key, an unknown model."""
        return self.type == "worker_died" or (self.code in IMAGES_FAULT and self.type != "InvalidKeyException")

    @property
    def is_a_death(self) -> bool:
        return self.code in TRANSIENT and self.message.startswith(DEATHS)


class Unavailable(ConnectionError):
    """No response within the retry time: connections were lost, or the server failed at every try."""


class KeyFileError(ValueError):
    """A key file that is missing or holds no inference key."""


class InUse(ValueError):
    """Another command writes the same file."""


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one image, and which model it was."""

    labels: dict[str, float]  # {label: probability}, best first
    model: str  # NAME/VERSION@SHA-256 of the weights, as far as the server names them


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
        cacert: Path | str | None = None,
    ) -> None:
        """
        Args:
            token: the inference key, where it does not change.
            key_file: TorchServe's key_file.json, read again whenever the key is refused: each start of the server
                writes another key.
            timeout: seconds to the last byte of each response; above the server's 30, so that its error comes first.
            connect_timeout: seconds for connecting.
            retry_seconds: from a request's first failure to giving up; 0 for a single try.
            cacert: a PEM file with the certificate of an https server, or of the authority that signed it; without it,
                those that `requests` trusts.

        Raises:
            KeyFileError: the key file is missing or holds no key.
            ValueError: the certificate file cannot be read.
        """
        if token and key_file:
            raise ValueError("both a token and a key file are given; give one of them")
        if cacert:
            check_certificates(cacert)
        self.url, self.model, self.retry_seconds = url.rstrip("/"), model, retry_seconds
        self._timeouts = (connect_timeout, timeout)
        self._key_file = key_file
        self._key = read_key(key_file) if key_file else token
        self._cacert = cacert
        self._lock = threading.Lock()
        self._threads = threading.local()
        self._turns = _Turns()
        self._is_out = False
        self._deadly = 0  # images in a row that killed workers

    def is_healthy(self) -> bool:
        """One question, without another try."""
        try:
            return self._send("GET", "/ping").ok
        except (requests.RequestException, KeyFileError, ClassifierError):
            return False

    def classify(self, image: bytes, *, cancelled: threading.Event | None = None) -> dict[str, float]:
        """The bytes of an image file to {label: probability}, best first.

        Args:
            cancelled: ends the waiting for another try when it is set.

        Raises:
            ClassifierError: refused; `type` says why. Final: another try would be refused too.
            Unavailable: no response within the retry time.
        """
        return self.predict(image, cancelled=cancelled).labels

    def predict(self, image: bytes, *, cancelled: threading.Event | None = None) -> Prediction:
        """As `classify`, with the model that made the prediction."""
        response = self._ask(cancelled, data=image, headers={"Content-Type": "application/octet-stream"})
        labels = _read(response)
        if not all(isinstance(probability, (int, float)) for probability in labels.values()):
            raise _no_prediction(response)
        said = response.headers
        version, weights = (_plain(said.get(f"x-model-{name}", "")) for name in ("version", "weights-sha256"))
        model = self.model.split("/")[0] + (f"/{version}" if version else "") + (f"@{weights}" if weights else "")
        return Prediction(labels, model)

    def classify_many(self, images: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Several in one request: {name: {label: probability}}, and for a refused one its error.

        The names are the mapping's keys, so none is repeated: TorchServe would keep only the last of them.

        Raises:
            ClassifierError: all were refused.
            Unavailable: no response within the retry time.
        """
        if len(images) == 1:
            ((name, body),) = images.items()
            return {name: self.classify(body)}
        files = {name: ("image", body, "application/octet-stream") for name, body in images.items()}
        return _read(self._ask(None, files=files))

    def _ask(self, cancelled: threading.Event | None, **body: Any) -> requests.Response:
        """Sends it until there is a final response. A request changes nothing on the server: twice is harmless."""
        cancelled = cancelled or threading.Event()
        attempt, deaths, failed_first = 0, 0, None
        while True:
            at_least = 0.0
            try:
                with self._turns.take(alone=deaths > 0):
                    response = self._send("POST", f"/predictions/{self.model}", **body)
                if response.status_code not in TRANSIENT:
                    self._is_out, self._deadly = False, 0
                    return response
                failure: Exception = (refusal := _refusal(response))
                at_least = _retry_after(response)
                deaths += refusal.is_a_death
                if deaths == MOST_DEATHS:
                    raise self._deadly_image(refusal)
            except (requests.ConnectionError, requests.Timeout) as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise Unavailable(f"{self.url}: {_reason(error)}; name whom to trust with --cacert") from error
                failure = error
            except KeyFileError as error:  # a server that starts has removed the file, or has not written all of it
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
            response = self._session.request(
                method, self.url + path, timeout=self._timeouts, allow_redirects=False, **body
            )
            refused = response.status_code == 400 and _values(response).get("type") == "InvalidKeyException"
            if not refused or not self._has_another_key(key):
                return response

    @property
    def _session(self) -> requests.Session:
        """This thread's own, with the key of now."""
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = self._threads.session = requests.Session()
            session.trust_env = False  # no proxy and no .netrc between a client and its own server
            session.verify = str(self._cacert) if self._cacert else True
            session.headers["Accept-Encoding"] = "identity"  # a few bytes could be unpacked to gigabytes
            for scheme in ("http://", "https://"):
                session.mount(scheme, _BoundedAdapter())
        if self._key:
            session.headers["Authorization"] = f"Bearer {self._key}"
        return session

    def _has_another_key(self, refused: str) -> bool:
        """Whether there is another key to try than `refused`: another thread may have read it already."""
        with self._lock:
            if self._key == refused and self._key_file:
                self._key = read_key(self._key_file)
            return self._key != refused

    def _deadly_image(self, refusal: ClassifierError) -> Exception:
        with self._lock:
            self._deadly += 1
        if self._deadly >= DEADLY_IN_A_ROW:
            return Unavailable(f"{self.url}: fails at every image ({refusal})")
        message = f"the server failed {MOST_DEATHS} times at this image, the last time alone ({refusal.message})"
        return ClassifierError(refusal.code, "worker_died", message)

    def _unavailable(self, failure: Exception, at_least: float) -> Unavailable:
        asked = f", which asks to wait {at_least:.0f} s" if at_least > self.retry_seconds else ""
        return Unavailable(f"{self.url}: no response within {self.retry_seconds:g} s ({_reason(failure)}{asked})")

    def _say_once(self, failure: Exception) -> None:
        """One line for an outage, not one for each thread and try."""
        with self._lock:
            if not self._is_out:
                log.warning("%s: %s; asking again for up to %g s", self.url, _reason(failure), self.retry_seconds)
            self._is_out = True


class _Turns:
    """Requests run side by side, but one that may have killed a worker runs alone: then it is known whether it did."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._waiting = 0  # requests; of those that run alone

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        with self._changed:
            self._waiting += alone
            self._changed.wait_for(lambda: not self._running if alone else not self._waiting)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._waiting -= alone
                self._changed.notify_all()


class _DeadlineReader(io.RawIOBase):
    """What a socket sends within its time-out from now. The socket's own time-out begins anew with each byte."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._bytes = sock, sock.makefile("rb", buffering=0)
        seconds = sock.gettimeout()
        self._end = None if seconds is None else time.monotonic() + seconds

    def makefile(self, *_: object) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._end is not None:
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError("the response took too long")
            self._sock.settimeout(left)
        return self._bytes.readinto(buffer)

    def close(self) -> None:
        self._bytes.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(_DeadlineReader(sock), *args, **options)  # type: ignore[arg-type]


class _HTTPConnection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _HTTPSConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class _BoundedAdapter(requests.adapters.HTTPAdapter):
    """Responses of a bounded size, in a bounded time, and never a redirect to another server."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        """
        Raises:
            ClassifierError: the response is too long.
        """
        response, body = super().send(request, *args, **options | {"stream": True}), bytearray()
        try:
            for chunk in response.raw.stream(1 << 16, decode_content=False):
                body += chunk
                if len(body) > LARGEST_RESPONSE:
                    response.close()
                    message = f"more than {LARGEST_RESPONSE:,} bytes; name a classifier, or ask about fewer images"
                    raise ClassifierError(response.status_code, "response_too_long", message)
        except (urllib3.exceptions.HTTPError, OSError) as error:  # cut off, or too slow
            raise requests.ConnectionError(error, request=request) from error
        response.raw = io.BytesIO(body)
        response.headers.pop("Location", None)  # requests would look at where it leads
        return response


@dataclass(frozen=True)
class Row:
    """What became of one image."""

    image: str
    predictions: dict[str, float]  # {label: probability}, best first; empty if refused
    error: str = ""
    model: str = ""  # that predicted it, as in Prediction

    def as_json(self) -> str:
        outcome = {"error": self.error} if self.error else {"predictions": self.predictions, "model": self.model}
        return json.dumps({"image": self.image} | outcome) + "\n"

    def as_csv(self) -> str:
        if self.error:
            return _csv_line(self.image, "", "", self.error, "", "")
        label, probability = next(iter(self.predictions.items()))
        return _csv_line(self.image, _plain(label), probability, "", json.dumps(self.predictions), self.model)


def classify_files(client: Client, paths: Iterable[Path], *, threads: int = 8) -> Iterator[Row]:
    """A row for each path, in their order, while `threads` of them are asked about at once.

    `paths` may have no end: only IN_FLIGHT of them for each thread are taken ahead of the row that is next. An image
    that is refused, or a file that cannot be read, is a row with an error.

    Raises:
        ClassifierError: the server refuses every image.
        Unavailable: no response about an image within the client's retry time. All rows before it have been given out.
    """
    cancelled = threading.Event()
    rows: deque[Future[Row]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for path in paths:
            rows.append(pool.submit(_classify_file, client, path, cancelled))
            while len(rows) >= IN_FLIGHT * threads or (rows and rows[0].done()):
                yield _await(rows.popleft())
        while rows:
            yield _await(rows.popleft())
    finally:
        cancelled.set()
        pool.shutdown(wait=False, cancel_futures=True)


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among `paths`, and the images in the folders among them: always in the same order.

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


def check_certificates(path: Path | str) -> None:
    """
    Raises:
        ValueError: the file holds no certificates.
    """
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; name a PEM file with the server's certificate") from None


def _await(row: Future[Row]) -> Row:
    """Its result. Python sees an interrupt that comes in the instant before a wait only after it: so none is long."""
    while not wait([row], timeout=0.5).done:
        pass
    return row.result()


def _classify_file(client: Client, path: Path, cancelled: threading.Event) -> Row:
    try:
        body = path.read_bytes()
    except OSError as error:
        return Row(str(path), {}, f"cannot be read: {error.strerror}")
    try:
        prediction = client.predict(body, cancelled=cancelled)
        return Row(str(path), prediction.labels, model=prediction.model)
    except ClassifierError as error:
        if not error.is_about_the_image:
            raise
        return Row(str(path), {}, str(error))
    except Unavailable as error:
        raise Unavailable(f"{path}: {error}") from None


def _walk(folder: Path, around: frozenset[str]) -> Iterator[Path]:
    around |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        found = [(e.name, e.is_dir()) for e in entries if e.is_dir() or e.name.lower().endswith(SUFFIXES)]
    for name, is_folder in sorted(found):
        if name.startswith(".") or name == "__MACOSX":  # what macOS leaves beside images ends like them
            continue
        if not is_folder:
            yield folder / name
        elif os.path.realpath(folder / name) not in around:
            yield from _walk(folder / name, around)


def _values(response: requests.Response) -> dict[str, Any]:
    """The response's JSON object; empty where it is none."""
    try:
        values = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _read(response: requests.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise _refusal(response)
    if not (values := _values(response)):
        raise _no_prediction(response)
    return values


def _no_prediction(response: requests.Response) -> ClassifierError:
    message = f"{response.url} is no classifier: it returns no labels"
    return ClassifierError(response.status_code, "no_prediction", message)


def _refusal(response: requests.Response) -> ClassifierError:
    values = _values(response)
    message = values.get("message") or response.reason or "no message"
    if response.status_code == 413 and not values:  # TorchServe's own, which names no limit
        limit = "the server's limit is max_request_size in its config.properties, 10 MB unless it was raised"
        message = f"{message}; {limit}"
    if 300 <= response.status_code < 400:
        message = f"{message}: sends to another address, where images are not sent; name the correct one with --url"
    return ClassifierError(response.status_code, _plain(values.get("type", "http")), _plain(message))


def _plain(text: object, longest: int | None = LONGEST_MESSAGE) -> str:
    """On one line, without what a terminal would obey, and not longer than a message is."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[:longest])
    return "".join(escaped)


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server asks to wait; 0 where it says nothing that can be read."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _back_off(attempt: int) -> float:
    """Seconds. At random, so that threads and clients which failed together do not come back together."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1)


def _reason(error: BaseException) -> str:
    """What lies under requests' and urllib3's wrappings."""
    while under := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = under
    return _plain(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it shows a traceback for a header that it cannot read
    try:
        return _run(options)
    except KeyboardInterrupt:
        error: object = "interrupted"
        status = 130
    except (ClassifierError, OSError, ValueError) as caught:  # requests' errors are OSErrors
        error, status = caught, 2
    if options.out and not isinstance(error, InUse) and _has_rows(_part(options.out)):
        error = f"{error}; {_part(options.out)} holds the rows so far: --resume goes on, or delete it to begin anew"
    print(f"classify.py: {_plain(error, None)}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="an image, or a folder of images")
    server = parser.add_argument_group("the server")
    server.add_argument("--url", default="http://127.0.0.1:8080", help="its address (http://127.0.0.1:8080)")
    server.add_argument("--model", required=True, help="name of the served model")
    server.add_argument("--key-file", type=Path, help="TorchServe's key_file.json; or set TORCHSERVE_KEY")
    server.add_argument("--cacert", type=Path, metavar="FILE", help="trust the certificates of this PEM file for https")
    server.add_argument("--threads", type=int, default=8, help="images asked about at once: 2 for each worker (8)")
    server.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds for each response (60)")
    server.add_argument(
        "--retry",
        type=float,
        metavar="S",
        help="seconds to keep asking a server that fails or is gone (60 with --out, else 5)",
    )
    output = parser.add_argument_group("the predictions")
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
            raise ValueError(f"{path}: no such image or folder")
    token = "" if options.key_file else os.environ.get("TORCHSERVE_KEY", "")
    retry = options.retry if options.retry is not None else (60.0 if options.out else 5.0)
    client = Client(
        options.url,
        options.model,
        token,
        options.timeout,
        key_file=options.key_file,
        retry_seconds=retry,
        cacert=options.cacert,
    )
    if next(find_images(options.paths), None) is None:
        raise ValueError(f"{options.paths[0]}: holds no images ({', '.join(SUFFIXES)})")
    if options.out:
        with _locked(_part(options.out)) as file:
            return _to_file(client, options, file)
    refused = 0
    for row in classify_files(client, find_images(options.paths), threads=options.threads):
        print(row.as_json(), end="", flush=True)
        refused += bool(row.error)
    return 1 if refused else 0


def _to_file(client: Client, options: argparse.Namespace, file: BinaryIO) -> int:
    out, part, images = options.out, _part(options.out), find_images(options.paths)
    if _has_rows(part) and not options.resume:
        raise ValueError(f"{out}: an earlier run was stopped")
    done, refused, model = _keep(part, images)
    started = time.monotonic()

    def write(line: str) -> None:
        file.write(line.encode("utf-8", "surrogateescape"))  # names may be any bytes
        file.flush()  # a killed command loses no row

    with _Progress(sum(1 for _ in find_images(options.paths)), done) as progress:
        if out.suffix == ".csv" and not part.stat().st_size:
            write(_csv_line(*HEADER))
        for row in classify_files(client, images, threads=options.threads):
            model = _same_model(model, row)
            write(row.as_csv() if out.suffix == ".csv" else row.as_json())
            refused += bool(row.error)
            progress.step()
    os.fsync(file.fileno())
    part.replace(out)
    print(f"{out}: {progress.done} images, {refused} refused, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if refused else 0


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Opens the file for this command alone, to append; it is removed again if it stays empty.

    Raises:
        InUse: another command writes it.
    """
    with part.open("ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), part.stat()):
                raise FileNotFoundError  # it has got its final name in between, and now another has this one
        except (BlockingIOError, FileNotFoundError):
            raise InUse(f"{part}: another classify.py writes it; wait for its end, or name another --out") from None
        try:
            yield file
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def _same_model(model: str, row: Row) -> str:
    """The model of the rows so far, and of this one; empty while no image was classified.

    Raises:
        ValueError: another model has made a prediction.
    """
    if row.error or model in ("", row.model):
        return model or row.model
    raise ValueError(
        f"{row.image} was classified by {row.model}, the images before by {model}, and one file holds the "
        f"predictions of one model; ask for that version, if it is still served, as --model {model.partition('@')[0]}"
    )


def _part(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _has_rows(part: Path) -> bool:
    return part.exists() and any(_whole_rows(part))


def _keep(part: Path, images: Iterator[Path]) -> tuple[int, int, str]:
    """Cuts off what is not whole rows, and takes the images of the rows from `images`.

    Returns:
        How many rows there are, how many of them are errors, and the model that classified the others.

    Raises:
        ValueError: the rows are not those of `images`, or were written by another version of this program.
    """
    with part.open("rb") as file:
        if part.name.endswith(".csv.part") and not _csv_line(*HEADER).encode().startswith(file.readline()):
            raise ValueError(f"{part}: {OTHER_VERSION}")
    done, refused, model, size = 0, 0, "", 0
    for row, end in _whole_rows(part):
        expected = next(images, "nothing")
        if row.image != str(expected):
            raise ValueError(
                f"row {done + 1} of {part} is {row.image} where {expected} is now; name the same, unchanged PATH"
            )
        if not row.error and not row.model:
            raise ValueError(f"{part}: {OTHER_VERSION}")
        model = _same_model(model, row)
        done, refused, size = done + 1, refused + bool(row.error), end
    os.truncate(part, size)
    return done, refused, model


def _whole_rows(part: Path) -> Iterator[tuple[Row, int]]:
    """Each row without its probabilities, and the offset of its end, up to the first that is not whole."""
    with part.open("rb") as file:
        try:
            yield from (_csv_rows if part.name.endswith(".csv.part") else _json_rows)(file)
        except (csv.Error, ValueError, KeyError, TypeError):  # half of a row, or what a broken disk made of one
            return


def _json_rows(file: Iterable[bytes]) -> Iterator[tuple[Row, int]]:
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
        values = json.loads(line)
        model = values["model"] if "predictions" in values else ""  # of an earlier version: `_keep` says so
        yield Row(values["image"], {}, values.get("error", ""), model), end


def _csv_rows(file: Iterable[bytes]) -> Iterator[tuple[Row, int]]:
    end, last = 0, b""
    csv.field_size_limit(2 * LARGEST_RESPONSE)

    def lines() -> Iterator[str]:
        nonlocal end, last
        for last in file:
            end += len(last)
            yield last.decode("utf-8", "surrogateescape")

    rows = csv.reader(lines(), strict=True)  # takes no line ahead; strict: a file that ends within quotes is an error
    next(rows, None)  # the header
    for image, _, _, error, _, *model in rows:
        if not last.endswith(b"\r\n"):
            return
        yield Row(image.removeprefix("'"), {}, error, *(name.removeprefix("'") for name in model)), end


def _csv_line(*fields: object) -> str:
    line = io.StringIO(newline="")
    csv.writer(line).writerow([_cell(field) if isinstance(field, str) else field for field in fields])
    return line.getvalue()


def _cell(text: str) -> str:
    """What no spreadsheet takes for a formula. One ' at its beginning is not part of the text."""
    return f"'{text}" if text.startswith(FORMULA) else text


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
            print(f"{self.done} of {self.total} images, {rate:.0f} a second", file=sys.stderr, flush=True)
            self._next = now + 10


def _bar(total: int, done: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit="image")


if __name__ == "__main__":
    status = main()
    if status > 1:
        os._exit(status)  # at once, though threads may wait for a response
    sys.exit(status)
