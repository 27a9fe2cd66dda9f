"""The line of our code that a thread or an error is at, in one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

ROOT = Path(__file__).resolve().parents[2]

OURS = ("trainer", "data_pipeline", "launch", "conf")
C10D = "torch/distributed/distributed_c10d.py"
COLLECTIVE = "collective "


def place_of(thread: int) -> str:
    """The location of a thread of this process; of one that waits for others the collective, also another thread's."""
    frames = sys._current_frames()
    first = place(_of_stack(frames.get(thread)))
    others = (place(_of_stack(f)) for ident, f in frames.items() if ident != thread)
    return first if first.startswith(COLLECTIVE) else next((p for p in others if p.startswith(COLLECTIVE)), first)


def place_of_error(trace: TracebackType | None) -> str:
    """The location at which an error was raised."""
    frames = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(trace)]
    return place(reversed(frames))


def place(frames: Iterable[tuple[str, int, str]]) -> str:
    """Words such as "collective all_reduce, called by f (trainer/x.py:3)"; without a collective the innermost frame
    and the first of ours. `frames`: (file, line, function) from the innermost."""
    operation = inner = ""
    for file, line, name in frames:
        location = f"{name} ({_short(file)}:{line})"
        inner = inner or location
        if file.endswith(C10D):
            operation = name
        if Path(file).is_relative_to(ROOT) and Path(file).relative_to(ROOT).parts[0] in OURS:
            inner = f"{COLLECTIVE}{operation}" if operation else inner
            return location if inner == location else f"{inner}, called by {location}"
    return f"{COLLECTIVE}{operation}" if operation else inner or "no Python code"


def _of_stack(frame: FrameType | None) -> Iterator[tuple[str, int, str]]:
    return ((f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_stack(frame) if frame)


def _short(file: str) -> str:
    path = Path(file)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else "/".join(path.parts[-3:])
