"""Figures of predictions on labelled examples: accuracy, F1 and Matthews' correlation, or correlations of numbers."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence

import numpy as np

from conf.errors import UserError
from data_pipeline.examples.examples_config import Task
from trainer.evaluation.kinds.metrics import label_f1, matthews, mean_and_stderr
from trainer.evaluation.report import STDERR

LIBRARIES = {Task.classification: ("sklearn",), Task.similarity: ("scipy",)}


def check_figures(task: Task) -> None:
    """Raises UserError if a library is missing that computes the figures of a task."""
    for library in LIBRARIES.get(task, ()):
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"examples.task={task.value} with held-out examples: {library} is not installed, which computes their "
                "figures: pip install gradus[eval], or give held_out.path=null and held_out.fraction=0"
            )


def figures(task: Task, classes: int, correct: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    """The figures of a task by name, without those that are not defined, such as a correlation with a constant.

    `correct`, `found`: classes, similarities or numbers of answers, one of each example. `classes`: their number.
    """
    if task is Task.similarity:
        values = {"pearson": pearson(correct, found), "spearman": spearman(correct, found)}
        values["mse"] = float(np.mean((np.asarray(correct) - np.asarray(found)) ** 2))
        return _finite(values)
    pairs = [(int(a), int(b)) for a, b in zip(correct, found, strict=True)]
    accuracy, error = mean_and_stderr([float(a == b) for a, b in pairs])
    values = {"acc": accuracy, f"acc{STDERR}": error}
    if task is Task.classification:
        truth, chosen = zip(*pairs, strict=True)
        with warnings.catch_warnings(action="ignore"):  # a class that is never chosen has F1 0
            values["macro_f1"] = label_f1(truth, chosen, "macro")
            if classes == 2:
                values["f1"] = label_f1(truth, chosen)
            values["matthews"] = matthews(truth, chosen)
    return _finite(values)


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation, NaN where it is not defined."""
    from scipy.stats import pearsonr

    with warnings.catch_warnings(action="ignore"):
        return float(pearsonr(a, b).statistic) if len(a) > 1 else math.nan


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation of ranks, NaN where it is not defined."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings(action="ignore"):
        return float(spearmanr(a, b).statistic) if len(a) > 1 else math.nan


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
