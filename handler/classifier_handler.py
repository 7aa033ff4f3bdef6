"""The TorchServe handler: pictures in, `{label: probability}` out, best first. Each picture succeeds or fails alone.

A request is one of
- a picture file as the raw body, or one multipart field: answered `{label: probability, …}`;
- several multipart fields with different names: `{field: answer, …}` (of a repeated name TorchServe keeps the last);
- JSON `{"b64": "…"}`: as a raw body;
- JSON `{"instances": [{"b64": "…"}, …]}`: `{"predictions": [answer, …]}`, as KServe v1 clients expect.

Where a request holds several pictures, a bad one has its error in the place of its answer; the status is 200 if any
picture was good. Otherwise the status is that of the first error, from the table below. An error reads
`{"code": 422, "type": "truncated", "message": "…"}`.

TorchServe loads this file from the archive and wants exactly one class in it. It imports nothing but installed
packages and the files that lie beside it there: `pictures.py`, `backends.py` and `worker.py`. It does not inherit from
TorchServe's BaseHandler, which would load PyTorch, ONNX Runtime and OpenVINO into every worker.
"""

import base64
import binascii
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import backends
import numpy as np
import worker
from pictures import MAX_PIXELS, PictureError, crop, decode
from PIL import Image

# What a client's mistake is answered with, over REST as over gRPC.
STATUSES = {
    "empty": (400, "Bad Request"),
    "bad_json": (400, "Bad Request"),
    "bad_base64": (400, "Bad Request"),
    "too_many_pixels": (413, "Payload Too Large"),
    "too_many_pictures": (413, "Payload Too Large"),
    "not_a_picture": (415, "Unsupported Media Type"),
    "unsupported_kind": (415, "Unsupported Media Type"),
    "truncated": (422, "Unprocessable Entity"),
    "no_explanations": (501, "Not Implemented"),
}

CHUNK = 64  # pictures decoded and put through the network at a time: bounds the memory of requests with many
MAX_PICTURES = 256  # of one request: a few kilobytes of tiny pictures could otherwise block a worker for minutes


