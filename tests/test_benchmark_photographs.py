"""What benchmarks/photographs/ makes of predictions: cuts, counts, intervals. Nothing is trained here."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from benchmarks.photographs import __main__ as comparison
from benchmarks.photographs.cuts import cut_folds, link_fold, own_split, write_images
from benchmarks.photographs.paired import compare, interval, macro_f1
from benchmarks.photographs.rivals import ABLATIONS, Predictions, python_of, read_predictions, run
from dataset.sources import DataError, Entry
from tests.folders import make_folder
from training.command_line import parse
from training.options import make_options


def correct(both, only_ours, only_other, neither):
    """Two runs with these counts, as bool (1, N) each."""
    parts = [(True, True)] * both + [(True, False)] * only_ours + [(False, True)] * only_other
    ours, other = np.array(parts + [(False, False)] * neither).T
    return ours[None], other[None]


def entries(**numbers):
    return [Entry(f"train/{label}/{i}.jpg", label, "train") for label, number in numbers.items() for i in range(number)]


def test_mcnemars_counts_and_the_paired_interval_are_those_of_a_hand_calculation():
    found = compare(*correct(both=70, only_ours=15, only_other=5, neither=10))
    assert [found[key] for key in ("both", "only_ours", "only_other", "neither")] == [70, 15, 5, 10]
    # (15 - 5) / 100; √(15 + 5 - (15 - 5)² / 100) / 100 = √19 / 100 = 0.0435890; times 1.959964 = 0.0854328
    assert found["difference"] == pytest.approx(0.10)
    assert (found["low"], found["high"]) == (pytest.approx(0.0145672, abs=1e-6), pytest.approx(0.1854328, abs=1e-6))
    # 2 · (C(20,0) + … + C(20,5)) / 2²⁰ = 2 · (1 + 20 + 190 + 1140 + 4845 + 15504) / 1048576
    assert found["p"] == pytest.approx(2 * 21700 / 1048576)


def test_the_difference_changes_its_sign_with_the_sides():
    ours, other = correct(both=3, only_ours=4, only_other=1, neither=2)
    one, reverse = compare(ours, other), compare(other, ours)
    assert (one["difference"], one["low"], one["p"]) == (-reverse["difference"], -reverse["high"], reverse["p"])
    assert (one["only_ours"], one["only_other"]) == (reverse["only_other"], reverse["only_ours"]) == (4, 1)


def test_equal_predictions_differ_by_nothing():
    found = compare(*correct(both=8, only_ours=0, only_other=0, neither=2))
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)


def test_a_seed_that_repeats_another_makes_nothing_more_certain():
    ours, other = correct(both=70, only_ours=15, only_other=5, neither=10)
    one, two = compare(ours, other), compare(np.repeat(ours, 2, axis=0), np.repeat(other, 2, axis=0))
    assert [one[key] for key in ("difference", "low", "high")] == [two[key] for key in ("difference", "low", "high")]
    assert two["only_ours"] == 2 * one["only_ours"]
    assert "p" not in two


def test_the_interval_of_a_proportion_is_walds():
    # 0.9 ± 1.959964 · √(0.9 · 0.1 / 100) = 0.9 ± 0.0587989
    mean, low, high = interval(np.array([1.0] * 90 + [0.0] * 10))
    assert (mean, low, high) == (0.9, pytest.approx(0.8412011), pytest.approx(0.9587989))


def test_macro_f1_is_the_plain_mean_of_the_classes():
    targets, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    # class 0: precision 2/3, recall 2/3; class 1: 1/3, 1/2; class 2 is never predicted
    assert macro_f1(targets, predicted, 3) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)


def test_folds_are_level_in_each_class_and_in_total():
    images = entries(cat=23, dog=12, owl=4)
    folds = cut_folds(images, 5, seed=0)
    for label in ("cat", "dog", "owl"):
        counts = Counter(dict.fromkeys(range(5), 0))
        counts.update(fold for image, fold in zip(images, folds, strict=True) if image.label == label)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert sorted(Counter(folds).values()) == [7, 8, 8, 8, 8]


def test_folds_follow_from_names_and_seed_and_not_from_the_order():
    images = entries(cat=23, dog=12)
    folds = dict(zip([image.key for image in images], cut_folds(images, 5, seed=0), strict=True))
    backwards = images[::-1]
    assert dict(zip([image.key for image in backwards], cut_folds(backwards, 5, seed=0), strict=True)) == folds
    assert list(folds.values()) != cut_folds(images, 5, seed=1)


def test_data_without_a_test_split_has_none_of_its_own():
    with pytest.raises(DataError, match="--split own: the data has no test/ folder"):
        own_split(entries(cat=2, dog=2))


def test_every_image_is_linked_once_and_is_tested_in_its_own_fold_only(tmp_path):
    data = make_folder(tmp_path / "photos", splits=("train", "test"))
    found, files = write_images(str(data), tmp_path / "images")
    folds = cut_folds(found, 3, seed=0)
    tested = []
    for fold in range(3):
        folder = link_fold(files, folds, fold, tmp_path / f"fold{fold}")
        train, test = ({p.relative_to(folder / s) for p in (folder / s).glob("*/*")} for s in ("train", "test"))
        assert len(train) + len(test) == len(files) and not train & test
        assert all(path.read_bytes() for path in folder.glob("*/*/*"))
        tested += test
    assert len(set(tested)) == len(tested) == len(files)


def predictions(targets, predicted, names, seconds=60.0):
    return Predictions(names, np.array(targets), np.array(predicted), {"seconds": seconds})


def test_the_folds_are_put_together_by_name():
    ours = [predictions([0], [0], ["a/2"]), predictions([1, 0], [1, 1], ["b/1", "a/1"], seconds=80)]
    other = [predictions([0, 1], [0, 0], ["a/1", "b/1"]), predictions([0], [1], ["a/2"])]
    rows = comparison.summarise({"ours": [ours], "timm": [other]}, "ours")
    assert rows["ours"]["accuracy"] == pytest.approx(2 / 3)
    assert rows["ours"]["seconds"] == 70
    assert rows["timm"]["accuracy"] == pytest.approx(1 / 3)
    pair = rows["timm"]["against"]
    assert (pair["only_ours"], pair["only_other"], pair["both"], pair["neither"]) == (2, 1, 0, 0)
    assert pair["difference"] == pytest.approx(rows["ours"]["accuracy"] - rows["timm"]["accuracy"])
    assert "2 / 1" in comparison.table(rows, "ours")


def test_rivals_that_predicted_different_images_are_not_compared():
    ours, other = [predictions([0], [0], ["a/1"])], [predictions([0], [0], ["a/2"])]
    with pytest.raises(ValueError, match="have predicted different images"):
        comparison.summarise({"ours": [ours], "timm": [other]}, "ours")


def test_ours_is_first_and_the_others_rotate():
    names = ["timm", "ours", "fastai"]
    assert [comparison.in_turn(names, number) for number in range(2)] == [
        ["ours", "timm", "fastai"],
        ["ours", "fastai", "timm"],
    ]


def test_predictions_that_are_there_are_not_made_again(tmp_path):
    out = tmp_path / "fold0-seed0.npz"
    facts = json.dumps({"seconds": 1.5})
    np.savez(out, names=["a/1", "b/1"], labels=["a", "b"], probabilities=[[0.9, 0.1], [0.8, 0.2]], facts=facts)
    found = run("no_such_module", tmp_path, out, python=tmp_path / "no-python", minutes=1, seed=0, threads=1)
    assert found.names == ["a/1", "b/1"]
    assert (found.targets.tolist(), found.predicted.tolist()) == ([0, 1], [0, 0])
    assert found.facts == read_predictions(out).facts == {"seconds": 1.5}


def test_a_folder_of_other_settings_is_not_gone_on_with(tmp_path):
    comparison.claim(tmp_path, {"minutes": 3})
    comparison.claim(tmp_path, {"minutes": 3})
    with pytest.raises(ValueError, match="holds predictions of other settings"):
        comparison.claim(tmp_path, {"minutes": 1})


def test_a_peer_without_its_environment_says_what_is_missing():
    with pytest.raises(ValueError, match="fastai: needs --peers"):
        python_of("fastai", None)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_options_that_train_knows(name):
    command, given = parse(["--data", "DIR", "--out", "RUN", "--epochs", "3", *ABLATIONS[name]], None)
    assert make_options(None, given, command.recipe).epochs == 3
