"""The place in our code where a thread or an error is, as one line."""

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
    """Where a thread of this process is now; where it waits for others, the collective (also of another thread's)."""
    frames = sys._current_frames()
    first = place(_of_stack(frames.get(thread)))
    others = (place(_of_stack(f)) for ident, f in frames.items() if ident != thread)
    return first if first.startswith(COLLECTIVE) else next((p for p in others if p.startswith(COLLECTIVE)), first)


def place_of_error(at: TracebackType | None) -> str:
    """Where an error was raised."""
    frames = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(at)]
    return place(reversed(frames))


def place(frames: Iterable[tuple[str, int, str]]) -> str:
    """`frames` (file, line, function) from the innermost: "collective all_reduce, called by f (trainer/x.py:3)", or
    without one the innermost frame and the first of ours."""
    operation = inner = ""
    for file, line, name in frames:
        here = f"{name} ({_short(file)}:{line})"
        inner = inner or here
        if file.endswith(C10D):
            operation = name
        if Path(file).is_relative_to(ROOT) and Path(file).relative_to(ROOT).parts[0] in OURS:
            inner = f"{COLLECTIVE}{operation}" if operation else inner
            return here if inner == here else f"{inner}, called by {here}"
    return f"{COLLECTIVE}{operation}" if operation else inner or "no Python code"


def _of_stack(frame: FrameType | None) -> Iterator[tuple[str, int, str]]:
    return ((f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_stack(frame) if frame)


def _short(file: str) -> str:
    path = Path(file)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else "/".join(path.parts[-3:])
