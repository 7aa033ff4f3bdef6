"""Data sets saved by Hugging Face's `datasets`: labels, splits, names, and that nothing outside the folder is read."""

import json
import shutil
import socket

import pytest

datasets = pytest.importorskip("datasets", reason="pip install datasets")

from dataset.loading import load  # noqa: E402
from dataset.overview import look  # noqa: E402
from dataset.sources import DataError, Unreadable, huggingface, open_source  # noqa: E402
from predictor.spec import PixelRule  # noqa: E402
from tests.folders import make_folder  # noqa: E402

NAMES = ["blue", "green", "red"]


def rows(folder, named=True):
    """The images of a folder, in the order of their paths."""
    paths = sorted(folder.rglob("*.jpg"))
    images = [{"bytes": path.read_bytes(), "path": path.name if named else None} for path in paths]
    return images, [path.parent.name for path in paths]


def as_dataset(images, labels, **more):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["unused", *NAMES])}
    features |= {name: datasets.Value("string") for name in more}
    return datasets.Dataset.from_dict({"image": images, "label": labels, **more}, datasets.Features(features))


def save(dataset, path):
    datasets.disable_progress_bars()
    dataset.save_to_disk(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hf") / "pics", count=10)


@pytest.fixture(scope="module")
def saved(folder):
    return save(as_dataset(*rows(folder)), folder.parent / "saved")


def listed(source):
    return [(entry.key, entry.label, entry.split) for entry in source.entries]


def test_it_is_the_folder_that_it_was_made_of(folder, saved, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # no network is touched
    there, here = open_source(str(saved)), open_source(str(folder))
    assert (there.name, there.labels, listed(there)) == ("saved", here.labels, listed(here))
    assert list(there.read()) == list(here.read())
    assert look(there).lines() == look(here).lines()
    rule = PixelRule.square(8)
    assert load(str(saved), rule=rule).test.names == load(str(folder), rule=rule).test.names


def test_a_dataset_dict_brings_its_splits(tmp_path):
    folder = make_folder(tmp_path / "pics", count=2, splits=("train", "validation", "test"))
    parts = {split: as_dataset(*rows(folder / split)) for split in ("train", "validation", "test")}
    source = open_source(str(save(datasets.DatasetDict(parts), tmp_path / "saved")))
    assert listed(source) == listed(open_source(str(folder)))
    assert {entry.split for entry in source.entries} == {"train", "val", "test"}


def test_images_without_a_name_of_their_own_are_called_by_their_rows(folder, tmp_path):
    source = open_source(str(save(as_dataset(*rows(folder, named=False)), tmp_path / "a")))
    assert [entry.key for entry in source.entries][:3] == ["blue/#0", "blue/#1", "blue/#2"]
    images, labels = rows(folder)
    twice = as_dataset([*images, {**images[-1], "path": "0.jpg"}], [*labels, "red"])
    source = open_source(str(save(twice, tmp_path / "b")))
    assert {entry.key for entry in source.entries} == {e.key for e in open_source(str(folder)).entries} | {"red/#30"}


@pytest.mark.parametrize("label", ["text", "number"])
def test_labels_may_be_text_or_whole_numbers(folder, tmp_path, label):
    images, labels = rows(folder)
    kind, cells = ("string", labels) if label == "text" else ("int64", [NAMES.index(one) for one in labels])
    features = datasets.Features(photo=datasets.Image(), label=datasets.Value(kind))
    dataset = datasets.Dataset.from_dict({"photo": images, "label": cells}, features)
    assert open_source(str(save(dataset, tmp_path / "saved"))).labels == (NAMES if label == "text" else ["0", "1", "2"])


def test_an_image_that_is_only_named_is_unreadable_and_never_read(folder, tmp_path):
    images, labels = rows(folder)
    images[0] = {"bytes": None, "path": "/etc/hostname"}
    features = datasets.Features(image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    plain = datasets.Dataset.from_dict({"image": images}, features).add_column("label", labels)
    saved = save(plain, tmp_path / "saved")
    info = json.loads((saved / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    (saved / "dataset_info.json").write_text(json.dumps(info))
    source = open_source(str(saved))
    bad = [(source.entries[i].key, body) for i, body in source.read() if isinstance(body, Unreadable)]
    assert [name for name, _ in bad] == ["blue/hostname"]
    assert "names a file and does not hold it" in bad[0][1].reason


def test_what_cannot_be_trained_on_is_named(folder, tmp_path):
    images, labels = rows(folder)
    numbers = [NAMES.index(label) + 1 for label in labels]
    cases = {
        "row 0 has no label": as_dataset(images, [-1, *numbers[1:]]),
        r"no column is the image \('label', 'text'\)": as_dataset(images, labels, text=labels).remove_columns("image"),
        "no column is the label": as_dataset(images, labels).remove_columns("label"),
        r"2 columns could be the label \('kind', 'other'\)": as_dataset(
            images, labels, kind=labels, other=labels
        ).remove_columns("label"),
        "has no rows|cannot be loaded": as_dataset([], []),
        "has a split 'extra'": datasets.DatasetDict(train=as_dataset(images, labels), extra=as_dataset(images, labels)),
        "has no split 'train'": datasets.DatasetDict(test=as_dataset(images, labels)),
    }
    for number, (words, dataset) in enumerate(cases.items()):
        path = save(dataset, tmp_path / str(number))
        with pytest.raises(DataError, match=words) as caught:
            open_source(str(path))
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cell", [4, -2])
def test_a_label_that_is_the_number_of_no_class_is_named(folder, tmp_path, cell):
    """`datasets` checks numbers as it makes a column, but not what it loads."""
    images, labels = rows(folder)
    numbers = [NAMES.index(label) + 1 for label in labels]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    plain = datasets.Dataset.from_dict({"image": images, "label": [*numbers[:7], cell, *numbers[8:]]}, features)
    saved = save(plain, tmp_path / "saved")
    info = json.loads((saved / "dataset_info.json").read_text())
    info["features"]["label"] = {"names": ["unused", *NAMES], "_type": "ClassLabel"}
    (saved / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=f"row 7: column 'label': {cell} is the number of no class, which are 0 to 3"):
        open_source(str(saved))


def test_a_file_that_is_far_too_large_is_unreadable(saved, monkeypatch):
    source = open_source(str(saved))
    sizes = [len(body) for _, body in source.read()]
    monkeypatch.setattr(huggingface, "MAX_FILE_BYTES", max(sizes) - 1)
    assert sum(isinstance(body, Unreadable) for _, body in source.read()) == sizes.count(max(sizes))
    assert look(source).looked_at == len(sizes) - sizes.count(max(sizes))


def test_damage_and_files_elsewhere_are_named(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "saved")
    state = json.loads((path / "state.json").read_text())
    state["_data_files"][0]["filename"] = f"../saved/{state['_data_files'][0]['filename']}"
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"names a file outside, '\.\./saved/data-"):
        open_source(str(path))
    for broken in ("{}", "nothing"):
        (path / "state.json").write_text(broken)
        with pytest.raises(DataError, match="cannot be loaded") as caught:
            open_source(str(path))
        assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="the extra 'datasets'; pip install datasets"):
        open_source(str(saved))
