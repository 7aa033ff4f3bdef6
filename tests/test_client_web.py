"""clients/web in headless Chromium: the page as people use it, its server, and its verification."""

from __future__ import annotations

import base64
import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from clients.web import serve, verify
from predictor.pillow_preprocessing import decode
from tests.conftest import label_of
from tests.icc import P3
from tests.kinds import GOOD, gradient, save
from tests.test_client_node import WEB, batches, install, readme_command, reference, save_batches

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

TOLERANCE = 1e-4  # probability, from the same pixels
JPEG_TOLERANCE = 5e-3  # the browser has a libjpeg of its own


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    install(WEB)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        path = verify.find_browser()
    except verify.Missing as error:
        pytest.skip(str(error))
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=verify.browser_options())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site(exported: Path) -> Iterator[str]:
    """The page behind its own server, which sends the policy as a header too."""
    with running(model=exported / "digits.pixels.onnx") as url:
        yield url


@contextmanager
def running(**options: Any) -> Iterator[str]:
    with serve.create(**options) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Visit:
    """One open page, and all that it asked for and was refused."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self._hear(message))
        self.page.goto(url)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def wait_for(self, selector: str, text: str) -> None:
        playwright.expect(self.page.locator(selector)).to_contain_text(text, timeout=60_000)

    def wait_for_model(self) -> None:
        self.wait_for("#model-status", "is ready")

    def predictions(self, who: str = "page") -> dict[str, float]:
        """The bars of the page or the server: {label: probability}, in their order."""
        script = "bars => bars.map(bar => [bar.querySelector('.label').textContent, "
        script += "Number(bar.querySelector('.share').style.getPropertyValue('--share'))])"
        return dict(self.page.locator(f"#{who}-predictions .bars li").evaluate_all(script))

    def choose(self, name: str, body: bytes) -> None:
        """An image, and waits for what the page says of it."""
        self.page.locator("#page-predictions .headline").evaluate("place => place.textContent = 'old'")
        file = {"name": name, "mimeType": "", "buffer": body}
        self.page.set_input_files("#image-file", file)
        playwright.expect(self.page.locator("#page-predictions .headline")).to_contain_text(
            "In this page: ", timeout=60_000
        )

    def draw(self, strokes: list[list[tuple[float, float]]]) -> None:
        """By mouse. Points are shares of the pad."""
        for points in self._on_pad(strokes):
            self.page.mouse.move(*points[0])
            self.page.mouse.down()
            for point in points[1:]:
                self.page.mouse.move(*point)
            self.page.mouse.up()

    def drawn(self) -> np.ndarray:
        """What the page makes of the drawing: uint8 (8, 8, 3)."""
        self.wait_for("#page-predictions .quiet", "8×8 px")
        url = self.page.locator("#seen").evaluate("canvas => canvas.toDataURL()")
        return np.asarray(decode(base64.b64decode(url.split(",")[1])))

    def drawn_label(self, exported: Path) -> str:
        """The label that Python gives the drawing."""
        probabilities = reference(exported / "digits.pixels.onnx", self.drawn()[None])[0]
        return str(probabilities.argmax())

    def draw_by_finger(self, strokes: list[list[tuple[float, float]]]) -> None:
        session = self.context.new_cdp_session(self.page)

        def touch(kind: str, *points: tuple[float, float]) -> None:
            places = [{"x": x, "y": y} for x, y in points]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

        for points in self._on_pad(strokes):
            touch("touchStart", points[0])
            for point in points[1:]:
                touch("touchMove", point)
            touch("touchEnd")

    def _on_pad(self, strokes: list[list[tuple[float, float]]]) -> list[list[tuple[float, float]]]:
        pad = self.page.locator("#pad")
        pad.scroll_into_view_if_needed()
        box = pad.bounding_box()
        return [[(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke] for stroke in strokes]


@pytest.fixture
def visit(browser: Any, site: str) -> Iterator[Visit]:
    """The page with its model, and afterwards: nothing was refused, and nothing asked of any other origin."""
    with opened(browser, site) as one:
        yield one
        check_quiet(one, site)


@pytest.fixture(scope="module")
def long_visit(browser: Any, site: str) -> Iterator[Visit]:
    """One such page for many images, which is quicker, and what people do."""
    with opened(browser, site) as one:
        yield one
        check_quiet(one, site)


@contextmanager
def opened(browser: Any, site: str) -> Iterator[Visit]:
    one = Visit(browser, f"{site}/?model=/digits.pixels.onnx")
    try:
        one.wait_for_model()
        yield one
    finally:
        one.context.close()


def check_quiet(one: Visit, site: str) -> None:
    assert one.complaints == []
    assert [url for url in one.requested if not url.startswith((f"{site}/", f"blob:{site}/"))] == []


def arc(x: float, y: float, width: float, height: float, start: float, end: float) -> list[tuple[float, float]]:
    """Points of an ellipse's line; angles in degrees, clockwise from three o'clock."""
    angles = [math.radians(start + (end - start) * i / 15) for i in range(16)]
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


# As people write them; in scikit-learn's digits a seven has a bar, and a one no foot.
DIGITS = {
    "0": [arc(0.5, 0.5, 0.22, 0.35, -90, 270)],
    "1": [[(0.38, 0.3), (0.5, 0.15), (0.5, 0.85)]],
    "2": [[*arc(0.5, 0.34, 0.2, 0.19, 190, 385), (0.3, 0.85), (0.72, 0.85)]],
    "3": [[*arc(0.47, 0.32, 0.18, 0.17, 200, 450), *arc(0.47, 0.66, 0.21, 0.18, -90, 160)]],
    "4": [[(0.55, 0.15), (0.25, 0.6), (0.75, 0.6)], [(0.58, 0.4), (0.58, 0.85)]],
    "5": [[(0.68, 0.15), (0.36, 0.15), (0.34, 0.43), *arc(0.47, 0.62, 0.21, 0.23, -110, 150)]],
    "6": [[(0.58, 0.15), *arc(0.5, 0.66, 0.19, 0.2, 200, -160)]],
    "7": [[(0.3, 0.15), (0.7, 0.15), (0.45, 0.85)], [(0.36, 0.5), (0.7, 0.5)]],
    "8": [[*arc(0.5, 0.33, 0.15, 0.17, 90, 450), *arc(0.5, 0.67, 0.19, 0.18, -90, 270)]],
    "9": [[*arc(0.48, 0.34, 0.18, 0.19, 0, -360), (0.64, 0.85)]],
}


def test_a_drawn_digit_is_read_wherever_and_however_large_it_is_drawn(long_visit, exported):
    visit, read = long_visit, []
    for digit, strokes in DIGITS.items():
        for scale, left, top in ((1, 0, 0), (0.35, 0.05, 0.6)):
            visit.draw([[(left + scale * x, top + scale * y) for x, y in stroke] for stroke in strokes])
            label = visit.drawn_label(exported)
            visit.wait_for("#page-predictions .headline", f"In this page: {label}, ")
            read.append(label == digit)
            visit.page.click("#clear")
            visit.wait_for("#page-predictions .headline", "Nothing classified yet.")
    assert sum(read) >= 10  # of 20; ten would be 2 by chance


def test_a_drawing_is_prepared_as_the_data_set_was(long_visit):
    """White on black, 8×8, filling the height, 17 grey levels, and about as white as the data set."""
    from sklearn.datasets import load_digits

    visit, whites = long_visit, []
    visit.page.click("#clear")
    for strokes in DIGITS.values():
        visit.draw(strokes)
        visit.wait_for("#page-predictions .quiet", "8×8 px")
        pixels = visit.drawn()
        assert pixels.shape == (8, 8, 3)
        assert (pixels[..., 0] == pixels[..., 1]).all()
        assert pixels[0].max() > 255 * 0.6
        assert pixels[7, :, 0].max() > 255 * 0.4
        assert {int(v) for v in np.unique(pixels[..., 0])} <= {255 * n // 16 for n in range(17)}
        whites.append(pixels[..., 0].mean() / 255)
        visit.page.click("#clear")
    assert np.mean(whites) == pytest.approx(load_digits().images.mean() / 16, abs=0.05)


def test_a_sample_has_the_predictions_that_it_has_in_python(long_visit, exported, run):
    visit = long_visit
    labels = json.loads((run / "spec.json").read_text())["labels"]
    for path in sorted((run / "samples").iterdir())[::7]:
        expected = reference(exported / "digits.pixels.onnx", np.asarray(decode(path.read_bytes()))[None])[0]
        visit.choose(path.name, path.read_bytes())
        predictions = visit.predictions()
        assert len(predictions) == 5
        assert list(predictions.values()) == sorted(predictions.values(), reverse=True)
        assert list(predictions.values()) == pytest.approx(
            [expected[labels.index(label)] for label in predictions], abs=TOLERANCE
        )


@pytest.mark.parametrize("kind", [kind for kind in GOOD if "tiff" not in kind and "cmyk" not in kind])
def test_every_kind_that_browsers_read_has_the_predictions_that_it_has_in_python(long_visit, exported, kind):
    body = GOOD[kind][0]
    expected = reference(exported / "digits.pixels.onnx", np.asarray(decode(body))[None])[0]
    long_visit.choose(f"{kind}.jpg", body)
    tolerance = JPEG_TOLERANCE if "jpeg" in kind or "alpha" in kind or "16" in kind else TOLERANCE
    got = long_visit.predictions()
    assert list(got.values()) == pytest.approx([expected[int(label)] for label in got], abs=tolerance)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_browser_converts_display_p3_to_the_pixels_of_python_within_two_grey_levels(long_visit, kind):
    body = save(gradient(61, 47), kind, icc_profile=P3, **({"subsampling": 0} if kind == "JPEG" else {}))
    script = """async ([body, colour]) => {
        const { decode } = await import("/images.mjs");
        const bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
        return Array.from((await decode(new Blob([bytes]), colour)).data);
    }"""
    for colour in ("srgb", "as-stored"):
        got = long_visit.page.evaluate(script, [base64.b64encode(body).decode(), colour])
        off = abs(np.reshape(got, (47, 61, 3)) - np.asarray(decode(body, colour=colour)))
        assert off.max() <= 2, colour


def test_from_a_plain_file_server_with_the_model_chosen_by_hand(browser, exported, sample, label):
    """`python -m http.server`: no header of ours, so the policy is the page's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "http.server", "-d", str(WEB), "--bind", "127.0.0.1", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_open(port)
        visit = Visit(browser, url)
        visit.page.set_input_files("#image-file", {"name": "a.png", "mimeType": "", "buffer": sample})
        visit.wait_for("#page-predictions .headline", "Choose a model first.")
        visit.page.set_input_files("#model-file", exported / "digits.pixels.onnx")
        visit.wait_for("#page-predictions .headline", f"In this page: {label}, ")  # what was chosen before is not lost
        assert visit.complaints == []
        assert [u for u in visit.requested if not u.startswith((f"{url}/", f"blob:{url}/"))] == []
        visit.context.close()
    finally:
        server.terminate()
        server.wait()


