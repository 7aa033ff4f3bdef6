"""clients/cpp: built and used as its README prints it, and held against Pillow and PyTorch."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export.graphs import torchscript
from export.proof import runtimes
from predictor.pillow_preprocessing import ImageError, decode
from tests.conftest import PROJECT, label_of
from tests.icc import P3, SRGB, of_grey, of_ink
from tests.kinds import BAD, GOOD, gradient, save

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),  # of damaged files: no error outside tests either
    pytest.mark.timeout(900),  # the first test waits for the build: LibTorch's headers are a minute's work, alone
]

README = (PROJECT / "clients" / "cpp" / "README.md").read_text()
INSTALL = re.search(r"^apt-get install .*$", README, flags=re.MULTILINE).group()
COMMANDS = re.search(r"^```sh\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE).group(1)

ADAM7 = [(4, 3), (4, 3), (8, 3), (8, 6), (16, 6), (16, 12), (32, 12)]  # width × height of the passes of 32×24 px

PNG_TOLERANCE, JPEG_TOLERANCE = 1e-5, 5e-3  # probabilities; Pillow carries a libjpeg of its own


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def noise(colour: int, depth: int, channels: int, between: bytes = b"", interlaced: bool = False) -> bytes:
    """A PNG of random samples, 32×24, of kinds that Pillow does not write. between: chunks before the pixels."""
    rng = np.random.default_rng(colour + depth)
    sizes = ADAM7 if interlaced else [(32, 24)]
    rows = [b"\0" + rng.bytes(width * channels * depth // 8) for width, height in sizes for _ in range(height)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")


def with_exif(kind: str, exif: bytes) -> bytes:
    return save(gradient(), kind, exif=b"Exif\0\0" + exif)


TURN = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # one entry: Orientation, SHORT, 6
PALETTE = chunk(b"PLTE", bytes(range(48)))
PHOTO = gradient(213, 145)

KINDS = {
    **{name: body for name, (body, *_) in GOOD.items() if body.startswith((b"\xff\xd8", b"\x89PNG"))},
    "jpeg 4:2:0": save(PHOTO, "JPEG", quality=80, subsampling=2),
    "jpeg 4:2:2 progressive": save(PHOTO, "JPEG", quality=80, subsampling=1, progressive=True),
    "jpeg rgb": save(PHOTO, "JPEG", keep_rgb=True),
    "jpeg exif little-endian": with_exif("JPEG", b"II*\0\x08\0\0\0\1\0\x12\x01\4\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    "jpeg exif of no orientation": with_exif("JPEG", TURN.replace(b"\0\6", b"\0\x09")),
    "jpeg exif damaged": with_exif("JPEG", b"MM\0*\xff\xff\xff\xff"),
    "jpeg exif cut": with_exif("JPEG", TURN[:15]),
    "png exif": with_exif("PNG", TURN),
    "png grey 2": noise(0, 2, 1),
    "png grey 4": noise(0, 4, 1),
    "png grey 16": noise(0, 16, 1),
    "png grey 16 with transparency": noise(0, 16, 1, chunk(b"tRNS", b"\0\5")),
    "png grey 8 with transparency": noise(0, 8, 1, chunk(b"tRNS", b"\0\5")),
    "png rgb with gamma": noise(2, 8, 3, chunk(b"gAMA", struct.pack(">I", 100_000))),
    "png rgb 16": noise(2, 16, 3),
    "png rgb interlaced": noise(2, 8, 3, interlaced=True),
    "png alpha 16 interlaced": noise(6, 16, 4, interlaced=True),
    "png palette of 16": noise(3, 4, 1, PALETTE),
    "png palette with alpha": noise(3, 4, 1, PALETTE + chunk(b"tRNS", b"\0\x40\x80\xc0")),
    "png grey alpha 16": noise(4, 16, 2),
    "png alpha of any value": noise(6, 8, 4),
    "png alpha 16": noise(6, 16, 4),
    "jpeg with a profile cut short": save(PHOTO, "JPEG", icc_profile=P3[:150]),
    "jpeg with a profile of other pixels": save(PHOTO, "JPEG", icc_profile=of_grey(1.8)),
    "png with a profile of srgb": save(PHOTO, "PNG", icc_profile=SRGB),
}


def profiled(image: Image.Image) -> dict[str, bytes]:
    """Files of an RGB image whose profiles are not sRGB's."""
    transparent = image.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "jpeg of display p3": save(image, "JPEG", icc_profile=P3),
        "jpeg of a grey profile": save(image.convert("L"), "JPEG", icc_profile=of_grey(1.8)),
        "jpeg of an ink profile": save(image.convert("CMYK"), "JPEG", icc_profile=of_ink()),
        "png of display p3": save(image, "PNG", icc_profile=P3),
        "png of display p3 with alpha": save(transparent, "PNG", icc_profile=P3),
        "png of a grey profile with alpha": save(transparent.convert("LA"), "PNG", icc_profile=of_grey(1.8)),
    }


