"""The TorchServe handler: images in, `{label: probability}` out, best first. Each image succeeds or fails alone.

A request to `/predictions/NAME` is one of
- an image file as the raw body, or one multipart field: answered `{label: probability, …}`;
- several multipart fields with different names: `{field: answer, …}` (of a repeated name TorchServe keeps the last);
- JSON `{"b64": "…"}`: as a raw body;
- JSON `{"instances": [{"b64": "…"}, …]}`: `{"predictions": [answer, …]}`, as KServe v1 clients expect;
- JSON `{"inputs": [{"datatype": "BYTES", …}]}`: `{"outputs": […]}`, as KServe v2 clients expect;
- nothing, with the header `health: True`: whether the model is healthy.

Where a request holds several images, a bad one has its error where its prediction would be; the status is 200 if any
image was good. Otherwise the status is that of the first error, from handler/errors.py. An error reads
`{"code": 422, "type": "truncated", "message": "…"}`.

The same to `/explanations/NAME` gives an attribution map of the top label: a PNG, or where there are several images
JSON with `label`, `probability` and `png` (base64). Off unless model-config.yaml says `explain: true`: an explanation
costs as much as a hundred predictions, and the predictions behind it wait.

TorchServe loads this file from the archive and wants exactly one class in it. It imports nothing but installed
packages and the packages that lie beside it there. It does not inherit from TorchServe's BaseHandler, which would load
PyTorch, ONNX Runtime and OpenVINO into every worker.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

_HERE = Path(__file__).resolve().parent
if (_HERE / "MAR-INF").is_dir():  # in an unpacked archive, whose packages go before those of the caller's PYTHONPATH
    sys.path.insert(0, str(_HERE))

from handler import errors, explanations, request_parsing, worker_startup
from handler.prometheus_metrics import Measures
from handler.request_parsing import ImageInput
from handler.torchserve_protocol import Context, Fields, Headers
from predictor import backends
from predictor.decoder_process import DecoderProcess
from predictor.pillow_preprocessing import MAX_PIXELS, NO_MEMORY, ImageError
from predictor.predictor import Prediction, Predictor, setting

CHUNK = 64  # images decoded and put through the network at a time: bounds the memory of requests with many
STAGES = ("decode", "forward", "post")  # of which the time is told
MAX_IMAGES = 256  # of one request: a few kilobytes of tiny images could otherwise block a worker for minutes
DECODE_SECONDS = 12.0  # for all images of a batch: TorchServe replaces a worker that takes longer than 30
SEVERAL_SECONDS = 1.0  # after which those of requests with several are put off: 256 may be large, and neighbours wait
FORWARD_SECONDS = 20.0  # after a batch has begun nothing more is put through the network, nor explained
MAX_EXPLAINED = 8  # of one request, whatever max_images says: each costs as much as a hundred predictions

OneOfBatch = tuple[ImageInput, bool]  # an image, and whether it is one of several in its request
Outcome = dict[str, Any] | ImageError  # a prediction or an explanation, or the error that stands for it
Parsed = tuple[str, str, dict[str, ImageInput]]  # what is asked for, the shape of the answer, the images by name


class ClassifierHandler:
    """Decodes, batches, infers and answers. The settings are those of model-config.yaml."""

    started = float("inf")  # time.monotonic() of the batch

    def initialize(self, context: Context) -> None:
        """Reads the settings, loads the predictor, and checks it, so that the first client does not wait.

        Raises:
            ValueError: the archive or model-config.yaml is wrong, or a golden image is answered wrongly; TorchServe
                logs it and does not serve the model.
        """
        settings, system = context.model_yaml_config or {}, context.system_properties
        folder, model = Path(system["model_dir"]), context.manifest["model"]
        gpu = system.get("gpu_id")
        self.max_images = setting(settings, "max_images", MAX_IMAGES)
        max_pixels = setting(settings, "max_pixels", MAX_PIXELS)
        is_limited = system.get("limit_max_image_pixels", True)  # the operator may lift it in config.properties
        self.decoder = DecoderProcess(max_pixels if is_limited else None) if os.name == "posix" else None
        self.predictor = Predictor.load(folder, Path(model["serializedFile"]).stem, settings, gpu=gpu)
        if not is_limited:
            self.predictor.max_pixels = None
        self._describe(folder, context)
        decoders = setting(settings, "decode_threads", 1 if gpu is None else min(8, os.cpu_count() or 1))
        self.pool = ThreadPoolExecutor(decoders) if decoders > 1 else None
        self.explainer: explanations.Explainer | None = None
        if _switch(settings, "explain", False):
            weights = folder / model["serializedFile"]
            self.explainer = explanations.Explainer(weights, gpu, setting(settings, "threads", 1))
        self.measures = Measures(context.metrics, self.model, self.version)
        self.measures.begin(errors.STATUSES, self.predictor.spec.labels, STAGES)
        self.batch: int = system.get("batch_size") or 1
        self._warm_up(self.batch)
        if complaint := self._check_golden():
            raise ValueError(complaint)
        if self.decoder:
            self.decoder.wait()  # it has started meanwhile
        worker_startup.tune(_switch(settings, "patch_worker", True))

    def _describe(self, folder: Path, context: Context) -> None:
        """What answers carry in their headers, and what the management port tells of the model."""
        spec, card = self.predictor.spec, folder / "MODEL_CARD.md"
        names = json.loads((folder / "index_to_name.json").read_text(encoding="utf-8"))
        if tuple(names.values()) != spec.labels:
            raise ValueError("index_to_name.json and spec.json name other labels; export the run again")
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        self.description = {**json.loads(spec.to_json()), "card": text}
        self.model: str = context.model_name
        self.version: str = context.manifest["model"]["modelVersion"]
        self.headers = {"x-model-version": self.version, "x-model-weights-sha256": spec.weights_sha256}

    def handle(self, requests: Sequence[Fields], context: Context) -> list[bytes]:
        """Answers a batch. Never raises for what a client sent, so no request pays for its neighbour.

        Args:
            requests: a dict for each request, field name to what TorchServe made of the field: bytes, or for JSON
                and text bodies the value or the text.

        Returns:
            A body for each request, JSON but for explanations; statuses and headers are set in `context`.
        """
        started, latest = time.perf_counter(), time.monotonic() + FORWARD_SECONDS
        seconds = dict.fromkeys(STAGES, 0.0)
        parsed = [self._parse(request, context, i) for i, request in enumerate(requests)]
        images = [(image, len(its) > 1) for _, _, its in parsed for image in its.values()]
        outcomes = self._classify(images, seconds)
        coming, until = iter(outcomes), min(latest, time.monotonic() + explanations.SECONDS)
        answers = []
        for i, (kind, shape, of_request) in enumerate(parsed):
            its: dict[str, Outcome] = {name: next(coming) for name in of_request}
            if kind == "explanation":
                its = {name: self._explain(of_request[name], outcome, until) for name, outcome in its.items()}
            answers.append(self._answer(kind, shape, its, context, i))
        seconds["post"] = time.perf_counter() - started - sum(seconds.values())
        self.measures.add(
            [outcome.cause if isinstance(outcome, ImageError) else "ok" for outcome in outcomes],
            [next(iter(outcome.items())) for outcome in outcomes if not isinstance(outcome, ImageError)],
            seconds,
        )
        return answers

    def _parse(self, request: Fields, context: Context, i: int) -> Parsed:
        """What is asked for (`prediction`, `explanation`, `description`, `health`), the shape and the images."""
        headers = context.get_all_request_header(i)
        if all(value == b"" for value in request.values()):
            kind = _asked_without_an_image(request, headers)
            return (kind, "one", {}) if kind else ("prediction", "one", {"": errors.empty()})
        json_fields = {name for name in request if _is_json(headers.get(name))}
        if headers.get("explain") != "True":
            return "prediction", *request_parsing.parse(request, json_fields, self.max_images)
        if self.explainer is None:
            return "explanation", "one", {"": errors.explanations_off()}
        return "explanation", *request_parsing.parse(request, json_fields, min(self.max_images, MAX_EXPLAINED))

    def _classify(self, images: Sequence[OneOfBatch], seconds: dict[str, float]) -> list[Prediction | ImageError]:
        """A prediction or an ImageError for each of `images`, in order. Adds to `seconds` what the stages took."""
        outcomes: list[Prediction | ImageError] = []
        last = time.perf_counter()
        latest = time.monotonic() + FORWARD_SECONDS
        self.started = time.monotonic()
        if self.decoder:
            self.decoder.begin_batch()
        for crops in self._decoded(images):
            decoded = time.perf_counter()
            outcomes += self._infer(crops, latest)
            seconds["decode"] += decoded - last
            last = time.perf_counter()
            seconds["forward"] += last - decoded
        return outcomes

    def _infer(self, crops: list[np.ndarray | ImageError], latest: float) -> Iterator[Prediction | ImageError]:
        """A prediction for each crop, in micro-batches of as many as export found a worker to answer in good time.

        Args:
            latest: time.monotonic() after which no other is begun.
        """
        good = [crop for crop in crops if not isinstance(crop, ImageError)]
        predictions: list[Prediction | ImageError] = []
        for start in range(0, len(good), self.batch):
            some = good[start : start + self.batch]
            is_late = time.monotonic() > latest
            predictions += (
                [errors.no_time(FORWARD_SECONDS)] * len(some) if is_late else self.predictor.infer(np.stack(some))
            )
        coming = iter(predictions)
        return (crop if isinstance(crop, ImageError) else next(coming) for crop in crops)

    def _decoded(self, images: Sequence[OneOfBatch]) -> Iterator[list[np.ndarray | ImageError]]:
        """Lists of at most CHUNK crops or ImageErrors; with threads, the next is on its way while one is used."""
        chunks = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
        if self.pool is None:
            yield from ([self._decode(*image) for image in chunk] for chunk in chunks)
            return
        coming: Iterator[np.ndarray | ImageError] | None = None
        for chunk in chunks:
            coming, ready = self.pool.map(self._decode, *zip(*chunk, strict=True)), coming
            if ready is not None:
                yield list(ready)
        if coming is not None:
            yield list(coming)

    def _decode(self, image: ImageInput, is_of_several: bool = False) -> np.ndarray | ImageError:
        """The crop of one image, uint8 (H, W, 3), or its ImageError."""
        if isinstance(image, ImageError):
            return image
        allowed = SEVERAL_SECONDS if is_of_several else DECODE_SECONDS
        if time.monotonic() > self.started + allowed:
            return errors.no_time(allowed)
        try:
            if isinstance(image, np.ndarray):
                return self.predictor.crop(image)
            return self.predictor.decode(image, self._read_elsewhere if self.decoder else None)
        except ImageError as error:
            return error.bare()
        except MemoryError:
            return ImageError("too_many_pixels", NO_MEMORY)

    def _read_elsewhere(self, file: bytes) -> np.ndarray:
        assert self.decoder is not None
        return self.decoder.read(file, self.predictor.spec.rule)

    def _explain(self, image: ImageInput, outcome: Outcome, until: float) -> Outcome:
        """Label, probability and PNG (bytes) of one image's explanation, or its ImageError."""
        if isinstance(outcome, ImageError):
            return outcome
        assert self.explainer is not None  # or `_parse` has refused it
        label, probability = next(iter(outcome.items()))
        pixels = self._decode(image)
        if isinstance(pixels, ImageError):
            return pixels
        try:
            attributions = self.explainer.attributions(pixels, self.predictor.spec.labels.index(label), until)
        except ImageError as error:
            return error.bare()
        except RuntimeError as error:
            if not backends.is_out_of_memory(error):
                raise
            return errors.no_memory_to_explain()
        return {"label": label, "probability": probability, "png": explanations.overlay(pixels, attributions)}

    def _answer(self, kind: str, shape: str, outcomes: dict[str, Outcome], context: Context, i: int) -> bytes:
        """The body of one request; sets its status and headers."""
        headers, content_type, status = self.headers, "application/json", None
        body: Any
        if kind == "description":
            body = self.description
        elif kind == "health":
            body, status = self._health()
        elif kind == "explanation" and shape == "one" and not isinstance(outcome := outcomes[""], ImageError):
            best = {"x-label": quote(outcome["label"]), "x-probability": f"{outcome['probability']:.6f}"}
            headers, content_type, body = {**headers, **best}, "image/png", outcome["png"]
        else:
            if kind == "explanation":
                shape = shape if shape in ("one", "fields") else "instances"
                outcomes = {name: _with_text(outcome) for name, outcome in outcomes.items()}
            body, cause = request_parsing.answer(shape, outcomes, self.model, self.version)
            status = errors.STATUSES[cause] if cause else None
        if status:
            context.set_response_status(*status, i)
        context.set_response_content_type(i, content_type)
        for name, value in headers.items():
            context.set_response_header(i, name, value)
        if _is_grpc(context.get_all_request_header(i)):
            context.set_response_header(i, "ts_stream_next", "false")  # or a StreamPredictions call kills the worker
        if isinstance(body, bytes):
            return body
        return json.dumps(body, ensure_ascii=False).encode(errors="replace")  # a request's id may hold anything

    def _health(self) -> tuple[dict[str, str], tuple[int, str] | None]:
        """A golden image through the whole of it: the body and, if it is answered wrongly, the status."""
        if complaint := self._check_golden(count=1):
            return {"status": "Unhealthy", "message": complaint}, errors.UNHEALTHY
        return {"status": "Healthy", "model": self.model, "version": self.version}, None

    def _check_golden(self, count: int | None = None) -> str:
        """What is wrong with the answers of the first `count` golden images, or all; empty if nothing is."""
        ratio, complaint = self.predictor.compare_golden(count)
        self.measures.gauge("classifier_golden_difference_ratio", ratio)
        return complaint

    def _warm_up(self, batch: int) -> None:
        """First calls are slow: TorchScript optimises in them, for each kind of shape, and Pillow loads its readers."""
        spec, file = self.predictor.spec, io.BytesIO()
        Image.new("RGB", (spec.width, spec.height)).save(file, "JPEG")
        self._decode(file.getvalue())
        for count in sorted({1, batch}):
            for _ in range(3):
                self.predictor.infer(np.zeros((count, spec.height, spec.width, 3), dtype=np.uint8))


