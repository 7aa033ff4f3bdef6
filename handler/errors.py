"""Every refusal that a client can get: its type, its status, and what the handler says of it.

What is wrong with an image is said by predictor/, and its causes stand in the table too. An error on the wire reads
`{"code": 422, "type": "truncated", "message": "…"}`.
"""

from __future__ import annotations

from typing import Any

from predictor.pillow_preprocessing import ImageError

# By an error's type: status and phrase, over REST as over gRPC.
STATUSES = {
    "empty": (400, "Bad Request"),
    "bad_json": (400, "Bad Request"),
    "bad_base64": (400, "Bad Request"),
    "explanations_off": (403, "Forbidden"),
    "too_many_pixels": (413, "Payload Too Large"),
    "too_many_images": (413, "Payload Too Large"),
    "not_an_image": (415, "Unsupported Media Type"),
    "unsupported_kind": (415, "Unsupported Media Type"),
    "truncated": (422, "Unprocessable Entity"),
    "too_slow": (422, "Unprocessable Entity"),
    "no_time": (503, "Service Unavailable"),  # the server's fault, and asking again may help
}
UNHEALTHY = (503, "Service Unavailable")

SHAPES = 'send {"b64": "…"} or {"instances": [{"b64": "…"}, …]}, with base64 as text'
BAD_INPUTS = (
    "'inputs' must be one of BYTES, shape [N], with base64 texts as 'data', or one of UINT8, shape [N, H, W, 3]"
)


class TooMany(Exception):
    """More images in a request than are accepted."""


def as_body(error: ImageError) -> dict[str, Any]:
    """What a client reads."""
    return {"code": STATUSES[error.cause][0], "type": error.cause, "message": str(error)}


def empty() -> ImageError:
    return ImageError(
        "empty",
        "the request has no bytes; send an image, or the header `health: True` to ask whether the model is healthy",
    )


def empty_list(field: str) -> ImageError:
    return ImageError("empty", f"'{field}' is empty; send at least one image")


def bad_json(message: str = SHAPES) -> ImageError:
    return ImageError("bad_json", message)


def too_long(what: str, most: int) -> ImageError:
    hint = "; was JSON sent as a form? Name it: Content-Type: application/json" if what.startswith("a field") else ""
    return ImageError("bad_json", f"{what} has more than {most:,} characters{hint}")


def bad_base64(error: Exception) -> ImageError:
    return ImageError("bad_base64", f"'b64' is not base64 ({error}); send it without a data: prefix")


def too_many_images(error: TooMany) -> ImageError:
    way_out = "send several requests, or have the operator raise `max_images` in model-config.yaml"
    return ImageError("too_many_images", f"{error}; {way_out}")


def explanations_off() -> ImageError:
    return ImageError(
        "explanations_off",
        "explanations are off; the operator can switch them on with `explain: true` in model-config.yaml",
    )


def no_time(seconds: float) -> ImageError:
    return ImageError("no_time", f"the images of a batch have {seconds:g} s; ask again, for fewer at once")


def no_time_to_explain(seconds: float) -> ImageError:
    return ImageError("no_time", f"explanations of a batch have {seconds:g} s; ask for fewer at once")


def no_memory_to_explain() -> ImageError:
    return ImageError("no_time", "there is no memory for an explanation now; ask again")
