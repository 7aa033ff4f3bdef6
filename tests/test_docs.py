"""What the README and docs/ say about files: every path that they name is there, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import PROJECT

README = PROJECT / "README.md"
PAGES = sorted((PROJECT / "docs").glob("*.md"))
OTHERS = [PROJECT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")]
ALL = [README, *PAGES, *OTHERS]
FOLDERS = [*sorted(PROJECT.glob("clients/*/README.md")), PROJECT / "deploy/README.md", PROJECT / "benchmarks/README.md"]

SUFFIXES = "py|md|yaml|yml|json|toml|lock|properties|xml|sh|conf|pt|onnx|mar|html|gz|txt|png|svg|pub|pem|log|csv"
PATH = re.compile(rf"(?:[\w.-]+/)+(?:[\w.-]+)?|[\w.-]+\.(?:{SUFFIXES})|SHA256SUMS")
MADE_LATER = {  # by a server, by options that the tests' run does not have, or by users
    "access_log.log",
    "key.pem",
    "key.pub",
    "key_file.json",
    "runs/digits/serve",
    "runs/digits/tensorboard",
    "digits.int8.onnx",
    "digits.crops.int8.onnx",
    "photos/cat/1.jpg",
    "photos/dog/2.png",
}
NO_PATHS = {".tar.gz", ".tar.xz", "application/json"}


def paths(text: str) -> set[str]:
    """What stands in backticks and looks like a path; `NAME` is the model of the tests."""
    words = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    return {word.replace("NAME", "digits") for word in words if PATH.fullmatch(word)} - NO_PATHS


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_every_path_that_is_named_exists(page, run, exported):
    places = [PROJECT, run.parents[0], run, exported, PROJECT / "docs"]
    missing = {
        path
        for path in paths(page.read_text()) - MADE_LATER
        if not any((place / path.removeprefix("runs/")).exists() or (place / path).exists() for place in places)
    }
    assert not missing


def test_the_architecture_names_every_folder_and_the_files_on_the_way():
    text = (PROJECT / "docs" / "architecture.md").read_text()
    named = paths(text)
    assert len(named) > 40
    assert {f"{path.parent.name}/" for path in PROJECT.glob("*/__init__.py")} <= named
    assert len(text.splitlines()) <= 65  # one screen


@pytest.mark.parametrize("page", [*ALL, *FOLDERS], ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_benchmark_is_described():
    """What is a command, and its README: a figure in docs/ is to be found there."""
    folder = PROJECT / "benchmarks"
    programs = [*folder.glob("*.py"), *(package / "__main__.py" for package in folder.iterdir() if package.is_dir())]
    commands = {path.stem if path.parent == folder else path.parent.name for path in programs if is_command(path)}
    assert len(commands) > 10
    text = (folder / "README.md").read_text()
    described = set(re.findall(r"benchmarks\.(\w+)", text)) | set(re.findall(r"`(\w+)(?:\.py|/)`", text))
    assert commands - described == set()
    assert (folder / "gpu.sh").exists()
    assert "benchmarks/gpu.sh" in text


def is_command(path: Path) -> bool:
    return path.exists() and 'if __name__ == "__main__"' in path.read_text()


def test_the_readme_is_a_front_door():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    top = "\n".join(lines[:40])
    assert "](docs/path.svg)" in top
    assert (PROJECT / "docs" / "path.svg").stat().st_size < 60_000
    assert {f"](docs/{page.name})" in README.read_text() for page in PAGES} == {True}
    assert "the GPU paths have not been run yet" in top


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_first_who_needs_it(page):
    title, empty, first = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not empty
    assert first.startswith("For whoever ")