def test_the_policy_is_strict_the_same_in_the_header_and_seen_to_work(browser, site):
    meta = serve.policy().removesuffix("; frame-ancestors 'none'")
    assert f'content="{meta}"' in (WEB / "index.html").read_text()
    assert requests.get(site, timeout=30).headers["Content-Security-Policy"] == serve.policy()
    assert meta == (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    visit = Visit(browser, site)
    for script in (
        "fetch('http://127.0.0.1:9/').catch(() => {})",
        "document.body.append(Object.assign(document.createElement('script'), {textContent: '1'}))",
    ):
        with visit.page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            visit.page.evaluate(f"() => {{ {script} }}")
    assert not any(":9/" in url for url in visit.requested)
    visit.context.close()


@pytest.mark.server
def test_torchserve_answers_side_by_side(browser, exported, server, sample, label):
    with running(model=exported / "digits.pixels.onnx", torchserve=server.url) as url:
        visit = Visit(browser, f"{url}/?model=/digits.pixels.onnx")
        visit.wait_for_model()
        visit.page.check("#compare")
        assert visit.page.text_content("#server-url") == f"{url}/predictions/digits"  # no name to type
        visit.page.fill("#server-key", server.key())
        visit.choose("seven.png", sample)
        visit.wait_for("#server-predictions .headline", f"TorchServe: {label}, ")
        assert visit.predictions("server") == pytest.approx(visit.predictions(), abs=TOLERANCE)
        for who in ("page", "server"):
            visit.wait_for(f"#{who}-predictions .quiet", " ms")
        visit.draw(DIGITS["0"])  # the same pixels go there as a PNG
        visit.wait_for("#server-predictions .headline", f"TorchServe: {visit.drawn_label(exported)}, ")
        assert visit.predictions("server") == pytest.approx(visit.predictions(), abs=TOLERANCE)
        assert visit.complaints == []
        assert {u.removeprefix(url) for u in visit.requested if "/predictions/" in u} == {"/predictions/digits"}
        assert all(u.startswith((f"{url}/", f"blob:{url}/")) for u in visit.requested)

        visit.page.fill("#server-key", "wrong")
        visit.page.press("#server-key", "Enter")
        visit.wait_for("#server-predictions .headline", "InvalidKeyException")
        visit.context.close()


def test_where_no_torchserve_is_named_the_page_says_so(browser, site, sample, label):
    visit = Visit(browser, f"{site}/?model=/digits.pixels.onnx")
    visit.wait_for_model()
    visit.page.check("#compare")
    visit.choose("seven.png", sample)
    visit.wait_for("#server-predictions .headline", "type the inference key")
    visit.page.fill("#server-key", "any")
    visit.page.click("#server button")
    visit.wait_for("#server-predictions .headline", "start this server with --torchserve")
    assert next(iter(visit.predictions())) == label
    visit.context.close()


def test_by_keyboard_alone_a_model_and_an_image_are_chosen_and_a_digit_is_drawn(browser, site, exported, run):
    visit = Visit(browser, site)
    page = visit.page
    page.on("filechooser", lambda _: None)  # asks for them now: a dialog that opens before Playwright listens is lost

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                outline = "label" if name.endswith("-file") else f"#{name}"
                shown = page.locator(f"#{name} + label" if outline == "label" else outline)
                assert shown.evaluate("place => getComputedStyle(place).outlineStyle") == "solid"
                return
        raise AssertionError(f"{name} cannot be reached")

    for name, path in (("model-file", exported / "digits.pixels.onnx"), ("image-file", run / "samples" / "3-0.png")):
        tab_to(name)
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Space")
        chooser.value.set_files(path)
    label = label_of(run, (run / "samples" / "3-0.png").read_bytes())
    visit.wait_for("#page-predictions .headline", f"In this page: {label}, ")
    assert page.get_attribute("#page-predictions .headline", "aria-live") == "polite"
    tab_to("pad")
    for key in ["ArrowUp"] * 7 + [" "] + ["ArrowDown"] * 14:
        page.keyboard.press(key)
    visit.wait_for("#page-predictions .headline", f"In this page: {visit.drawn_label(exported)}, ")
    tab_to("clear")
    page.keyboard.press("Enter")
    visit.wait_for("#page-predictions .headline", "Nothing classified yet.")
    assert visit.complaints == []
    visit.context.close()


def test_a_drawing_that_is_cleared_before_its_file_is_there_stays_cleared(visit):
    """The file is for TorchServe, and comes later than the drawing."""
    visit.page.evaluate("""() => {
        const toBlob = HTMLCanvasElement.prototype.toBlob;
        window.finish = [];
        HTMLCanvasElement.prototype.toBlob = function (callback, ...rest) {
            toBlob.call(this, (blob) => finish.push(() => callback(blob)), ...rest);
        };
    }""")
    visit.draw(DIGITS["1"])
    visit.page.click("#clear")
    assert visit.page.evaluate("finish.map((one) => one()).length") == 1
    visit.page.wait_for_timeout(500)  # in which an answer would come
    assert visit.page.locator("#page-predictions .headline").text_content() == "Nothing classified yet."


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_images_and_models_are_taken_by_drop_and_paste(visit, sample, label, way):
    script = """([way, name, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(bytes)], name));
        document.body.dispatchEvent(way === "drop"
            ? new DragEvent(way, { dataTransfer: transfer, bubbles: true, cancelable: true })
            : new ClipboardEvent(way, { clipboardData: transfer, bubbles: true }));
    }"""
    visit.page.evaluate(script, [way, "seven.png", list(sample)])
    visit.wait_for("#page-predictions .headline", f"In this page: {label}, ")
    visit.page.evaluate(script, [way, "bad.onnx", [1, 2, 3]])
    visit.wait_for("#model-status", "bad.onnx: not an ONNX file")


def test_an_image_that_cannot_be_read_is_an_error_that_the_next_one_replaces(visit, sample, label):
    for body in (b"hello", b"", sample[: len(sample) // 2]):
        visit.choose("bad.png", body)
        visit.wait_for("#page-predictions .headline", "the browser cannot read this as an image")
        assert visit.predictions() == {}
        if body != sample[: len(sample) // 2]:  # of which the browser shows the half
            playwright.expect(visit.page.locator("#preview")).to_be_hidden()
    visit.choose("seven.png", sample)
    visit.wait_for("#page-predictions .headline", f"In this page: {label}, ")
    assert visit.page.is_visible("#preview")


def test_another_graph_or_another_file_is_no_model_and_the_old_one_stays(visit, exported, sample, label):
    for name, words in {
        "digits.onnx": "does not take whole images; choose NAME.pixels.onnx",
        "digits.crops.onnx": "does not take whole images; choose NAME.pixels.onnx",
        "parity.json": "not an ONNX file",
    }.items():
        visit.page.set_input_files("#model-file", exported / name)
        visit.wait_for("#model-status", f"{name}: ")
        visit.wait_for("#model-status", words)
    visit.choose("seven.png", sample)
    assert next(iter(visit.predictions())) == label


def test_a_model_is_fetched_from_this_origin_only(browser, site):
    for address, words in (
        ("http://127.0.0.1:9/x.onnx", "must come from this page's own origin"),
        ("/none.onnx", "404"),
    ):
        visit = Visit(browser, f"{site}/?model={address}")
        visit.wait_for("#model-status", words)
        assert not any(":9/" in url for url in visit.requested if not url.startswith(site))
        visit.context.close()


def test_the_card_says_what_the_spec_says(long_visit, run):
    visit = long_visit
    visit.page.click("summary")
    spec = json.loads((run / "spec.json").read_text())
    text = visit.page.inner_text("#card")
    accuracy, ece = (f"{100 * spec['metrics'][name]:.1f}%" for name in ("accuracy", "ece"))
    for words in (spec["trained_on"], spec["weights_sha256"], accuracy, ece, ", ".join(spec["labels"])):
        assert words in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off_and_a_finger_draws(browser, site, exported, scheme):
    phone = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "color_scheme": scheme}
    visit = Visit(browser, f"{site}/?model=/digits.pixels.onnx", **phone)
    visit.wait_for_model()
    visit.draw_by_finger(DIGITS["7"])
    visit.page.click("summary")
    visit.page.check("#compare")
    visit.wait_for("#page-predictions .headline", f"In this page: {visit.drawn_label(exported)}, ")
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 320
    ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 28)"}[scheme]
    visit.context.close()


def test_several_images_are_a_list_of_thumbnails_and_labels_of_which_one_is_shown_in_full(visit, run):
    page, paths = visit.page, [run / "samples" / f"{digit}-0.png" for digit in (7, 3, 0)]
    files = [{"name": path.name, "mimeType": "image/png", "buffer": path.read_bytes()} for path in paths]
    files.insert(1, {"name": "bad.png", "mimeType": "image/png", "buffer": b"nothing"})
    page.set_input_files("#image-file", files)
    visit.wait_for("#progress", "4 of 4 images")
    buttons = page.locator("#results button")
    assert buttons.locator(".name").all_text_contents() == ["7-0.png", "bad.png", "3-0.png", "0-0.png"]
    assert buttons.evaluate_all("all => all.map(one => one.ariaCurrent)") == ["true", None, None, None]
    assert "the browser cannot read this" in buttons.nth(1).text_content()
    for i in (2, 3, 0):  # each shows the label and the share that it has when it is shown in full
        buttons.nth(i).focus()
        page.keyboard.press("Enter")
        label = buttons.nth(i).locator(".label").text_content()
        share = buttons.nth(i).locator(".percent").text_content()
        visit.wait_for("#page-predictions .headline", f"In this page: {label}, {share}")
        assert buttons.nth(i).get_attribute("aria-current") == "true"
        assert page.get_attribute("#preview", "alt") == files[i]["name"]
        assert page.get_attribute("#preview", "src") == buttons.nth(i).locator("img").get_attribute("src")
    assert buttons.nth(0).locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 8
    buttons.nth(1).click()
    visit.wait_for("#page-predictions .headline", "In this page: the browser cannot read this")
    visit.choose(paths[0].name, paths[0].read_bytes())  # one alone needs no list
    assert buttons.count() == 0


def test_several_images_are_taken_by_one_drop_together_with_their_model(browser, site, exported, sample):
    visit = Visit(browser, site)
    model = list((exported / "digits.pixels.onnx").read_bytes())
    visit.page.evaluate(
        """(files) => {
        const transfer = new DataTransfer();
        for (const [name, bytes] of files) transfer.items.add(new File([Uint8Array.from(bytes)], name));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }""",
        [["a.png", list(sample)], ["my.digits.pixels.onnx", model], ["b.png", list(sample)]],
    )
    visit.wait_for("#progress", "2 of 2 images")
    assert visit.page.locator("#results button").count() == 2
    visit.page.check("#compare")
    assert visit.page.text_content("#server-url").endswith("/predictions/my.digits")
    assert visit.complaints == []
    visit.context.close()


def with_spec(path: Path, target: Path, **changes: Any) -> Path:
    """The ONNX file with another spec in its metadata."""
    import onnx

    proto = onnx.load(path)
    (entry,) = [entry for entry in proto.metadata_props if entry.key == "spec"]
    entry.value = json.dumps(json.loads(entry.value) | changes)
    onnx.save(proto, target)
    return target


def test_only_a_model_of_digits_has_a_pad(visit, exported, tmp_path):
    assert visit.page.is_visible("#pad")
    visit.draw(DIGITS["7"])
    visit.wait_for("#page-predictions .headline", "In this page: ")
    letters = list("ABCDEFGHIJ")
    for name, changes in (
        ("clothes", {"trained_on": "clothes, 10 labels"}),
        ("letters", {"trained_on": "digits, 100 images", "labels": letters}),  # of a folder called digits
    ):
        other = with_spec(exported / "digits.pixels.onnx", tmp_path / f"{name}.pixels.onnx", **changes)
        visit.page.set_input_files("#model-file", other)
        visit.wait_for("#model-status", f"{name}.pixels.onnx is ready")
        assert not visit.page.is_visible("#drawing")
        assert not visit.page.is_visible("#seen")
        visit.wait_for("#page-predictions .headline", "Nothing classified yet.")
    visit.page.set_input_files("#model-file", exported / "digits.pixels.onnx")
    visit.wait_for("#model-status", "digits.pixels.onnx is ready")
    assert visit.page.is_visible("#pad")


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_the_predictions_stand_next_to_the_image(browser, site, run, width):
    visit = Visit(
        browser, f"{site}/?model=/digits.pixels.onnx", viewport={"width": width, "height": 844}, has_touch=True
    )
    visit.wait_for_model()

    def boxes(image: str) -> tuple[dict[str, float], dict[str, float]]:
        return visit.page.locator(image).bounding_box(), visit.page.locator(
            "#page-predictions .headline"
        ).bounding_box()

    for image in ("#preview", "#seen"):
        if image == "#preview":
            visit.choose("7-0.png", (run / "samples" / "7-0.png").read_bytes())
        else:
            visit.draw_by_finger(DIGITS["0"])
            playwright.expect(visit.page.locator("#seen")).to_be_visible()
            visit.wait_for("#page-predictions .headline", "In this page: ")
        its, predictions = boxes(image)
        assert its["x"] + its["width"] <= predictions["x"] < width  # beside it,
        assert abs(its["y"] - predictions["y"]) < 16  # at one height,
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
        if image == "#preview":
            assert visit.page.locator(image).evaluate("image => image.getBoundingClientRect().bottom") <= 844
    pad = visit.page.locator("#pad").bounding_box()
    assert 0 < predictions["y"] + predictions["height"] - pad["y"] < 844  # pad and predictions are seen together
    visit.page.set_input_files("#image-file", sorted((run / "samples").iterdir())[:5])
    visit.wait_for("#progress", "5 of 5 images")
    for row in visit.page.locator("#results button").all():  # as a list of images each beside its label
        image, label = row.locator("img").bounding_box(), row.locator(".label").bounding_box()
        assert image["x"] + image["width"] <= label["x"]
        assert image["y"] <= label["y"] < image["y"] + image["height"]
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    visit.context.close()


# The server of the page.


def test_nothing_but_predictions_of_the_own_page_is_forwarded(exported):
    with echo() as (address, calls), running(torchserve=address) as url:
        host = url.removeprefix("http://")

        def post(path="/predictions/digits", body=b"image", **headers):
            return requests.post(url + path, data=body, headers=headers, timeout=30)

        reply = post(Authorization="Bearer key", Cookie="secret", Origin=url)
        assert (reply.status_code, reply.json()) == (200, {"7": 1.0})
        ((path, headers, body),) = calls
        assert (path, body, headers["Authorization"]) == ("/predictions/digits", b"image", "Bearer key")
        assert "Cookie" not in headers
        assert "Origin" not in headers
        calls.clear()
        refused = {
            404: [
                post("/models"),
                post("/predictions/a/b"),
                post("/predictions/../models"),
                post("/predictions/a?b=c"),
            ],
            403: [post(Origin="http://evil.example"), post(Host="evil.example"), post(Origin="null")],
            413: [post(body=bytes(serve.LARGEST_BODY + 1))],
            411: [requests.post(f"{url}/predictions/a", data=iter([b"x"]), timeout=30)],
        }
        for code, replies in refused.items():
            assert [reply.status_code for reply in replies] == [code] * len(replies)
            assert all(reply.json()["message"] for reply in replies)
        assert requests.put(f"{url}/predictions/digits", timeout=30).status_code == 501
        assert requests.get(url, headers={"Host": "evil.example"}, timeout=30).status_code == 403
        assert requests.get(url, headers={"Host": host.replace("127.0.0.1", "localhost")}, timeout=30).ok
        assert calls == []
    with running(torchserve=address) as url:  # which is gone
        reply = requests.post(f"{url}/predictions/digits", data=b"x", timeout=30)
        assert (reply.status_code, reply.json()["type"]) == (502, "unreachable")


def test_only_the_pages_own_files_and_the_model_are_served(site, exported):
    for path in ("/", "/page.mjs", "/style.css", "/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm"):
        assert requests.get(site + path, timeout=30).status_code == 200
    assert (
        requests.get(f"{site}/digits.pixels.onnx", timeout=30).content == (exported / "digits.pixels.onnx").read_bytes()
    )
    for path in ("/serve.py", "/package.json", "/node_modules/", "/digits.onnx", "/.npmrc", "/../node/classify.mjs"):
        assert requests.get(site + path, timeout=30).status_code == 404, path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.onnx"], "none.onnx: no such .onnx file"),
        (["--torchserve", "localhost:8080"], "must begin with http:// or https://"),
        (["--port", "TAKEN"], "cannot be used"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(site, capsys, arguments, words):
    arguments = [site.rsplit(":", 1)[1] if a == "TAKEN" else a for a in arguments]
    assert serve.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_readmes_command_prints_the_address_of_the_page_with_its_model(run, exported, tmp_path):
    command = [sys.executable, *readme_command(WEB, run, tmp_path)[1:], "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address.endswith("/?model=/digits.pixels.onnx")
        assert "Image classifier" in requests.get(address, timeout=30).text
    finally:
        process.terminate()
        process.communicate()


# Verification.


def run_verify(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WEB / "verify.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_verify_answers_as_onnxruntime_does_in_python(browser, exported, tmp_path):
    """Of one graph; test_runtimes.py asks it for the others too."""
    graph = "digits.pixels"
    arrays = batches(graph)
    inputs, outputs = save_batches(arrays, tmp_path)
    done = run_verify(exported / f"{graph}.onnx", inputs, outputs)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == json.loads((WEB / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    assert report["seconds"] > 0
    for i, array in enumerate(arrays):
        expected = reference(exported / f"{graph}.onnx", array)
        got = np.load(outputs / f"{i}.npy")
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(got, expected, atol=1e-4 * abs(expected).max(), rtol=0)


def test_verify_says_by_its_exit_code_what_is_wrong(browser, exported, tmp_path):
    inputs, outputs = save_batches(batches("digits.pixels"), tmp_path)
    mistakes = {
        (exported / "parity.json", inputs, outputs): (4, "protobuf parsing failed"),
        (exported / "digits.onnx", inputs, outputs): (4, "Unexpected input data type"),
        (exported / "digits.onnx", tmp_path / "none", outputs): (2, "none: no such file or folder"),
        (exported / "digits.onnx",): (2, "usage: "),
    }
    for arguments, (code, words) in mistakes.items():
        done = run_verify(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert words in done.stderr


def test_verify_says_which_command_installs_what_is_missing(exported, tmp_path):
    shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("node_modules"))
    arguments = [exported / "digits.onnx", tmp_path, tmp_path]
    command = [sys.executable, str(tmp_path / "web" / "verify.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (3, "npm ci --prefix clients/web\n")
    done = run_verify(*arguments, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (3, "apt-get install chromium\n")


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"port {port} did not open")


@contextmanager
def echo() -> Iterator[tuple[str, list[tuple[str, Any, bytes]]]]:
    """A server in TorchServe's place: its address, and the calls that reached it."""
    calls: list[tuple[str, Any, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append((self.path, self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"7": 1.0}')

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", calls
        finally:
            server.shutdown()
