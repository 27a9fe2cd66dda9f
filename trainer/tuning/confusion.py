"""The confusion matrix of a classification, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import publish
from trainer.tracking.plots import INK, png_of

WRITTEN = 30  # classes up to which each cell shows its number


def confusion(classes: int, correct: Sequence[float], found: Sequence[float]) -> np.ndarray:
    """The number of examples of each class (row) that are taken for each class (column), int64 [classes, classes]."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (np.asarray(correct, np.int64), np.asarray(found, np.int64)), 1)
    return matrix


def draw_confusion(path: Path, classes: Sequence[str], matrix: np.ndarray) -> None:
    """Put a picture of the matrix at `path`; its shades are shares of each row.

    Raises:
        ImportError: no matplotlib.
    """
    from matplotlib.figure import Figure

    n = len(classes)
    side = min(12.0, 3.5 + 0.6 * n)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes: Any = figure.add_subplot()
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for (row, column), count in np.ndenumerate(matrix[:WRITTEN, :WRITTEN] if n <= WRITTEN else matrix[:0]):
        colour = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
    for axis, label in ((axes.xaxis, "the model's class"), (axes.yaxis, "the class in the data")):
        axis.set_ticks(range(n))
        for text in axis.set_ticklabels(names, rotation=45 if axis is axes.xaxis else 0):
            text.set_parse_math(False)  # a class is no formula
        axis.set_label_text(label)
    axes.set_title(f"held out: {matrix.trace():,} of {matrix.sum():,} right", loc="left", fontweight="bold", color=INK)
    path.parent.mkdir(exist_ok=True)
    publish(path, png_of(figure))
