"""A run's heartbeats: one small file for each rank, replaced by that rank every watch.beat_s. Standard library only.

    heartbeats/rank-00003.json   {"rank": 3, "host": "n2", "pid": 4711, "generation": 2, "time": …, "step": 1200, …}

Times are unix seconds of the rank's own host.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

MAX_BYTES = 4096


@dataclass(frozen=True)
class Heartbeat:
    """`time`: when it was written; `since`: when the phase began, or the step where the phase is "step"."""

    rank: int
    host: str
    pid: int
    generation: int
    time: float
    step: int  # steps done
    phase: str  # trainer.run.progress: start, step, validate, save, end
    since: float
    step_s: float | None  # median of the last steps; None before the second
    own_s: float | None  # of it this rank's own part: waiting for data, forward and backward


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Whole or not at all, and not fsynced: a lost one is followed by the next. `folder` is made where it is not."""
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{beat.rank:05d}.json"
    half = path.with_name(f".{path.name}.gen-{beat.generation:04d}.tmp")  # a stranded start writes its own
    half.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    half.replace(path)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """By rank, of the newest start that wrote any. What is missing, damaged or half copied is not there."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.glob("rank-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
                found.append(_read(path))
    newest = max((beat.generation for beat in found), default=0)
    return sorted((beat for beat in found if beat.generation == newest), key=lambda beat: beat.rank)


def _read(path: Path) -> Heartbeat:
    with path.open("rb") as f:
        body = json.loads(f.read(MAX_BYTES))
    beat = Heartbeat(**{field.name: body[field.name] for field in fields(Heartbeat) if field.name in body})
    whole = (beat.rank, beat.pid, beat.generation, beat.step)
    real = [beat.time, beat.since, *(x for x in (beat.step_s, beat.own_s) if x is not None)]
    if not all(type(x) is int and x >= 0 for x in whole) or not all(
        isinstance(x, str) for x in (beat.host, beat.phase)
    ):
        raise ValueError(path)
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in real):
        raise ValueError(path)
    return beat
