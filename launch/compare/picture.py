"""The picture of several runs' curves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from launch.compare.curves import LOSSES, Curves
from trainer.tracking.plots import COLOURS, PALE, png_of, thinned

ACROSS = ("steps", "tokens", "hours")
NAMES = {"train/loss": "training loss, nats a token", "val/loss": "validation loss, nats a token"}


def draw(curves: Mapping[str, Curves]) -> bytes:
    """A PNG: a row of panels for each loss, over steps, tokens and hours; a colour for each run."""
    from matplotlib.figure import Figure

    shown = [loss for loss in LOSSES if any(loss in run.points for run in curves.values())]
    figure = Figure(figsize=(13, 4 * len(shown) + 0.25 * len(curves)), dpi=110, layout="constrained")
    panels = figure.subplots(len(shown), len(ACROSS), squeeze=False, sharey="row", sharex="col")
    colours = dict(zip(curves, cycle(COLOURS), strict=False))
    dashes = dict(zip(curves, [style for style in ("-", "--", ":", "-.") for _ in COLOURS] * len(curves), strict=False))
    for loss, row in zip(shown, panels, strict=True):
        for across, axes in zip(ACROSS, row, strict=True):
            for name, run in curves.items():
                line = [(getattr(p, across), p.loss) for p in thinned(run.points.get(loss, []))]
                marks = {"marker": "o", "markersize": 3} if len(line) < 100 else {}
                xy = zip(*line, strict=True) if line else ((), ())
                axes.plot(*xy, color=colours[name], linestyle=dashes[name], linewidth=1.2, **marks)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=PALE, alpha=0.25, linewidth=0.5)
        _scale(row[0], [p.loss for run in curves.values() for p in run.points.get(loss, [])])
        row[0].set_ylabel(NAMES[loss])
    for across, axes in zip(ACROSS, panels[-1], strict=True):
        axes.set_xlabel(across)
    names = [f" {name}" for name in curves]  # matplotlib hides a label that begins with _
    legend = figure.legend(panels[0][0].lines, names, loc="outside lower center", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name is no formula
    return png_of(figure)


def _scale(axes: Any, losses: list[float]) -> None:
    """A logarithmic scale for losses that fall far."""
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
