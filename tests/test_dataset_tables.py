"""Tables of paths and labels: which are read, what they mean, and that they read no file outside their folder."""

import shutil

import pytest
import torch

from dataset import splits
from dataset.loading import load
from dataset.sources import DataError, open_source
from predictor.spec import PixelRule
from tests.folders import COLOURS, image, make_folder
from train import main

HEADER = "path,label,split"


def rows_of(folder):
    return [(path.relative_to(folder).as_posix(), path.parent.name) for path in sorted(folder.rglob("*.jpg"))]


def write_table(path, rows, header="path,label", delimiter=",", encoding="utf-8"):
    lines = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def write_parquet(target, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), target)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tables") / "pics", count=2)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "pics")


def listed(source):
    return [(entry.key, entry.label, entry.split) for entry in source.entries]


def test_a_table_lists_and_reads_what_its_folder_does(copy):
    table, folder = open_source(str(write_table(copy / "mine.csv", rows_of(copy)))), open_source(str(copy))
    assert (table.name, table.labels) == ("mine", folder.labels)
    assert listed(table) == listed(folder)
    assert list(table.read()) == list(folder.read())


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_spreadsheets_delimiters_and_byte_order_marks_are_read(copy, delimiter, encoding):
    (copy / "red" / "0.jpg").rename(copy / "red" / "a, b.jpg")
    rows = [(f'"./{path}"', label) for path, label in rows_of(copy)] + [(" ", "")]
    table = write_table(copy / "t.csv", rows, '"Filename",CLASS', delimiter, encoding)
    assert listed(open_source(str(table))) == listed(open_source(str(copy)))


def test_parquet_is_read_and_whole_numbers_become_text(copy):
    paths = [path for path, _ in rows_of(copy)]
    table = write_parquet(copy / "t.parquet", path=paths, label=[7, 7, 10, 10, 2, 2], split=[None, "test"] * 3)
    source = open_source(str(table))
    assert source.labels == ["10", "2", "7"]
    assert {entry.split for entry in source.entries} == {"", "test"}
    assert all(isinstance(body, bytes) for _, body in source.read())


def test_splits_are_those_of_the_table_in_any_spelling(copy):
    given = ["Train", "validation", "train", "VALID", "train", "test"]
    rows = [(*row, split) for row, split in zip(rows_of(copy), given, strict=True)]
    source = open_source(str(write_table(copy / "t.tsv", rows, HEADER, "\t")))
    assert [entry.split for entry in source.entries] == ["train", "val", "train", "val", "train", "test"]


@pytest.mark.parametrize(
    "path", ["../secret.png", "red/../../secret.png", "{outside}/secret.png", "C:\\secret.png", "..\\secret.png", "/"]
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_path_out_of_the_tables_folder_is_refused(copy, tmp_path, path, kind):
    image((1, 2, 3), 0).save(tmp_path / "secret.png")
    rows = [*rows_of(copy), (path.format(outside=tmp_path), "red")]
    if kind == "csv":
        table = write_table(copy / "t.csv", rows)
    else:
        table = write_parquet(copy / "t.parquet", path=[p for p, _ in rows], label=[name for _, name in rows])
    with pytest.raises(DataError, match=r"(line 8|row 7): the path .* leads out of the table's folder") as caught:
        open_source(str(table))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("name,label", [("a", "b")], "has no column 'path'; its columns are 'name', 'label'"),
        ("path,kind", [("a", "b")], "has no column 'label'; its columns are 'path', 'kind'"),
        ("path,label,Label", [("a", "b", "c")], "has 2 columns 'label'; rename all but one"),
        ("path,label", [], "has no rows"),
        ("path,label", [("a.jpg", "cat"), ("b.jpg", " ")], "line 3: b.jpg has no label"),
        ("path,label", [("", "cat")], "line 2: there is no path"),
        ("path,label", [("a,b.jpg", "cat")], "line 2: has 3 cells where the header has 2"),
        ("path,label", [('"a.jpg', "cat")], r"line \d: is no CSV"),
        ("path,label", [("a.jpg", "cat"), ("b.jpg", "dog"), ("./a.jpg", "cat")], "line 4: a.jpg stands in line 2"),
        ("path,label", [("a.jpg", "hot dog"), ("b.jpg", "Hot_Dog")], "are two spellings of a class"),
        ("path,label", [("a.jpg", "cat"), ("b.jpg", "cat")], r"one class only \('cat'\)"),
        (HEADER, [("a.jpg", "cat", "holdout")], "line 2: unknown split 'holdout'"),
        (HEADER, [("a", "cat", ""), ("b", "dog", ""), ("c", "ox", "test")], "'ox' has no training images"),
    ],
)
def test_a_broken_table_is_named(tmp_path, header, rows, words):
    table = write_table(tmp_path / "t.csv", rows, header)
    with pytest.raises(DataError, match=words) as caught:
        open_source(str(table))
    assert str(caught.value).startswith(str(table))
    assert "\n" not in str(caught.value)


def test_tables_of_other_encodings_kinds_and_types_are_named(tmp_path):
    utf16 = write_table(tmp_path / "a.csv", [("a.jpg", "cat")], encoding="utf-16")
    with pytest.raises(DataError, match="is not UTF-8"):
        open_source(str(utf16))
    (tmp_path / "b.parquet").write_text("path,label\n")
    with pytest.raises(DataError, match="is no Parquet file, or damaged"):
        open_source(str(tmp_path / "b.parquet"))
    floats = write_parquet(tmp_path / "c.parquet", path=["a", "b"], label=[1.5, 2.0])
    with pytest.raises(DataError, match="column 'label': holds values of type float"):
        open_source(str(floats))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="extra 'datasets'; pip install datasets"):
        open_source(str(tmp_path / "t.parquet"))


def test_missing_files_are_unreadable_images_with_their_names(copy):
    given = [(*row, ("train", "val", "train", "test", "train", "val")[i]) for i, row in enumerate(rows_of(copy))]
    table = write_table(copy / "t.csv", [*given, ("red/gone.jpg", "red", "train"), ("red", "red", "train")], HEADER)
    named = ["red: not a regular file", "red/gone.jpg: there is no such file"]
    with pytest.raises(DataError, match="2 of 8 images cannot be read") as caught:
        load(str(table), rule=PixelRule.square(8))
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == named
    data = load(str(table), rule=PixelRule.square(8), skip_bad=True)
    assert data.skipped == named
    assert [len(split) for split in (data.train, data.val, data.test)] == [3, 2, 1]


def test_training_from_a_table_gives_the_run_that_its_folder_gives(tmp_path):
    folder = make_folder(tmp_path / "pics", count=12)
    table = write_table(folder / "labels.csv", rows_of(folder)[::-1])
    for data, out in ((folder, "a"), (table, "b")):
        assert main(["--data", str(data), "--epochs", "1", "--size", "16", "--out", str(tmp_path / out)]) == 0
    assert splits.read(tmp_path / "a") == splits.read(tmp_path / "b")
    weights = [torch.load(tmp_path / out / "model.pt", weights_only=True) for out in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert set(COLOURS) == set(open_source(str(table)).labels)
