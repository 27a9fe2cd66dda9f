"""Where the training thread is. It alone writes, other threads read. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

START, STEP, VALIDATE, SAVE, END = "start", "step", "validate", "save", "end"
WINDOW = 20  # steps whose median is what a step takes


@dataclass(frozen=True)
class At:
    """`since`: time.monotonic at the beginning of the phase, or of the step where that is the phase."""

    phase: str
    step: int  # steps done
    since: float


class Progress:
    """Phase by phase and step by step; swaps one tuple, so that a reader needs no lock."""

    def __init__(self) -> None:
        self.at = At(START, 0, time.monotonic())
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self.step_s: float | None = None  # median of the last steps; None before the second

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The training thread is in `name`; what comes after it is a step again."""
        self.at = At(name, self.at.step, time.monotonic())
        yield
        self.at = At(STEP, self.at.step, time.monotonic())

    def begin(self, step: int) -> None:
        """The first step after `step` begins: it compiles, and is counted to the start."""
        self.at = At(START, step, time.monotonic())

    def step_done(self, step: int) -> None:
        """`step` steps are done, the next one begins."""
        now, before = time.monotonic(), self.at
        if before.phase == STEP:
            self._seconds.append(now - before.since)
            self.step_s = statistics.median(self._seconds)
        self.at = At(STEP, step, now)

    def end(self) -> None:
        self.at = At(END, self.at.step, time.monotonic())
