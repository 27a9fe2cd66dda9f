"""The losses of a run over its steps, tokens and hours, from its journal, whatever that holds: reading is bounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.errors import UserError
from data_pipeline.files import open_regular
from trainer.run.journal import Row, joined, parse_row

LOSSES = ("train/loss", "val/loss")
TOKENS = "data/tokens"
JOURNAL_BYTES = 128 << 20  # that are read of a journal
LINE_BYTES = 1 << 20  # of a line; a row has some hundreds
LAST_STEP = 1 << 53  # above it a float is not exact
REST = "the rest is shown"


class Point(NamedTuple):
    """A loss; nan: the run does not count tokens."""

    steps: float
    tokens: float
    hours: float  # in which the run ran: pauses between its starts are left out
    loss: float


@dataclass(frozen=True)
class Curves:
    """The losses that a run has logged, finite ones, and what its journal has that is no row."""

    points: dict[str, list[Point]]  # of each of LOSSES that has some
    problems: list[str]


def read_curves(path: Path) -> Curves:
    """The curves of a journal; where it is damaged or too long, `problems` says so."""
    try:
        rows, problems = _rows(path)
    except (UserError, OSError) as e:
        return Curves({}, [f"{path} cannot be read: {e}"])
    since = _hours_before(rows)
    kept = joined(rows)
    counted = [(row.step, row.metrics[TOKENS]) for row in kept if math.isfinite(row.metrics.get(TOKENS, math.nan))]
    points = {}
    for key in LOSSES:
        logged = [row for row in kept if math.isfinite(row.metrics.get(key, math.nan))]
        tokens = _between([row.step for row in logged], counted)
        hours = [since[row.generation] + row.time / 3600 for row in logged]
        if logged:
            losses = [row.metrics[key] for row in logged]
            points[key] = [Point(row.step, *xy) for row, *xy in zip(logged, tokens, hours, losses, strict=True)]
    return Curves(points, problems)


def _rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a journal with what is drawn alone, and a line for each thing that is wrong with it."""
    rows, damaged, offset = [], 0, 0
    with open_regular(path, REST) as f:
        while offset < JOURNAL_BYTES and (line := f.readline(LINE_BYTES)):
            if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                break  # torn by a kill, or being written just now
            row = _row(line, path, offset)
            rows += [row] if row else []
            damaged += row is None
            offset += len(line)
        more = bool(f.read(1)) and offset >= JOURNAL_BYTES
    problems = [f"{path}: {damaged} lines are damaged: {REST}"] if damaged else []
    return rows, problems + [f"{path}: more than {offset >> 20} MiB, its beginning alone is drawn"] * more


def _row(line: bytes, path: Path, offset: int) -> Row | None:
    try:
        row = parse_row(line, path, offset)
    except UserError:
        return None
    if not (0 <= row.step < LAST_STEP and math.isfinite(row.time)):
        return None
    return replace(row, metrics={key: row.metrics[key] for key in (*LOSSES, TOKENS) if key in row.metrics})


def _hours_before(rows: Sequence[Row]) -> dict[int, float]:
    """For each start the hours that, added to a time of its rows, make the hours that the run has run by then."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for row in rows:
        first.setdefault(row.generation, row.time)
        last[row.generation] = row.time
    before, since = 0.0, {}
    for generation in sorted(first):
        since[generation] = (before - first[generation]) / 3600
        before += max(0.0, last[generation] - first[generation])
    return since


def _between(steps: Sequence[int], counted: Sequence[tuple[int, float]]) -> list[float]:
    """The tokens at these steps, between those that were logged."""
    if not counted:
        return [math.nan] * len(steps)
    known, tokens = zip(*counted, strict=True)
    return [float(x) for x in np.interp(steps, known, tokens)]
