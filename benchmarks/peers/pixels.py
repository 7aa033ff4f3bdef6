"""The pixel rule of the spec, as a peer's user would write it with Pillow."""

import io

import numpy as np
from PIL import Image


def crop(body, spec):
    """uint8 (S, S, 3) of an image file."""
    size, resize = spec["height"], spec["resize"]  # square, bilinear and a crop, as in every model that is measured
    image = Image.open(io.BytesIO(body)).convert("RGB")
    side = max(1, (2 * min(image.size) * size + resize) // (2 * resize))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