class ClassifierHandler:
    """Decodes, batches, infers and answers. The settings are those of model-config.yaml."""

    def initialize(self, context):
        """Reads the settings and the spec, loads the backend, and warms up, so that the first client does not wait.

        Raises:
            ValueError: the archive or model-config.yaml is wrong; TorchServe logs it and does not serve the model.
        """
        settings, system = context.model_yaml_config or {}, context.system_properties
        folder, model = Path(system["model_dir"]), context.manifest["model"]
        self.topk = _setting(settings, "topk", 5)
        self.max_pixels = _setting(settings, "max_pixels", MAX_PIXELS)
        self.max_pictures = _setting(settings, "max_pictures", MAX_PICTURES)
        if not system.get("limit_max_image_pixels", True):
            self.max_pixels = None  # the operator lifted the limit in config.properties
        self.spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        names = json.loads((folder / "index_to_name.json").read_text(encoding="utf-8"))
        if list(names.values()) != self.spec["labels"]:
            raise ValueError("index_to_name.json and spec.json name other labels; export the run again")
        self.headers = {
            "x-model-version": model["modelVersion"],
            "x-model-weights-sha256": self.spec["weights_sha256"],
        }
        gpu = system.get("gpu_id")
        decoders = _setting(settings, "decode_threads", 1 if gpu is None else min(8, os.cpu_count() or 1))
        self.pool = ThreadPoolExecutor(decoders) if decoders > 1 else None
        self.classify_crops = backends.load(
            settings.get("backend", "torchscript"),
            folder,
            Path(model["serializedFile"]).stem,
            threads=_setting(settings, "threads", 1),
            gpu=gpu,
        )
        self._warm_up(system.get("batch_size") or 1)
        worker.tune()

    def handle(self, requests, context):
        """Answers a batch. Never raises for what a client sent, so no request pays for its neighbour.

        Args:
            requests: a dict for each request, field name to what TorchServe made of the field: bytes, or for JSON
                and text bodies the value or the text.

        Returns:
            A JSON body for each request; statuses and headers are set in `context`.
        """
        parsed = [self._parse(request, context, i) for i, request in enumerate(requests)]
        outcomes = iter(self._classify([body for _, bodies in parsed for body in bodies.values()]))
        return [
            self._answer(shape, {name: next(outcomes) for name in bodies}, context, i)
            for i, (shape, bodies) in enumerate(parsed)
        ]

    def _parse(self, request, context, i):
        """What the request asks for and its pictures, as bytes or as the error that stands for them."""
        if context.get_request_header(i, "describe") == "True":
            return "describe", {}
        if context.get_request_header(i, "explain") == "True":
            return "one", {"": PictureError("no_explanations", "this model answers predictions only")}
        shape, bodies = parse(request)
        if len(bodies) > self.max_pictures:
            message = f"{len(bodies)} pictures in a request; at most {self.max_pictures} are accepted, send several"
            return "one", {"": PictureError("too_many_pictures", message)}
        return shape, bodies

    def _classify(self, bodies):
        """An answer or a PictureError for each of `bodies`, in order."""
        outcomes = []
        for chunk in self._decoded(bodies):
            good = [i for i, outcome in enumerate(chunk) if not isinstance(outcome, PictureError)]
            answers = self._infer(np.stack([chunk[i] for i in good])) if good else []
            for i, answer in zip(good, answers, strict=True):
                chunk[i] = answer
            outcomes += chunk
        return outcomes

    def _decoded(self, bodies):
        """Lists of at most CHUNK crops or PictureErrors; with threads, the next is on its way while one is used."""
        chunks = (bodies[start : start + CHUNK] for start in range(0, len(bodies), CHUNK))
        if self.pool is None:
            yield from ([self._decode(body) for body in chunk] for chunk in chunks)
            return
        coming = None
        for chunk in chunks:
            coming, ready = self.pool.map(self._decode, chunk), coming
            if ready is not None:
                yield list(ready)
        if coming is not None:
            yield list(coming)

    def _decode(self, body):
        """The crop of one picture, uint8 (S, S, 3), or its PictureError."""
        if isinstance(body, PictureError):
            return body
        try:
            return crop(decode(body, self.max_pixels), self.spec["size"], self.spec["resize"])
        except PictureError as error:
            return error

    def _infer(self, crops):
        """Crops uint8 (N, S, S, 3) to N dicts of the best labels and their probabilities."""
        labels = self.spec["labels"]
        probabilities = self.classify_crops(crops)  # float32 (N, C)
        places = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.topk]
        values = np.take_along_axis(probabilities, places, axis=1)
        return [
            {labels[place]: value for place, value in zip(row_places, row_values, strict=True)}
            for row_places, row_values in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def _answer(self, shape, outcomes, context, i):
        """The JSON body of one request; sets its status and headers."""
        errors = [outcome for outcome in outcomes.values() if isinstance(outcome, PictureError)]
        values = {name: _as_json(outcome) for name, outcome in outcomes.items()}
        if shape == "describe":
            body = self.spec
        elif shape == "one" or (errors and len(errors) == len(values)):
            body = next(iter(values.values()))
        else:
            body = {"predictions": list(values.values())} if shape == "predictions" else values
        if errors and len(errors) == len(values):
            code, phrase = STATUSES[errors[0].cause]
            context.set_response_status(code, phrase, i)
        context.set_response_content_type(i, "application/json")
        for name, value in self.headers.items():
            context.set_response_header(i, name, value)
        return json.dumps(body, ensure_ascii=False).encode()

    def _warm_up(self, batch):
        """First calls are slow: TorchScript optimises in them, for each kind of shape, and Pillow loads its readers."""
        size, file = self.spec["size"], io.BytesIO()
        Image.new("RGB", (size, size)).save(file, "JPEG")
        self._decode(file.getvalue())
        for count in sorted({1, batch}):
            for _ in range(3):
                self._infer(np.zeros((count, size, size, 3), dtype=np.uint8))


def parse(request):
    """The shape of the answer ("one", "fields" or "predictions") and the pictures by name.

    A picture is its bytes, or the PictureError that stands for it.
    """
    if len(request) > 1:
        return "fields", {name: _picture(value) for name, value in request.items()}
    value = next(iter(request.values()), b"")
    if isinstance(value, (bytes, bytearray, str)):
        if value[:64].strip()[:1] not in (b"{", b"[", "{", "["):  # no picture begins so
            return "one", {"": _picture(value)}
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            return "one", {"": PictureError("bad_json", f"the body is not JSON ({error})")}
    if isinstance(value, dict) and isinstance(value.get("instances"), list):
        pictures = {str(i): _picture(instance) for i, instance in enumerate(value["instances"])}
        if pictures:
            return "predictions", pictures
        return "one", {"": PictureError("empty", "'instances' is empty; send at least one picture")}
    return "one", {"": _picture(value)}


def _picture(value):
    """The bytes of one field or instance, or its PictureError."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, dict) or not isinstance(value.get("b64"), str):
        return PictureError("bad_json", 'send {"b64": "…"} or {"instances": [{"b64": "…"}, …]}, with base64 as text')
    try:
        return base64.b64decode("".join(value["b64"].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return PictureError("bad_base64", f"'b64' is not base64 ({error}); send it without a data: prefix")


def _as_json(outcome):
    if isinstance(outcome, PictureError):
        return {"code": STATUSES[outcome.cause][0], "type": outcome.cause, "message": str(outcome)}
    return outcome


def _setting(settings, name, default):
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"model-config.yaml: '{name}' is {value!r}; it must be a whole number above 0")
    return value
