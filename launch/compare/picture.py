"""The picture of several runs' curves, and the proof that a file is such a picture."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.files import open_regular
from launch.compare.curves import LOSSES, Curves
from trainer.tracking.plots import COLOURS, PALE, thinned

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SOFTWARE = "gradus launch.compare"
MARK = b"tEXtSoftware\0" + SOFTWARE.encode()  # stands in each picture: the proof that it may be replaced
HEAD_BYTES = 4096  # in which the mark stands
ACROSS = ("steps", "tokens", "hours")
NAMES = {"train/loss": "training loss, nats a token", "val/loss": "validation loss, nats a token"}
OTHERWISE = "give another output, or output=null for the table alone"


def refuse_strangers(path: Path) -> None:
    """Raise UserError if a picture cannot be drawn to `path`: what is there is not ours, or no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"output={path}: matplotlib is not installed (pip install gradus[tracking]): {OTHERWISE}")
    if not path.parent.is_dir():
        raise UserError(f"output={path}: {path.parent} is no folder: make it, or {OTHERWISE}")
    if path.is_symlink() or (path.exists() and not _ours(path)):
        raise UserError(f"output={path}: it is there and no picture of launch.compare: move it away, or {OTHERWISE}")


def _ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with open_regular(path, OTHERWISE) as f:
        begins = f.read(HEAD_BYTES)
    return begins.startswith(SIGNATURE) and MARK in begins


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
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": SOFTWARE})
    return out.getvalue()


def _scale(axes: Any, losses: list[float]) -> None:
    """A logarithmic scale for losses that fall far."""
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
