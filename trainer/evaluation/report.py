"""The report of an evaluation: one JSON, the samples behind it, and a table for the terminal."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.errors import of_nature
from data_pipeline.files import publish
from trainer.evaluation.kinds.kind import Outcome
from trainer.evaluation.tasks.description import Reference

STDERR = "_stderr"
LONGEST_NAME = 100  # letters of a task in the name of a file


def result_of(outcome: Outcome) -> dict[str, Any]:
    """The figures of a task with n, and the rules that they cannot be read without. A figure that is no number, such
    as the standard error of one question, is None: JSON has no other word for it."""
    parts = {name: _finite(figures) for name, figures in outcome.parts.items()}
    return {"n": outcome.n, **_finite(outcome.figures), **parts, **outcome.notes}


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def publish_report(
    folder: Path, settings: Mapping[str, Any], report: dict[str, Any], outcomes: Mapping[str, Outcome]
) -> Path:
    """Write the report, and a file of samples for each task; the same settings have the same name. Returns its path."""
    name = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    path = folder / f"report-{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task, outcome in outcomes.items():
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in outcome.samples)
            named = re.sub(r"[^\w.-]+", "_", task.removesuffix(".yaml"))[-LONGEST_NAME:]
            publish(folder / f"samples-{name}-{named}.jsonl", lines.encode())
        publish(path, (json.dumps({**report, "settings": settings}, ensure_ascii=False, indent=1) + "\n").encode())
    except OSError as e:
        raise of_nature(e, f"{folder}: {(e.strerror or str(e)).lower()}: give output=, another folder") from e
    return path


def table(results: Mapping[str, Mapping[str, Any]], references: Mapping[str, tuple[Reference, ...]], size: int) -> str:
    """A line for each figure: its standard error, n, and what a model of the nearest size has by others' reports."""
    rows = [("task", "metric", "value", "±", "n", "reported by others")]
    for task, result in results.items():
        for metric, value in result.items():
            if not isinstance(value, float) or metric.endswith(STDERR):
                continue
            stderr = result.get(metric + STDERR)
            rows.append(
                (
                    task,
                    metric,
                    f"{value:.4g}",
                    "" if stderr is None else f"{stderr:.2g}",
                    str(result["n"]),
                    _nearest(references.get(task, ()), metric, int(result.get("shots", 0)), size),
                )
            )
    return "\n".join([*_aligned(rows), *_overlaps(results), *_rules(results)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _overlaps(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each figure of tasks that were searched in training documents, as in GPT-3's table C.1."""
    rows = [("task", "metric", "all", "clean", "n", "dirty", "n", "share", "clean against all")]
    for task, result in results.items():
        if "clean" not in result:
            continue
        clean, dirty = result["clean"], result["dirty"]
        counts = str(clean["n"]), str(dirty["n"]), f"{dirty['share']:.1%}"
        metrics = [m for m in result if m in {**clean, **dirty} and m != "n" and not m.endswith(STDERR)]
        for metric in metrics or [""]:
            total, rest, found = (some.get(metric) for some in (result, clean, dirty))
            change = f"{(rest - total) / abs(total):+.1%}" if total and rest is not None else ""
            shown = ["" if value is None else f"{value:.4g}" for value in (total, rest, found)]
            rows.append((task, metric, shown[0], shown[1], counts[0], shown[2], counts[1], counts[2], change))
    return ["", *_aligned(rows), ""] if len(rows) > 1 else []


def _rules(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    figure = float | dict | None
    found = {
        task: {k: v for k, v in r.items() if k != "n" and not isinstance(v, figure)} for task, r in results.items()
    }
    return [f"{task}: {', '.join(f'{k} {v}' for k, v in rules.items())}" for task, rules in found.items() if rules]


def _nearest(references: tuple[Reference, ...], metric: str, shots: int, size: int) -> str:
    fitting = [r for r in references if r.metric == metric and (r.shots > 0) == (shots > 0)]
    if not fitting:
        return ""
    r = min(fitting, key=lambda r: abs(r.parameters - size))
    return f"{r.value:.4g} {r.model} ({r.source})"
