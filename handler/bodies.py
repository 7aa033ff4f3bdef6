"""What a request holds, and how its answer is written: the shapes of bodies, without pictures or networks.

A parsed request is (shape, pictures by name), where a picture is the bytes of a file, an array of pixels, or the
PictureError that stands for it. The shapes:

    one          a picture: {label: probability, …}
    fields       several multipart fields: {field: answer, …}
    instances    KServe v1: {"predictions": [answer, …]}
    inputs:ID    KServe v2: {"outputs": [labels, probabilities], …}, with the request's own id
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pictures import PictureError

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
    "no_time": (503, "Service Unavailable"),  # the server's fault, and asking again may help
}

Picture = bytes | np.ndarray | PictureError
Answer = dict[str, Any]

MAX_NAME = 1000  # characters of an id or a field's name, which the answer repeats
SHAPES = 'send {"b64": "…"} or {"instances": [{"b64": "…"}, …]}, with base64 as text'


def parse(request: Mapping[str, Any]) -> tuple[str, dict[str, Picture]]:
    """The shape of the answer and the pictures by name.

    Args:
        request: field name to what TorchServe made of the field: bytes, or for JSON and text bodies the value or text.
    """
    if any(len(name) > MAX_NAME for name in request):
        return "one", {"": PictureError("bad_json", f"a field's name has more than {MAX_NAME:,} characters")}
    if len(request) > 1:
        return "fields", {name: _picture(value) for name, value in request.items()}
    value = next(iter(request.values()), b"")
    if isinstance(value, (bytes, bytearray, str)):
        start: bytes | str = value[:64].strip()[:1]
        if start not in (b"{", b"[", "{", "["):  # no picture begins so
            return "one", {"": _picture(value)}
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            return "one", {"": PictureError("bad_json", f"the body is not JSON ({error})")}
    if isinstance(value, dict) and isinstance(value.get("instances"), list):
        return _several("instances", [_picture(instance) for instance in value["instances"]], "instances")
    if isinstance(value, dict) and isinstance(value.get("inputs"), list):
        return _inputs(value)
    return "one", {"": _picture(value)}


def answer(
    shape: str, outcomes: Mapping[str, Answer | PictureError], model: str, version: str
) -> tuple[Answer, str | None]:
    """The body of an answer as a value for JSON, and what failed it: None if any picture was good.

    A picture's error stands in the place of its answer. KServe v2 has no place for that: there one fails them all.
    """
    if shape == "one" and isinstance(outcome := outcomes[""], dict):  # nearly all
        return outcome, None
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, PictureError)]
    is_v2 = shape.startswith("inputs:")
    if errors and (is_v2 or len(errors) == len(outcomes)):
        body = as_error(errors[0])
        return ({**body, "error": body["message"]} if is_v2 else body), errors[0].cause
    if is_v2:
        request_id = shape.removeprefix("inputs:")
        return {"model_name": model, "model_version": version, "id": request_id, "outputs": _outputs(outcomes)}, None
    values = {name: as_error(it) if isinstance(it, PictureError) else it for name, it in outcomes.items()}
    return ({"predictions": list(values.values())} if shape == "instances" else values), None


def as_error(error: PictureError) -> Answer:
    return {"code": STATUSES[error.cause][0], "type": error.cause, "message": str(error)}


def _picture(value: Any) -> Picture:
    """The bytes of one field or instance, or its PictureError."""
    if isinstance(value, str):
        return value.encode(errors="replace")  # JSON may hold halves of UTF-16 pairs, which UTF-8 cannot
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, dict) or not isinstance(value.get("b64"), str):
        return PictureError("bad_json", SHAPES)
    return _from_base64(value["b64"])


def _from_base64(text: str) -> Picture:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return PictureError("bad_base64", f"'b64' is not base64 ({error}); send it without a data: prefix")


def _several(shape: str, pictures: list[Picture], field: str) -> tuple[str, dict[str, Picture]]:
    if not pictures:
        return "one", {"": PictureError("empty", f"'{field}' is empty; send at least one picture")}
    return shape, {str(i): picture for i, picture in enumerate(pictures)}


def _inputs(value: Answer) -> tuple[str, dict[str, Picture]]:
    """KServe v2 (the Open Inference Protocol): one input, BYTES [N] as base64 or UINT8 [N, H, W, 3], RGB."""
    request_id = str(value.get("id", ""))
    if len(request_id) > MAX_NAME:
        return "inputs:", {"": PictureError("bad_json", f"'id' has more than {MAX_NAME:,} characters")}
    shape = f"inputs:{request_id}"
    wrong = PictureError(
        "bad_json",
        "'inputs' must be one of BYTES, shape [N], with base64 texts as 'data', or one of UINT8, shape [N, H, W, 3]",
    )
    match value["inputs"]:
        case [{"datatype": "BYTES", "data": [*texts]}] if all(isinstance(text, str) for text in texts):
            return _several(shape, [_from_base64(text) for text in texts], "inputs")
        case [{"datatype": "UINT8", "shape": [int(n), int(h), int(w), 3], "data": [*data]}] if min(n, h, w) > 0:
            pixels = _pixels(data, (int(n), int(h), int(w), 3))  # JSON's true is an int too
            return (shape, {"": wrong}) if pixels is None else _several(shape, list(pixels), "inputs")
    return shape, {"": wrong}


def _pixels(data: list[Any], shape: tuple[int, ...]) -> np.ndarray | None:
    """Numbers, flat or nested, as uint8; None unless they are that many, whole and from 0 to 255."""
    values = np.array(data, dtype=object)  # one long text among numbers would have each of them take as many bytes
    if values.size != math.prod(shape) or set(map(type, values.flat)) != {int}:
        return None
    if values.min() < 0 or values.max() > 255:
        return None
    return values.astype(np.uint8).reshape(shape)


def _outputs(answers: Mapping[str, Any]) -> list[Answer]:
    """All of `answers` are {label: probability, …} of the same length K: two outputs of shape [N, K]."""
    size = [len(answers), len(next(iter(answers.values())))]
    labels = [label for one in answers.values() for label in one]
    probabilities = [value for one in answers.values() for value in one.values()]
    return [
        {"name": "labels", "shape": size, "datatype": "BYTES", "data": labels},
        {"name": "probabilities", "shape": size, "datatype": "FP32", "data": probabilities},
    ]