CONVERTED = {name: body for name, body in profiled(PHOTO).items() if "ink" not in name}
KINDS |= CONVERTED


def call(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [os.fsencode(str(part)) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(run, exported, tmp_path_factory):
    """The build folder, and what the README's commands printed on their way to it."""
    if not shutil.which("cmake"):
        pytest.skip(f"cmake is missing: {INSTALL}")
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(PROJECT / "clients" / "cpp", folder / "clients" / "cpp", ignore=shutil.ignore_patterns("build"))
    (folder / "runs").mkdir()
    (folder / "runs" / "digits").symlink_to(run)
    configure, *others = COMMANDS.splitlines()
    done = call("bash", "-c", configure, cwd=folder)
    if missing := re.search(
        r"Could NOT find (JPEG|PNG)|LCMS2|nlohmann_json|CMAKE_\w+_COMPILER|CMAKE_MAKE", done.stderr
    ):
        pytest.skip(f"{missing[0]} is missing: {INSTALL}")
    assert done.returncode == 0, done.stderr[-3000:]
    done = call("bash", "-euc", "\n".join(others), cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "clients" / "cpp" / "build", done.stdout + done.stderr


@pytest.fixture(scope="module")
def classify(built, exported):
    """Runs `classify` with the exported model: its exit code, and its line for each of the images."""

    def classify(*images: Path, model: Path = exported / "digits.pt"):
        done = call(built[0] / "classify", model, *images)
        assert done.stderr == ""
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == len(images)
        return done.returncode, lines

    return classify


@pytest.fixture(scope="module")
def module(exported):
    return torchscript.load(exported / "digits.pt")[0]


@pytest.fixture(scope="module")
def answers(classify, tmp_path_factory):
    """What `classify` says of each of KINDS."""
    paths = write(KINDS, tmp_path_factory.mktemp("kinds"))
    code, lines = classify(*paths)
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert code == 0, [line for line in lines if "error" in line]
    return dict(zip(KINDS, (line["predictions"] for line in lines), strict=True))


def write(files: dict[str, bytes], folder: Path) -> list[Path]:
    paths = [folder / str(i) for i in range(len(files))]
    for path, body in zip(paths, files.values(), strict=True):
        path.write_bytes(body)
    return paths


def test_the_readmes_commands_build_it_without_a_warning_and_classify(built, run):
    _, printed = built
    assert "warning" not in printed.lower()
    answers = [json.loads(line)["predictions"] for line in printed.splitlines() if line.startswith("{")]
    samples = ((run / "samples" / f"{digit}-0.png").read_bytes() for digit in (7, 3))
    assert [next(iter(answer)) for answer in answers] == [label_of(run, body) for body in samples]


def test_the_exporter_finds_pytorchs_answers_in_its_three_graphs(built, verify, monkeypatch):
    monkeypatch.setattr(runtimes, "CLIENTS", built[0].parent.parent)
    rows = verify("LibTorch C++")
    assert [row.graph for row in rows] == ["network", "crops", "pixels"]
    assert all(row.passed and row.version for row in rows), rows


@pytest.mark.parametrize("name", KINDS)
def test_an_image_has_the_answer_that_the_endpoints_decoding_and_pytorch_give(answers, module, name):
    pixels = torch.from_numpy(np.asarray(decode(KINDS[name])).copy())[None]
    with torch.inference_mode():
        expected = {str(i): value for i, value in enumerate(module(pixels)[0].tolist())}
    is_exact = not name.startswith("jpeg") and name not in CONVERTED  # LittleCMS differs by version too
    tolerance = PNG_TOLERANCE if is_exact else JPEG_TOLERANCE
    best = list(answers[name].values())
    assert len(best) == 5
    assert best == sorted(best, reverse=True)
    assert best == pytest.approx(sorted(expected.values(), reverse=True)[:5], abs=tolerance, rel=0)
    assert answers[name] == pytest.approx({label: expected[label] for label in answers[name]}, abs=tolerance, rel=0)


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean([1, 2])


@pytest.mark.parametrize(
    "spec", [{"colour": "srgb"}, {"colour": "as-stored"}, {}], ids=["srgb", "as-stored", "version 1"]
)
def test_colour_profiles_count_where_the_spec_says_so_and_else_are_ignored(classify, tmp_path, spec):
    model = tmp_path / "mean.pt"
    extra = {"spec.json": json.dumps({"labels": ["red", "green", "blue"], **spec})}
    torch.jit.save(torch.jit.script(MeanColour()), model, _extra_files=extra)
    files = profiled(Image.new("RGB", (40, 30), (90, 200, 110)))
    code, lines = classify(*write(files, tmp_path), model=model)
    assert code == 0
    wanted = spec.get("colour", "as-stored")
    (other,) = {"srgb", "as-stored"} - {wanted}
    for (name, body), line in zip(files.items(), lines, strict=True):
        got = [line["predictions"][label] for label in ("red", "green", "blue")]
        means = {colour: np.asarray(decode(body, colour=colour)).mean((0, 1)) for colour in (wanted, other)}
        tolerance = 8 if "ink" in name else 1.5  # LittleCMS 2.14 is 6 levels from 2.19 on that profile
        assert got == pytest.approx(means[wanted], abs=tolerance), name
        assert abs(got - means[other]).max() > 2 * tolerance, name  # so that this test can tell


def test_a_bad_image_is_an_error_of_its_own_line(classify, tmp_path, sample, label):
    bad = write({name: body for name, (body, _) in BAD.items()}, tmp_path)
    good = tmp_path / "good"
    good.write_bytes(sample)
    code, lines = classify(*bad, tmp_path / "none.png", tmp_path, good)
    assert code == 1
    errors = {name: line["error"] for name, line in zip([*BAD, "none", "folder"], lines[:-1], strict=True)}
    assert next(iter(lines[-1]["predictions"])) == label
    assert "20000×20000 px is too large: at most 50,000,000" in errors["bomb beyond pillow's limit"]
    assert "neither JPEG nor PNG" in errors["heic cut in its header"]
    assert "empty" in errors["empty"]
    assert "No such file" in errors["none"]
    for name in ("png cut in its pixels", "jpeg cut in its pixels", "jpeg cut in its header"):
        assert "truncated or damaged" in errors[name]


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
def test_a_truncated_file_is_refused_wherever_the_endpoint_refuses_it(classify, tmp_path, options):
    body = save(gradient(40, 30), options.pop("format"), **options)
    cuts = {str(length): body[:length] for length in [*range(1, len(body), 7), len(body) - 1]}
    _, lines = classify(*write(cuts, tmp_path))
    assert "error" in lines[0]
    for (length, cut), line in zip(cuts.items(), lines, strict=True):
        try:
            decode(cut)
        except ImageError:
            assert "error" in line, f"cut at {length} of {len(body)}"


def test_labels_and_paths_of_any_text_are_printed_as_json(classify, module, tmp_path, sample):
    labels = ['"', "\\", "Grünes Wasser", "犬", "\U0001f415", "a\tb", "{}", "0", "1", "2"]
    torchscript_file = tmp_path / "odd.pt"
    torch.jit.save(module, torchscript_file, _extra_files={"spec.json": json.dumps({"labels": labels})})
    path = tmp_path / 'Löwe "1"\udcff.png'  # the last byte is no UTF-8
    path.write_bytes(sample)
    code, (line,) = classify(path, model=torchscript_file)
    assert (code, line["image"]) == (0, str(path).replace("\udcff", "\ufffd"))
    with torch.inference_mode():
        best = module(torch.from_numpy(np.asarray(decode(sample)).copy())[None])[0].topk(5).indices
    assert list(line["predictions"]) == [labels[place] for place in best]


def test_a_wrong_call_or_model_is_one_line_and_exit_code_2(built, module, run, tmp_path):
    torch.jit.save(module, tmp_path / "bare.pt")
    (tmp_path / "text.pt").write_text("nothing")
    image = run / "samples" / "7-0.png"
    for arguments, words in [
        ((), "usage: classify MODEL.pt IMAGE"),
        ((tmp_path / "bare.pt",), "usage"),
        ((tmp_path / "none.pt", image), "none.pt: open file failed"),
        ((tmp_path / "text.pt", image), "text.pt: "),
        ((tmp_path / "bare.pt", image), "bare.pt: carries no spec.json; export the run again"),
    ]:
        done = call(built[0] / "classify", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
        assert words in done.stderr


@pytest.mark.parametrize("graph", ["network", "crops", "pixels"])
def test_verify_runs_each_graph_on_every_batch(built, exported, module, tmp_path, graph):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i, count in enumerate((1, 3, 8, 5)):
        shape = {"network": (count, 3, 32, 32), "crops": (count, 32, 32, 3), "pixels": (count, 47 + i, 31, 3)}[graph]
        batch = rng.standard_normal(shape).astype("<f4") if graph == "network" else rng.integers(0, 256, shape, "u1")
        np.save(tmp_path / "in" / f"{i}.npy", batch)
    done = call(built[0] / "verify", exported / "digits.pt", graph, tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == torch.__version__.split("+")[0]
    assert 0 < report["seconds"] < 600
    assert len(list((tmp_path / "out").iterdir())) == 4
    run = {"network": module.network, "crops": module.classify_crops, "pixels": module}[graph]
    for path in sorted((tmp_path / "in").iterdir()):
        got = np.load(tmp_path / "out" / path.name)
        with torch.inference_mode():
            expected = run(torch.from_numpy(np.load(path))).numpy()
        assert (got.dtype, got.shape) == (np.float32, expected.shape)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_verify_tells_a_wrong_input_from_a_graph_that_cannot_run(built, exported, tmp_path):
    arrays = {
        "floats": np.zeros((1, 32, 32, 3), np.float32),
        "three": np.zeros((2, 32, 32), np.uint8),
        "double": np.zeros((1, 3, 32, 32)),
        "columns": np.zeros((3, 3, 32, 32), np.float32, order="F"),
    }
    for name, array in arrays.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", array)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "0.npy").write_bytes((tmp_path / "floats" / "0.npy").read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    model = exported / "digits.pt"
    for arguments, code, words in [
        ((model, "network"), 2, "usage: verify"),
        ((model, "logits", tmp_path / "floats", tmp_path / "out"), 2, "usage: verify"),
        ((model, "network", tmp_path / "none", tmp_path / "out"), 2, "No such file"),
        ((model, "network", tmp_path / "empty", tmp_path / "out"), 2, "holds no .npy files"),
        ((model, "crops", tmp_path / "three", tmp_path / "out"), 2, "must have four dimensions"),
        ((model, "network", tmp_path / "double", tmp_path / "out"), 2, "must be float32"),
        ((model, "network", tmp_path / "columns", tmp_path / "out"), 2, "must be in C order"),
        ((model, "network", tmp_path / "cut", tmp_path / "out"), 2, "is not as long as its header says"),
        ((model, "network", tmp_path / "floats", tmp_path / "out"), 4, "RuntimeError: Given groups=1"),
        ((tmp_path / "none.pt", "crops", tmp_path / "floats", tmp_path / "out"), 4, "none.pt: open file failed"),
    ]:
        done = call(built[0] / "verify", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done
        assert words in done.stderr
