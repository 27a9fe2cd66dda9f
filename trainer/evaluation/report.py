"""The report of an evaluation: one JSON, the samples behind it, and a table for the terminal."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
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
    figures = {name: value if math.isfinite(value) else None for name, value in outcome.figures.items()}
    return {"n": outcome.n, **figures, **outcome.notes}


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_rules(results)])


def _rules(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    figure = float | None
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
