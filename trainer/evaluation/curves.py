"""Curves of many evaluations: shots.png, figures over demonstrations, and steps.png, over the steps of training."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.files import publish, read_json
from trainer.evaluation.report import STDERR
from trainer.run.folder import step_of
from trainer.tracking.plots import COLOURS, INK, png_of

CURE = "move it away"
SAME = ("limit", "seed", "max_new_tokens")  # settings that the points of a curve have in common


class Point(NamedTuple):
    """A figure with its standard error, NaN where there is none; `x`: demonstrations, or steps."""

    x: int
    value: float
    stderr: float


Lines = dict[str, dict[str, list[Point]]]  # by metric, by task


def draw_curves(report: Path) -> list[Path]:
    """Draw the curves that a report adds a point to; returns the files that were written.

    shots.png, beside the report, is of one checkpoint; steps.png, one folder above, of all checkpoints of a run with as
    many demonstrations. A curve has two points or more, and a task its first figure.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no curves are drawn: matplotlib is not installed (pip install gradus[tracking])", file=sys.stderr)
        return []
    found = (
        (report.with_name("shots.png"), "demonstrations", shots_lines(report)),
        (report.parent.with_name("steps.png"), "step", steps_lines(report)),
    )
    for path, label, lines in found:
        if lines:
            publish(path, _draw(lines, label))
    return [path for path, _, lines in found if lines]


def shots_lines(report: Path) -> Lines:
    """Figures of the report's checkpoint over the number of demonstrations."""
    return _lines(_alike(report, report.parent, SAME), lambda body, result: int(result.get("shots", 0)))


def steps_lines(report: Path) -> Lines:
    """Figures over the steps of the report's run."""
    folders = sorted(report.parent.parent.glob("step-*.gen-*/"))
    alike = [body for folder in folders for body in _alike(report, folder, (*SAME, "shots"))]
    return _lines(alike, lambda body, result: step_of(Path(body["checkpoint"])))


def _alike(report: Path, folder: Path, same: tuple[str, ...]) -> list[dict[str, Any]]:
    """The reports in a folder that have these settings as `report` has, oldest first."""

    def settings(body: dict[str, Any]) -> list[Any]:
        return [body["settings"].get(key) for key in same]

    own = settings(read_json(report, CURE))
    newest_last = sorted(folder.glob("report-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [body for body in (read_json(path, CURE) for path in newest_last) if settings(body) == own]


def _lines(reports: list[dict[str, Any]], x: Callable[[dict[str, Any], dict[str, Any]], int]) -> Lines:
    points: dict[tuple[str, str], dict[int, Point]] = {}
    for report in reports:
        for task, result in report["results"].items():
            at, metric = x(report, result), _first_figure(result)
            if metric is not None:
                stderr = result.get(metric + STDERR)
                point = Point(at, result[metric], float("nan") if stderr is None else stderr)
                points.setdefault((metric, task), {})[at] = point
    lines: Lines = {}
    for (metric, task), by_x in points.items():
        if len(by_x) > 1:
            lines.setdefault(metric, {})[task] = sorted(by_x.values())
    return lines


def _first_figure(result: dict[str, Any]) -> str | None:
    return next((k for k, v in result.items() if isinstance(v, float) and not k.endswith(STDERR)), None)


def _draw(lines: Lines, label: str) -> bytes:
    """A PNG with a panel for each metric and a line for each task, with bars of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 3 * len(lines)), dpi=110, layout="constrained")
    panels = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    for axes, (metric, tasks) in zip(panels, lines.items(), strict=True):
        for i, (task, points) in enumerate(tasks.items()):
            xs, values, errors = zip(*points, strict=True)
            axes.errorbar(
                xs, values, errors, color=COLOURS[i % len(COLOURS)], linewidth=1.3, marker="o", markersize=3, label=task
            )
        axes.set_ylabel(metric)
        axes.set_xlabel(label, color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        for text in axes.legend(frameon=False).get_texts():
            text.set_parse_math(False)  # a name is no formula
    return png_of(figure)
