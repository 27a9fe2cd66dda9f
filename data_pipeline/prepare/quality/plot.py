"""Plots of a quality model: its ROC curve, and the scores of good and raw documents."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

_GOOD, _RAW, _INK = "#4477aa", "#ee6677", "#222222"  # of Tol's bright colours, apart in any eye


def draw_roc(false: np.ndarray, true: np.ndarray, area: float) -> bytes:
    """A PNG of the curve through the false and true positive rates [points]."""
    figure, axes = _figure()
    axes.plot(false, true, color=_GOOD, linewidth=1.8, label=f"AUC {area:.4f}")
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="chance")
    axes.set_xlabel("share of the raw documents above the threshold")
    axes.set_ylabel("share of the good documents above it")
    axes.legend(loc="lower right", frameon=False)
    return _png(figure)


def draw_scores(edges: np.ndarray, positives: np.ndarray, negatives: np.ndarray, alpha: float) -> bytes:
    """A PNG of documents by score, each kind as shares of its own; `edges` [bins + 1], counts [bins]."""
    figure, axes = _figure()
    for counts, colour, name in ((positives, _GOOD, "good"), (negatives, _RAW, "raw")):
        shares = 100 * counts / counts.sum()
        axes.stairs(shares, edges, fill=True, alpha=0.5, color=colour, label=f"{name}, {counts.sum():,} documents")
    axes.set_xlabel("score")
    axes.set_ylabel("documents, %")
    scores, kept = np.linspace(0, 1, 200), axes.twinx()
    kept.plot(scores, 100 * (2 - scores) ** -alpha, color=_INK, linewidth=1.4)
    kept.set_ylabel(f"kept where pareto({alpha:g}) > 1 - score, %  (line)")
    kept.set_ylim(0, 100)
    axes.legend(loc="upper center", frameon=False)
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
