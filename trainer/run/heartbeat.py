"""A run's heartbeats: one small file for each rank, replaced by that rank every watch.beat_s. Standard library only.

    heartbeats/rank-00003.json   {"rank": 3, "host": "n2", "pid": 4711, "generation": 2, "time": …, "step": 1200, …}

Times are unix seconds of the rank's own host.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.errors import UserError
from data_pipeline.files import from_json

MAX_BYTES = 4096


@dataclass(frozen=True)
class Heartbeat:
    """`time`: of writing; `since`: the begin of the phase, or of the step if the phase is "step"."""

    rank: int
    host: str
    pid: int
    generation: int
    time: float
    step: int  # steps done
    phase: str  # trainer.run.progress: start, step, validate, save, end
    since: float
    step_s: float | None  # median of the last steps; None before the second
    own_s: float | None  # this rank's own part of it: waiting for data, forward and backward


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Write a heartbeat whole or not at all. It is not fsynced: the next one follows. Makes `folder` if need be."""
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{beat.rank:05d}.json"
    half = path.with_name(f".{path.name}.gen-{beat.generation:04d}.tmp")  # a stranded start writes its own
    half.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    half.replace(path)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The heartbeats of the newest start that wrote any, by rank; without those that are damaged or half copied."""
    beats = []
    with contextlib.suppress(OSError):
        for path in folder.glob("rank-*.json"):
            with contextlib.suppress(OSError, ValueError, UserError, RecursionError):
                beats.append(_read(path))
    newest = max((beat.generation for beat in beats), default=0)
    return sorted((beat for beat in beats if beat.generation == newest), key=lambda beat: beat.rank)


def _read(path: Path) -> Heartbeat:
    with path.open("rb") as f:
        body = json.loads(f.read(MAX_BYTES))
    beat = from_json(Heartbeat, body, path, "the rank writes the next one", extra=True)
    real = [beat.time, beat.since, *(x for x in (beat.step_s, beat.own_s) if x is not None)]
    if min(beat.rank, beat.pid, beat.generation, beat.step) < 0 or not all(map(math.isfinite, real)):
        raise ValueError(path)
    return beat
