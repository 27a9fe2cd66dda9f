"""Figures and the confusion matrix against numbers that are computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from data_pipeline.examples.examples_config import Task
from trainer.tuning.confusion import confusion, draw_confusion
from trainer.tuning.figures import figures

CORRECT, FOUND = [0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0]


def test_figures_of_two_classes() -> None:
    """Of class 1 two are found, one is missed, one is wrongly taken for it, and one of class 0 is right."""
    assert figures(Task.classification, 2, CORRECT, FOUND) == pytest.approx(
        {"acc": 0.6, "acc_stderr": math.sqrt(0.06), "f1": 2 / 3, "macro_f1": 7 / 12, "matthews": 1 / 6}
    )


def test_figures_of_several_classes_and_of_a_choice() -> None:
    """F1 of one class is told of two classes alone, and a class that is never found has 0."""
    several = figures(Task.classification, 3, [0.0, 1.0, 2.0, 2.0], [0.0, 1.0, 1.0, 1.0])
    assert "f1" not in several and several["macro_f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    choice = figures(Task.choice, 0, [0.0, 3.0, 1.0, 1.0], [0.0, 3.0, 1.0, 0.0])
    assert choice.keys() == {"acc", "acc_stderr"} and choice["acc"] == 0.75


def test_figures_of_numbers() -> None:
    """A correlation with a constant is not defined and left out."""
    got = figures(Task.similarity, 0, [1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    assert got == pytest.approx({"pearson": 3 / math.sqrt(28 / 3), "spearman": 1.0, "mse": 1 / 3})
    assert figures(Task.similarity, 0, [1.0, 2.0, 3.0], [4.0, 1.0, 0.0])["spearman"] == pytest.approx(-1)
    assert figures(Task.similarity, 0, [1.0, 2.0], [3.0, 3.0]) == {"mse": 2.5}


def test_a_confusion_matrix_is_counted_and_drawn(tmp_path: Path) -> None:
    matrix = confusion(2, CORRECT, FOUND)
    assert matrix.tolist() == [[1, 1], [1, 2]]
    draw_confusion(tmp_path / "plots/confusion.png", ["$not", "a word that is far too long for a label"], matrix)
    draw_confusion(tmp_path / "plots/confusion.png", ["no", "yes"], matrix)
    [picture] = (tmp_path / "plots").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
