"""What a request holds, and how its answer is written: the shapes of bodies, without images or networks.

A parsed request is (shape, images by name), where an image is the bytes of a file, an array of pixels, or the
ImageError that stands for it. The shapes:

    one          an image: {label: probability, …}
    fields       several multipart fields: {field: answer, …}
    instances    KServe v1: {"predictions": [answer, …]}
    inputs:ID    KServe v2: {"outputs": [labels, probabilities], …}, with the request's own id
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import string
import warnings
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from handler import errors
from handler.errors import SHAPES, TooMany
from predictor.pillow_preprocessing import ImageError

ImageInput = bytes | np.ndarray | ImageError
Answer = dict[str, Any]

MAX_NAME = 1000  # characters of an id or a field's name, which the answer repeats
VALUES = 40  # values of JSON, beside a tensor's numbers, for each image that a request may hold: the shapes need five

_NUMBERS = re.compile(rb'("data"\s*:\s*)(\[[\[\]0-9eE+\-.,\s]*\])')  # a tensor: flat or nested numbers
_BRACKETS = bytes.maketrans(b"[]", b"  ")


def parse(request: Mapping[str, Any], json_fields: Container[str], most: int) -> tuple[str, dict[str, ImageInput]]:
    """The shape of the answer and the images by name.

    At most `most` images are made of a body, and parsing takes a few times its bytes in memory, whatever it holds: the
    values of JSON are counted in the bytes, before any object is made of them.

    Args:
        request: field name to its bytes; or to a value, where TorchServe has decoded JSON.
        json_fields: the names of the fields whose content type says that they are JSON.
        most: images of one request.
    """
    if any(len(name) > MAX_NAME for name in request):
        return "one", {"": errors.too_long("a field's name", MAX_NAME)}
    try:
        if len(request) > 1:
            _check_count(len(request), most)
            return "fields", {
                name: _image(_value(body, name in json_fields, most)[0]) for name, body in request.items()
            }
        for name, body in request.items():
            value, numbers = _value(body, name in json_fields, most)
            return _of_value(value, numbers, most)
        return "one", {"": _image(b"")}
    except TooMany as error:
        return "one", {"": errors.too_many_images(error)}


def _value(body: Any, is_json: bool, most: int) -> tuple[Any, bytes]:
    """What a body holds: an image's bytes, the value of JSON, or an ImageError; and the numbers of a tensor in it.

    Raises:
        TooMany.
    """
    if not isinstance(body, (bytes, bytearray)):
        body, is_json = json.dumps(body).encode(), True
    if body[:64].strip()[:1] not in (b"{", b"["):  # with which no image begins
        return _scalar(body) if is_json else bytes(body), b""
    numbers = b""
    if found := _NUMBERS.search(body):
        numbers = found[2]
        body = b"".join((body[: found.start(2)], b"[]", body[found.end(2) :]))
    if body.count(b"[") > VALUES * most:
        return errors.bad_json(f"the body holds {body.count(b'['):,} lists; {SHAPES}"), b""
    if max(body.count(b"{"), body.count(b","), body.count(b'"') // 2) > VALUES * most:
        raise TooMany(f"the body holds more values of JSON than {most} images need, and no more are accepted")
    try:
        return json.loads(body), numbers
    except (ValueError, RecursionError) as error:
        return errors.bad_json(f"the body is not JSON ({error})"), b""


def _scalar(body: bytes) -> Any:
    """A text, number or the like; or an image, whose content type is wrong."""
    try:
        return json.loads(body)
    except ValueError:
        return bytes(body)


def _of_value(value: Any, numbers: bytes, most: int) -> tuple[str, dict[str, ImageInput]]:
    if isinstance(value, dict) and isinstance(value.get("instances"), list):
        _check_count(len(value["instances"]), most)
        return _several("instances", [_image(instance) for instance in value["instances"]], "instances")
    if isinstance(value, dict) and isinstance(value.get("inputs"), list):
        return _inputs(value, numbers, most)
    return "one", {"": _image(value)}


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise TooMany(f"{count:,} images in a request, and at most {most} are accepted")


def answer(
    shape: str, outcomes: Mapping[str, Answer | ImageError], model: str, version: str
) -> tuple[Answer, str | None]:
    """The body of an answer as a value for JSON, and what failed it: None if any image was good.

    An image's error stands where its prediction would. KServe v2 has no room for that: there one fails them all.
    """
    if shape == "one" and isinstance(outcome := outcomes[""], dict):  # nearly all
        return outcome, None
    refused = [outcome for outcome in outcomes.values() if isinstance(outcome, ImageError)]
    is_v2 = shape.startswith("inputs:")
    if refused and (is_v2 or len(refused) == len(outcomes)):
        body = errors.as_body(refused[0])
        return ({**body, "error": body["message"]} if is_v2 else body), refused[0].cause
    if is_v2:
        request_id = shape.removeprefix("inputs:")
        return {"model_name": model, "model_version": version, "id": request_id, "outputs": _outputs(outcomes)}, None
    values = {name: errors.as_body(it) if isinstance(it, ImageError) else it for name, it in outcomes.items()}
    return ({"predictions": list(values.values())} if shape == "instances" else values), None


def _image(value: Any) -> ImageInput:
    """The bytes of one field or instance, or its ImageError."""
    if isinstance(value, str):
        return value.encode(errors="replace")  # JSON may hold halves of UTF-16 pairs, which UTF-8 cannot
    if isinstance(value, (bytes, ImageError)):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("b64"), str):
        return errors.bad_json()
    return _from_base64(value["b64"])


def _from_base64(text: str) -> ImageInput:
    try:
        return base64.b64decode(text.encode("ascii").translate(None, string.whitespace.encode()), validate=True)
    except (binascii.Error, ValueError) as error:
        return errors.bad_base64(error)


def _several(shape: str, images: list[ImageInput], field: str) -> tuple[str, dict[str, ImageInput]]:
    if not images:
        return "one", {"": errors.empty_list(field)}
    return shape, {str(i): image for i, image in enumerate(images)}


def _inputs(value: Answer, numbers: bytes, most: int) -> tuple[str, dict[str, ImageInput]]:
    """KServe v2 (the Open Inference Protocol): one input, BYTES [N] as base64 or UINT8 [N, H, W, 3], RGB.

    Args:
        numbers: the `data` of UINT8, as text; in `value` they are left out.
    """
    request_id = str(value.get("id", ""))
    if len(request_id) > MAX_NAME:
        return "inputs:", {"": errors.too_long("'id'", MAX_NAME)}
    shape = f"inputs:{request_id}"
    wrong = errors.bad_json(errors.BAD_INPUTS)
    match value["inputs"]:
        case [{"datatype": "BYTES", "data": [*texts]}] if all(isinstance(text, str) for text in texts) and (
            texts or not re.search(rb"\d", numbers)
        ):
            _check_count(len(texts), most)
            return _several(shape, [_from_base64(text) for text in texts], "inputs")
        case [{"datatype": "UINT8", "shape": [int(n), int(h), int(w), 3], "data": []}] if min(n, h, w) > 0:
            _check_count(n, most)
            pixels = _pixels(numbers, (int(n), int(h), int(w), 3))  # JSON's true is an int too
            return (shape, {"": wrong}) if pixels is None else _several(shape, list(pixels), "inputs")
    return shape, {"": wrong}


def _pixels(text: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
    """Numbers, flat or nested, as uint8; None unless they are that many, whole and from 0 to 255."""
    if text.count(b",") + 1 != math.prod(shape):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy warns of text that is not a number, and returns those before it
            values = np.fromstring(text.translate(_BRACKETS), dtype=np.int64, sep=",")
    except (ValueError, DeprecationWarning):
        return None
    if values.size != math.prod(shape) or values.min() < 0 or values.max() > 255:
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