def _asked_without_an_image(request: Fields, headers: Headers) -> str | None:
    """`description`, `health` or None.

    The method does not reach a worker, and TorchServe adds `content-length: 0` to a GET: it looks like an empty POST.
    So health is asked for by a header. A description is for the management key, so its header is not enough: of all
    requests only the management port's hold no field at all, unless they are an empty form, which names its type.
    """
    names = {name.lower(): value for name, value in headers.items()}
    if not request and names.get("describe") == "True" and "content-type" not in names:
        return "description"
    return "health" if str(names.get("health")).lower() == "true" else None


def _is_json(field: Any) -> bool:
    """`field`: what TorchServe says of a field, {"content-type": …}; a header of that name can take its place."""
    return isinstance(field, dict) and field.get("content-type", "").partition(";")[0] == "application/json"


def _is_grpc(headers: Headers) -> bool:
    """Over REST, TorchServe adds the length of the body where the client does not name it.

    A field may have any name, this one too: what stands under it is then no text, but {"content-type": …}.
    """
    if isinstance(headers.get("Content-Length", headers.get("content-length")), str):  # nearly all, and fast
        return False
    return not any(isinstance(value, str) and name.lower() == "content-length" for name, value in headers.items())


def _with_text(outcome: Outcome) -> Outcome:
    if isinstance(outcome, ImageError):
        return outcome
    return {**outcome, "png": base64.b64encode(outcome["png"]).decode()}


def _switch(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"model-config.yaml: '{name}' is {value!r}; it must be true or false")
    return value
