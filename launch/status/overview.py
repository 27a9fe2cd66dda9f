"""A folder of runs as a table: a line for each, with its job and its place in the queue, step, loss and time left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.slurm.queue import Queued
from launch.status.report import Report, gather
from launch.status.text import harmless, number, span

HEAD = ("name", "job", "queue", "state", "step", "loss", "tokens/s", "eta")
MARKS = ("config.yaml", "metrics.jsonl", "generations", "checkpoints", "supervise.jsonl", "submit")  # a run's files
CELL = 40  # characters


def runs_in(root: Path) -> list[Path]:
    """The run folders in `root`; none where it is one itself."""
    if not root.is_dir() or _is_run(root):
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and _is_run(path))


def overview(runs: Sequence[Path], queue: Sequence[Queued], now: float) -> list[Report]:
    """The reports of the runs, each with `queued`: the jobs of its last submission and what the queue says of them."""
    reports = []
    for path in runs:
        report = gather(path, now)
        reports.append({**report, "queued": _queued(report, queue)})
    return reports


def table(reports: Sequence[Report]) -> list[str]:
    """The lines of the table."""
    rows = [HEAD, *(_row(report) for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in MARKS)


def _queued(report: Report, queue: Sequence[Queued]) -> dict[str, Any]:
    submissions = report["submissions"] if isinstance(report["submissions"], list) else []
    started = [s for s in submissions if isinstance(s.get("submitted"), dict)]
    ids = [str(job) for job in started[-1]["submitted"].get("jobs") or ()] if started else []
    element = re.search(r"-(\d+)$", str(report["run_dir"])) if started and "folder" in started[-1] else None
    own = [f"{job}_{element[1]}" if element else job for job in ids]
    found = [q for q in queue if q.job in ids and (element is None or q.element == element[1])]
    return {"jobs": own, "queue": [q.told for q in found]}


def _row(report: Report) -> tuple[str, ...]:
    progress, queued = report["progress"], report["queued"]
    step, last = progress.get("step"), progress.get("max_steps")
    cells = (
        Path(report["run_dir"]).name,
        ",".join(queued["jobs"]) or "-",
        ", ".join(queued["queue"]) or "-",
        report["state"].get("state", "unreadable"),
        "-" if step is None else f"{step}/{last or '?'}",
        number(progress["train/loss"], ".4f") if "train/loss" in progress else "-",
        number(progress["speed/tokens_per_s"], ",.0f") if "speed/tokens_per_s" in progress else "-",
        span(progress["eta_s"]) if "eta_s" in progress else "-",
    )
    return tuple(harmless(cell, CELL) for cell in cells)
