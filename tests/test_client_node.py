"""clients/node: the ONNX files in Node, with the same answers as in Python."""

from __future__ import annotations

import base64
import fcntl
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from predictor.pillow_preprocessing import decode
from tests.conftest import PROJECT, label_of
from tests.icc import P3, SRGB, of_grey, of_ink
from tests.kinds import BAD, GOOD, gradient, save

NODE = PROJECT / "clients" / "node"
WEB = PROJECT / "clients" / "web"
GRAPHS = ("digits", "digits.crops", "digits.pixels")


def install(folder: Path) -> None:
    """`npm ci` where it has not been run; the test is skipped where it cannot be."""
    if not shutil.which("node"):
        pytest.skip("apt-get install nodejs npm")
    command = ["npm", "ci", "--prefix", str(folder.relative_to(PROJECT)), "--no-audit", "--no-fund"]
    with (folder / "package.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another test run may be at it
        if (folder / "node_modules" / ".package-lock.json").exists():  # npm writes it last
            return
        if not shutil.which("npm"):
            pytest.skip("apt-get install npm")
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280, check=False)
        if done.returncode:
            pytest.skip(f"{' '.join(command)}: {done.stderr.strip()[-200:]}")


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    install(NODE)


def node(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["node", str(NODE / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def reference(path: Path, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def batches(graph: str) -> list[np.ndarray]:
    """Of uneven sizes, for one of GRAPHS."""
    rng = np.random.default_rng(0)
    if graph == "digits":
        return [rng.standard_normal((n, 3, 32, 32), np.float32) for n in (1, 3)]
    sides = [(32, 32), (32, 32)] if graph == "digits.crops" else [(9, 61), (427, 640)]
    return [rng.integers(0, 256, (n, *side, 3), np.uint8) for n, side in zip((3, 1), sides, strict=True)]


def save_batches(arrays: list[np.ndarray], folder: Path) -> tuple[Path, Path]:
    """The folders of the inputs and, empty, of the outputs."""
    inputs, outputs = folder / "inputs", folder / "outputs"
    inputs.mkdir()
    outputs.mkdir()
    for i, array in enumerate(arrays):
        np.save(inputs / f"{i}.npy", array)
    return inputs, outputs


def readme_command(folder: Path, run: Path, place: Path) -> list[str]:
    """The second line of the README's first block, for a `place` that is made to look like the repository's root."""
    (place / "runs").mkdir()
    (place / "runs" / "digits").symlink_to(run)
    (place / "clients").symlink_to(folder.parent)
    block = (folder / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    install_line, command = block.splitlines()
    assert install_line == f"npm ci --prefix clients/{folder.name}"
    return command.split()


def test_the_readmes_command_works_as_it_is_printed(run, exported, tmp_path):
    done = subprocess.run(readme_command(NODE, run, tmp_path), cwd=tmp_path, capture_output=True, text=True, check=True)
    samples = ((run / "samples" / f"{digit}-0.png").read_bytes() for digit in (7, 3))
    answers = [json.loads(line)["predictions"] for line in done.stdout.splitlines()]
    assert [next(iter(answer)) for answer in answers] == [label_of(run, body) for body in samples]


def test_samples_have_the_answers_that_they_have_in_python(exported, run):
    images = sorted((run / "samples").iterdir())
    done = node("classify.mjs", exported / "digits.pixels.onnx", *images)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == list(map(str, images))
    labels = json.loads((run / "spec.json").read_text())["labels"]
    for line, path in zip(lines, images, strict=True):
        expected = reference(exported / "digits.pixels.onnx", np.asarray(decode(path.read_bytes()))[None])[0]
        assert len(line["predictions"]) == 5
        assert list(line["predictions"].values()) == sorted(line["predictions"].values(), reverse=True)
        assert [expected[labels.index(label)] for label in line["predictions"]] == pytest.approx(
            list(line["predictions"].values()), abs=1e-5
        )


def test_every_kind_of_image_is_decoded_as_pillow_does(tmp_path):
    names = [name for name in GOOD if name != "bmp"]  # sharp reads all others
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 50, 4), np.uint8)
    files = {name: GOOD[name][0] for name in names} | {
        "noise": save(Image.fromarray(noise), "PNG"),
        "jpeg 420": save(gradient(61, 47), "JPEG"),
    }
    for name, got in decoded(files, tmp_path, "srgb").items():
        expected = np.asarray(decode(files[name]))
        assert got.shape == expected.shape, name
        assert abs(got - expected).max() <= (1 if "jpeg" in name else 0), name  # libjpeg differs by version


def test_a_colour_profile_is_converted_as_pillow_does_where_the_spec_says_so(tmp_path):
    photo, alpha = gradient(61, 47), gradient(61, 47)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    converted = {
        "jpeg": save(photo, "JPEG", icc_profile=P3, subsampling=0),
        "jpeg of grey": save(photo.convert("L"), "JPEG", icc_profile=of_grey(1.8)),
        "jpeg of ink": save(photo.convert("CMYK"), "JPEG", icc_profile=of_ink(), subsampling=0),
        "png": save(photo, "PNG", icc_profile=P3),
        "png with alpha": save(alpha, "PNG", icc_profile=P3),
        "png of grey with alpha": save(alpha.convert("LA"), "PNG", icc_profile=of_grey(1.8)),
        "png palette": save(photo.quantize(64), "PNG", icc_profile=P3),
        "webp": save(photo, "WEBP", lossless=True, icc_profile=P3),
        "tiff": save(photo, "TIFF", icc_profile=P3),
    }
    ignored = {
        "png of srgb": save(photo, "PNG", icc_profile=SRGB),
        "tiff with a profile cut short": save(photo, "TIFF", icc_profile=P3[:150]),
        "tiff with a profile of ink": save(photo, "TIFF", icc_profile=of_ink()),
    }
    files = converted | ignored
    by_colour = {colour: decoded(files, tmp_path, colour) for colour in ("srgb", "as-stored")}
    for name, body in files.items():
        for colour, images in by_colour.items():
            tolerance = 2 if "jpeg" in name else 1 if name in converted and colour == "srgb" else 0
            assert abs(images[name] - np.asarray(decode(body, colour=colour))).max() <= tolerance, (name, colour)
        assert (abs(by_colour["srgb"][name] - by_colour["as-stored"][name]).max() > 5) == (name in converted), name


def decoded(files: dict[str, bytes], folder: Path, colour: str) -> dict[str, np.ndarray]:
    """What images.mjs makes of each: int (H, W, 3)."""
    for name, body in files.items():
        (folder / name).write_bytes(body)
    script = (
        f"import {{ decode }} from {json.dumps((NODE / 'images.mjs').as_uri())};"
        "import { readFileSync } from 'node:fs';"
        "for (const path of process.argv.slice(2)) {"
        "const { data, height, width } = await decode(readFileSync(path), process.argv[1]);"
        "console.log(JSON.stringify([height, width, Buffer.from(data).toString('base64')])) }"
    )
    command = ["node", "--input-type=module", "-e", script, "--", colour, *(str(folder / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    images = {}
    for name, line in zip(files, done.stdout.splitlines(), strict=True):
        height, width, pixels = json.loads(line)
        images[name] = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 3).astype(int)
    return images


MEAN_COLOUR = """<ir_version: 9, opset_import: ["": 18]>
mean (uint8[n, h, w, 3] images) => (float[n, 3] probabilities) {
    levels = Cast<to = 1>(images)
    axes = Constant<value_ints = [1, 2]>()
    probabilities = ReduceMean<keepdims = 0>(levels, axes)
}"""


@pytest.mark.parametrize(
    "spec", [{"colour": "srgb"}, {"colour": "as-stored"}, {}], ids=["srgb", "as-stored", "version 1"]
)
def test_colour_profiles_count_where_the_files_spec_says_so(tmp_path, spec):
    body = save(Image.new("RGB", (40, 30), (90, 200, 110)), "PNG", icc_profile=P3)
    (tmp_path / "p3.png").write_bytes(body)
    model = onnx.parser.parse_model(MEAN_COLOUR)
    onnx.helper.set_model_props(model, {"spec": json.dumps({"labels": ["red", "green", "blue"], **spec})})
    onnx.save(model, tmp_path / "mean.onnx")
    done = node("classify.mjs", tmp_path / "mean.onnx", tmp_path / "p3.png")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)["predictions"]
    got = [answer[label] for label in ("red", "green", "blue")]
    wanted = spec.get("colour", "as-stored")
    (other,) = {"srgb", "as-stored"} - {wanted}
    means = {colour: np.asarray(decode(body, colour=colour)).mean((0, 1)) for colour in (wanted, other)}
    assert got == pytest.approx(means[wanted], abs=1.5)
    assert abs(got - means[other]).max() > 5  # so that this test can tell


def test_every_bad_image_is_one_line_with_an_error_beside_the_others(exported, sample, label, tmp_path):
    bodies = {"good": sample, **{name: body for name, (body, _) in BAD.items()}}
    for name, body in bodies.items():
        (tmp_path / name).write_bytes(body)
    paths = [*(tmp_path / name for name in bodies), tmp_path / "none"]
    done = node("classify.mjs", exported / "digits.pixels.onnx", *paths)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert next(iter(lines[0]["predictions"])) == label
    assert len(lines) == len(bodies) + 1
    assert all(line["error"] and "\n" not in line["error"] for line in lines[1:])


def test_labels_of_any_text_come_out_of_the_file(exported, sample, tmp_path):
    (tmp_path / "seven.png").write_bytes(sample)
    plain = json.loads(node("classify.mjs", exported / "digits.pixels.onnx", tmp_path / "seven.png").stdout)[
        "predictions"
    ]
    model = onnx.load(exported / "digits.pixels.onnx")
    spec = json.loads(model.metadata_props[0].value)
    odd = ['"quoted"', "ζήτα", "back\\slash"]
    for label, name in zip(plain, odd, strict=False):  # the best three
        spec["labels"][int(label)] = name
    onnx.helper.set_model_props(model, {"of": "others", "spec": json.dumps(spec), "empty": ""})
    model.metadata_props.add(key="big", value="x" * 70_000)  # a length of three bytes
    onnx.save(model, tmp_path / "named.onnx")
    named = json.loads(node("classify.mjs", tmp_path / "named.onnx", tmp_path / "seven.png").stdout)["predictions"]
    assert list(named.items()) == [(spec["labels"][int(label)], value) for label, value in plain.items()]
    assert list(named)[:3] == odd


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("", "usage: "),
        ("none.onnx", "no such file"),
        ("digits.onnx", "does not take whole images; take NAME.pixels.onnx"),
        ("digits.crops.onnx", "does not take whole images; take NAME.pixels.onnx"),
        ("parity.json", "not an ONNX file"),
        ("cut", "not an ONNX file, or one that is cut short"),
        ("bare", "carries no spec"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(exported, tmp_path, model, words):
    path = exported / model
    if model == "cut":
        path = tmp_path / "cut.onnx"
        path.write_bytes((exported / "digits.pixels.onnx").read_bytes()[:100_000])
    if model == "bare":
        path = tmp_path / "bare.onnx"
        bare = onnx.load(exported / "digits.pixels.onnx")
        del bare.metadata_props[:]
        onnx.save(bare, path)
    done = node("classify.mjs", *([path, "image.png"] if model else []))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("graph", GRAPHS)
def test_verify_answers_as_onnxruntime_does_in_python(exported, tmp_path, graph):
    arrays = batches(graph)
    inputs, outputs = save_batches(arrays, tmp_path)
    done = node("verify.mjs", exported / f"{graph}.onnx", inputs, outputs)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == json.loads((NODE / "package.json").read_text())["dependencies"]["onnxruntime-node"]
    assert report["seconds"] > 0
    for i, array in enumerate(arrays):
        expected = reference(exported / f"{graph}.onnx", array)
        got = np.load(outputs / f"{i}.npy")
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(got, expected, atol=1e-4 * abs(expected).max(), rtol=0)


def test_verify_says_by_its_exit_code_what_is_wrong(exported, tmp_path):
    inputs, outputs = save_batches(batches("digits.pixels"), tmp_path)
    mistakes = {
        (exported / "parity.json", inputs, outputs): (4, "parity.json"),
        (exported / "digits.onnx", inputs, outputs): (4, "Unexpected input data type"),
        (exported / "digits.onnx", tmp_path / "none", outputs): (2, "no such file"),
        (exported / "digits.onnx",): (2, "usage: "),
    }
    for arguments, (code, words) in mistakes.items():
        done = node("verify.mjs", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert words in done.stderr
    (inputs / "0.npy").write_bytes(b"\x93NUMPY\x02\x00")
    assert node("verify.mjs", exported / "digits.pixels.onnx", inputs, outputs).returncode == 2


def test_without_its_packages_it_says_which_command_installs_them(exported, tmp_path):
    for folder in (NODE, WEB):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("node_modules"))
    arguments = [exported / "digits.pixels.onnx", tmp_path, tmp_path]
    for program, code, words in (
        ("verify.mjs", 3, "npm ci --prefix clients/node\n"),
        ("classify.mjs", 2, "classify.mjs: first run: npm ci --prefix clients/node\n"),
    ):
        command = ["node", str(tmp_path / "node" / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (code, words)


def test_nothing_reports_to_onnx_runtimes_maker(exported, sample, tmp_path, monkeypatch):
    """It writes `.ses` into the temporary folder as soon as it is loaded with its telemetry on."""
    (tmp_path / "seven.png").write_bytes(sample)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert node("classify.mjs", exported / "digits.pixels.onnx", tmp_path / "seven.png").returncode == 0
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("folder", [NODE, WEB])
def test_the_lock_file_names_no_registry_and_pins_what_package_json_names(folder):
    lock = (folder / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    assert "registry" not in lock
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    packages = json.loads(lock)["packages"]
    assert all(packages[f"node_modules/{name}"]["version"] == version for name, version in wanted.items())
    assert all("integrity" in package for name, package in packages.items() if name)


@pytest.mark.parametrize("file", ["metadata.mjs", "npy.mjs"])
def test_what_the_folders_share_is_the_same_in_both(file):
    """Each folder stands alone, so each has a copy."""
    clients = PROJECT / "clients"
    assert (clients / "node" / file).read_bytes() == (clients / "web" / file).read_bytes()
