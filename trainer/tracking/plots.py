"""plots/*.png: loss, gradient norm, throughput and accuracies on tasks over the steps, from the journal.

`python -m trainer.tracking.plots RUN_DIR NAME`: shipper.py runs it as its own process, for drawing takes seconds.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import UserError
from data_pipeline.files import publish
from trainer.run.folder import RunFolder
from trainer.run.journal import Row, read_journal, read_rows

T = TypeVar("T")
SOFTWARE = "gradus"  # in each picture
HEAD_BYTES = 4096  # in which it stands
POINTS = 4000  # of a line: more than the picture has columns
INK, PALE = "#222222", "#8a8a8a"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Tol's bright, apart in any eye
DASHES = ("-", "--", ":", "-.")  # of the first lines, of those for which the colours come again, and so on
ACCURACIES = ("acc", "exact_match", "exact_text", "f1", "coqa_f1")  # metrics of tasks, from 0 to 1
CURVES = {
    "loss": ("nats a token", ("train/loss", "val/loss", "val/train_loss")),
    "grad_norm": ("gradient norm", ("optim/grad_norm",)),
    "throughput": ("tokens a second", ("speed/tokens_per_s",)),
}


def draw_run(folder: RunFolder, name: str) -> list[Path]:
    """Draw the curves that the journal has numbers for; return the files that were written.

    Raises:
        UserError: the journal is damaged. ImportError: no matplotlib.
    """
    if not folder.metrics.exists():
        return []
    rows = read_journal(folder.metrics)
    starts = [row.step for row, _ in read_rows(folder.metrics) if row.resumed_at]
    drawn = []
    of_tasks = sorted({key for row in rows for key in row.metrics if key.startswith("task/")})
    accuracies = tuple(key for key in of_tasks if key.rpartition("/")[2] in ACCURACIES)
    for curve, (label, keys) in {**CURVES, "accuracy": ("share of right answers", accuracies)}.items():
        lines = {key: points(rows, key) for key in keys}
        if any(lines.values()):
            folder.plots.mkdir(exist_ok=True)
            publish(path := folder.plots / f"{curve}.png", draw(f"{name}: {curve}", label, lines, starts))
            drawn.append(path)
    return drawn


def points(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    """(step, value) of the finite values, `thinned`."""
    return thinned([(row.step, row.metrics[key]) for row in rows if math.isfinite(row.metrics.get(key, math.nan))])


def thinned(line: list[T]) -> list[T]:
    """The points of a line; of a long one every n-th, and the last."""
    every = -(-len(line) // POINTS) or 1
    return line[::every] + line[-1:] * (len(line) % every != 1 and every > 1)


def draw(title: str, label: str, lines: dict[str, list[tuple[int, float]]], starts: Sequence[int]) -> bytes:
    """A PNG with a curve for each key; `starts`: steps at which a later start resumed, each a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes: Any = figure.add_subplot()
    for i, (key, curve) in enumerate(lines.items()):
        if curve:
            marks = {"marker": "o", "markersize": 3} if len(curve) < 100 else {}
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            axes.plot(*zip(*curve, strict=True), color=colour, linestyle=dash, linewidth=1.3, label=key, **marks)
    for step in sorted(set(starts)):
        axes.axvline(step, color=PALE, linewidth=0.8, linestyle=":", zorder=0)
    values = [value for curve in lines.values() for _, value in curve]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("step" + ("; dotted: a start went on from there" if starts else ""))
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontweight="bold", color=INK).set_parse_math(False)  # a name is no formula
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return png_of(figure)


def png_of(figure: Any) -> bytes:
    """The figure as a PNG file, which names us as its software: the proof that it may be replaced."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": SOFTWARE})
    return out.getvalue()


def check_picture(path: Path, key: str) -> None:
    """Raise UserError if no picture can be drawn to `path`, the value of `key`: what is there is not ours, or no
    matplotlib."""
    otherwise = f"give another {key}, or {key}=null"
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{key}={path}: matplotlib is not installed (pip install gradus[tracking]): {otherwise}")
    if not path.parent.is_dir():
        raise UserError(f"{key}={path}: {path.parent} is no folder: make it, or {otherwise}")
    if path.is_symlink() or (path.exists() and not _ours(path)):
        raise UserError(f"{key}={path}: it is there and no picture of ours: move it away, or {otherwise}")


def _ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as f:
        begins = f.read(HEAD_BYTES)
    return begins.startswith(b"\x89PNG\r\n\x1a\n") and b"tEXtSoftware\0" + SOFTWARE.encode() in begins


def main(root: str, name: str) -> None:
    os.nice(19)  # the training beside it comes first
    try:
        draw_run(RunFolder(root), name)
    except ImportError:
        sys.exit("matplotlib is not installed (pip install gradus[tracking])")
    except (UserError, OSError) as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main(*sys.argv[1:])
