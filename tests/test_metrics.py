import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, top_k_accuracy_score

from training.metrics import expected_calibration_error, score

LABELS = ["a", "b", "c", "d", "e", "f"]


def test_the_numbers_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(300, 6, generator=generator), torch.randint(0, 6, (300,), generator=generator)
    predicted = logits.argmax(dim=1)
    got = score(logits, targets, LABELS)
    assert got["accuracy"] == pytest.approx(accuracy_score(targets, predicted))
    assert got["top5"] == pytest.approx(top_k_accuracy_score(targets, logits, k=5))
    for name, expected in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert got["macro"][name] == pytest.approx(expected(targets, predicted, average="macro"))
        assert got["per_class"]["c"][name] == pytest.approx(expected(targets, predicted, average=None)[2])
    assert sum(row["images"] for row in got["per_class"].values()) == got["images"] == 300


def test_a_class_without_test_images_counts_as_zero_and_warns_nobody():
    got = score(torch.eye(3)[[0, 1]], torch.tensor([0, 1]), ["a", "b", "c"])
    assert got["accuracy"] == got["top5"] == 1.0
    assert got["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 0}


def test_a_class_without_test_images_takes_nothing_from_the_mean_over_the_classes():
    got = score(torch.eye(20)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1]), [str(i) for i in range(20)])
    assert got["macro"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    wrongly = score(torch.eye(3)[[0, 2]], torch.tensor([0, 1]), ["a", "b", "c"])  # c is predicted, though it has none
    assert wrongly["macro"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5}


def test_the_baseline_is_the_share_of_the_largest_class():
    got = score(torch.eye(3)[[0, 2, 2, 2]], torch.tensor([0, 1, 1, 2]), ["a", "b", "c"])
    assert got["baseline"] == 0.5
    assert got["most_predicted"] == {"label": "c", "share": 0.75}


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    sure = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    targets = torch.tensor([0] * 9 + [1])
    assert expected_calibration_error(sure, targets) == pytest.approx(0.0, abs=1e-6)
    assert expected_calibration_error(sure, torch.ones(10, dtype=torch.long)) == pytest.approx(0.9)
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0.0
