"""mixture.png: the data of a run over its tokens: the sources' shares, their epochs and the size of a step.

matplotlib takes a second to import and another to draw, so all of it is done on a thread, and a run without matplotlib
goes on without the picture.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import publish
from data_pipeline.order.ledger import Segment
from data_pipeline.order.plan import Plan
from trainer.tracking.messages import cause, warn
from trainer.tracking.plots import COLOURS, INK, PALE, png_of

PATIENCE_S = 20.0  # that close() waits for a picture that is being drawn
_POINTS = 120  # of a line
_LABELS = 8  # events whose steps are written beside their lines


class MixturePlot:
    """Draws each plan that it is shown into a file. Used on one rank; never raises."""

    def __init__(self, path: Path, name: str, max_steps: int) -> None:
        self._path = path
        self._name = name
        self._max_steps = max_steps
        self._thread: threading.Thread | None = None  # of the newest picture; it waits for the one before

    def show(self, plan: Plan, step: int) -> None:
        """Draw the steps before `step`, which are done, and those that are planned; returns at once. One source that
        never changes is not drawn."""
        if len(plan.names) == 1 and len(plan.ledger.segments) == 1:
            return
        if importlib.util.find_spec("matplotlib") is None:
            return self._warn("matplotlib is not installed (pip install gradus[tracking])")
        self._thread = threading.Thread(target=self._draw, args=(plan, step, self._thread), name="plot", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the picture, at most PATIENCE_S."""
        if self._thread is not None:
            self._thread.join(PATIENCE_S)

    def _draw(self, plan: Plan, step: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            publish(self._path, draw(plan, step, self._max_steps, self._name))
        except Exception as e:  # a picture ends no training
            self._warn(cause(e))

    def _warn(self, why: str) -> None:
        warn(f"{self._path} is not drawn: {why}; training goes on")


def draw(plan: Plan, step: int, max_steps: int, name: str) -> bytes:
    """A PNG of the whole run; the steps before `step` are done."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ledger = plan.ledger
    segments = [s for s in ledger.segments if s.step < max_steps and s is ledger.segment(s.step)]
    steps = [*(s.step for s in segments), max_steps]
    edges = np.array([ledger.tokens(s) for s in steps], dtype=float)
    scale, unit = _unit(edges[-1])
    figure = Figure(figsize=(9, 6.6), dpi=130, layout="constrained")
    shares, epochs, sizes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.4))
    names = [n for n in plan.names if any(s.weights.get(n) for s in segments)]
    palette = COLOURS if len(names) <= len(COLOURS) else colormaps["turbo"](np.linspace(0.03, 0.97, len(names)))
    colours = dict(zip(names, palette, strict=False))
    _draw_shares(shares, segments, edges / scale, names, colours)
    _draw_epochs(epochs, plan, max_steps, scale, names, colours)
    tokens = [s.tokens_per_step for s in segments]
    size_scale, size_unit = _unit(max(tokens))
    sizes.stairs(np.array(tokens) / size_scale, edges / scale, baseline=None, color=INK, linewidth=1.6)
    sizes.set_ylabel(f"tokens\nper step{size_unit}")
    sizes.set_ylim(0, 1.15 * max(tokens) / size_scale)
    sizes.set_xlabel(f"tokens trained on{unit}")
    sizes.set_xlim(0, edges[-1] / scale)
    _mark_events(shares, (shares, epochs, sizes), segments, edges / scale)
    if 0 < step < max_steps:
        now = ledger.tokens(step) / scale
        for axes in (shares, epochs, sizes):
            axes.axvspan(now, edges[-1] / scale, color="white", alpha=0.45, linewidth=0, zorder=2.5)
            axes.axvline(now, color=INK, linewidth=1.4, zorder=4)
    done = f"drawn at step {step:,} of {max_steps:,}" + ("; paler: planned" if 0 < step < max_steps else "")
    title = figure.suptitle(f"{name}: what the run is fed", x=0.012, ha="left", fontweight="bold", color=INK)
    title.set_parse_math(False)  # a name is no formula
    figure.align_ylabels()
    figure.text(0.995, 0.008, done, ha="right", va="bottom", fontsize=8, color=PALE)
    return png_of(figure)


def _draw_shares(
    axes: Any, segments: Sequence[Segment], edges: np.ndarray, names: Sequence[str], colours: dict[str, str]
) -> None:
    """A band for each source, named on the right in the order of the bands."""
    weights = np.array([[s.weights.get(name, 0) for s in segments] for name in names], dtype=float)
    tops = np.cumsum(weights / weights.sum(axis=0), axis=0)
    low, bands = np.zeros(len(segments)), []
    for name, top in zip(names, tops, strict=True):
        bands.append(axes.stairs(100 * top, edges, baseline=100 * low, fill=True, color=colours[name]))
        low = top
    axes.set_ylabel("share of\nthe windows, %")
    axes.set_ylim(0, 100)
    axes.legend(bands[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _draw_epochs(
    axes: Any, plan: Plan, max_steps: int, scale: float, names: Sequence[str], colours: dict[str, str]
) -> None:
    """A line for each source."""
    ledger = plan.ledger
    events = [s.step for s in ledger.segments if s.step < max_steps]
    steps = np.unique([*np.linspace(0, max_steps, _POINTS).astype(int), *events]).tolist()
    tokens = np.array([ledger.tokens(s) for s in steps]) / scale
    top = 0.0
    for name in names:
        epochs = [plan.epoch(name, ledger.position(s)) for s in steps]
        axes.plot(tokens, epochs, color=colours[name], linewidth=1.8)
        top = max(top, *epochs)
    for whole in range(1, int(top) + 1) if top < 12 else ():
        axes.axhline(whole, color=PALE, linewidth=0.5, linestyle=":", zorder=0)
    axes.set_ylabel("epochs\nof each source")
    axes.set_ylim(0, 1.08 * top or 1)


def _mark_events(top: Any, panels: Sequence[Any], segments: Sequence[Segment], edges: np.ndarray) -> None:
    """A line at each change of anything but the size of a step; above it the step and the change."""
    events = []
    for number, (a, b) in enumerate(pairwise(segments), 1):
        lost = sum(map(len, b.lost.values())) - sum(map(len, a.lost.values()))
        changes = [f"n_ctx {b.n_ctx}"] * (a.n_ctx != b.n_ctx) + [f"−{lost} shard{'s' * (lost > 1)}"] * (lost > 0)
        if changes or a.weights != b.weights or a.position_at(b.step) != b.position:
            events.append((edges[number], "\n".join([f"step {b.step:,}", *changes])))
    for x, label in events:
        for axes in panels:
            axes.axvline(x, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=3)
        if len(events) <= _LABELS:
            top.annotate(
                label,
                (x, 1),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                color=INK,
            )
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


def _unit(largest: float) -> tuple[float, str]:
    """(divisor, its name on an axis) for numbers up to `largest`."""
    for size, name in ((1e12, ", trillions"), (1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands")):
        if largest >= size:
            return size, name
    return 1.0, ""
