"""The few lines that docs/onnx.md and the card print for ONNX Runtime: they see an image as the handler does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image, ImageOps

from predictor.pillow_preprocessing import crop, decode
from predictor.spec import ModelSpec
from tests.conftest import PROJECT
from tests.icc import P3
from tests.kinds import save

# What a reader adds to look closer: all probabilities. Both snippets end with `probabilities` of one image.
LOOK = "\nprint(*probabilities[0])\n"


def on_its_side(digit: Image.Image) -> bytes:
    """A JPEG file whose pixels lie on their side and whose EXIF says so (orientation 6), as telephones write them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(digit.convert("RGB").transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def on_nothing(digit: Image.Image) -> bytes:
    """A PNG file whose background is transparent, over a colour that must not show."""
    pixels = np.full((*digit.size[::-1], 4), 255, np.uint8)
    pixels[..., :3] = np.asarray(digit.convert("RGB"))
    pixels[digit.height // 2 :, :, 3] = 0
    return save(Image.fromarray(pixels), "PNG")


def in_display_p3(digit: Image.Image) -> bytes:
    """A JPEG file in the colours of many phones, whose numbers mean others in sRGB."""
    return save(ImageOps.colorize(digit, (20, 60, 120), (90, 220, 100)), "JPEG", icc_profile=P3, quality=95)


IMAGES = {"jpeg on its side": on_its_side, "png with alpha": on_nothing, "jpeg of display p3": in_display_p3}


def snippet_of_docs_onnx(body: bytes, exported: Path, folder: Path) -> str:
    (folder / "runs" / "digits" / "samples").mkdir(parents=True)
    (folder / "runs" / "digits" / "export").symlink_to(exported)
    (folder / "runs" / "digits" / "samples" / "7-0.png").write_bytes(body)  # Pillow looks at the content
    page = (PROJECT / "docs" / "onnx.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return code


def snippet_of_the_card(body: bytes, exported: Path, folder: Path) -> str:
    shutil.copy(exported / "digits.pixels.onnx", folder)
    (folder / "image.jpg").write_bytes(body)
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "MODEL_CARD.md").read_text(), flags=re.DOTALL)
    return code


@pytest.mark.parametrize("snippet", [snippet_of_docs_onnx, snippet_of_the_card])
@pytest.mark.parametrize("kind", IMAGES)
def test_a_snippet_answers_as_the_handler_would(snippet, kind, run, exported, tmp_path):
    digit = Image.open(run / "samples" / "7-0.png").convert("L").resize((60, 48))
    body = IMAGES[kind](digit)
    code = snippet(body, exported, tmp_path) + LOOK
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = np.array(done.stdout.splitlines()[-1].split(), dtype=np.float32)
    spec = ModelSpec.load(run)
    session = onnxruntime.InferenceSession(exported / "digits.crops.onnx", providers=["CPUExecutionProvider"])

    def answer(image: Image.Image) -> np.ndarray:
        return session.run(["probabilities"], {"images": crop(image, spec.rule)[None]})[0][0]

    expected = answer(decode(body))
    with (tmp_path / "naive").open("wb+") as file:
        file.write(body)
        naive = answer(Image.open(file).convert("RGB"))
    assert np.abs(naive - expected).max() > 0.01  # so that this test can tell
    np.testing.assert_allclose(got, expected, atol=1e-3)
