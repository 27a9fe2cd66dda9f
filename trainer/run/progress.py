"""The phase and the step of the training thread, which alone writes them. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

START, STEP, VALIDATE, SAVE, END = "start", "step", "validate", "save", "end"
WINDOW = 20  # steps whose median is taken
MUCH = 1.5  # x the work of the steps of the median: the median does not hold for such a step


@dataclass(frozen=True)
class Activity:
    """`since`: time.monotonic at the beginning of the phase, or of the step if that is the phase."""

    phase: str
    step: int  # steps done
    since: float


class Progress:
    """Phase by phase and step by step; swaps one tuple, so that a reader needs no lock."""

    def __init__(self) -> None:
        self.state = Activity(START, 0, time.monotonic())
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._own: deque[float] = deque(maxlen=WINDOW)
        self.step_s: float | None = None  # median of the last steps; None before the second
        self.own_s: float | None = None  # of this rank's own part of them
        self.drain: Callable[[], None] = lambda: None  # a moment for the checkpoint, before the process is ended
        self._work = (0, 0)  # of the steps of the median, and their n_ctx

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The training thread is in `name`; after it, in a step again."""
        self.state = Activity(name, self.state.step, time.monotonic())
        yield
        self.state = Activity(STEP, self.state.step, time.monotonic())

    def start(self, step: int) -> None:
        """The first step after `step` begins: it compiles, and belongs to the phase START."""
        self.state = Activity(START, step, time.monotonic())

    def touch(self) -> None:
        """The same phase goes on, and makes progress."""
        self.state = replace(self.state, since=time.monotonic())

    def next_takes(self, work: int, n_ctx: int) -> None:
        """Announce the size of the next step. With much more work, or another length (which compiles again), it counts
        as a first one."""
        before, length = self._work
        if n_ctx == length and work <= MUCH * before:
            return
        self._work = (work, n_ctx)
        if before:
            self._seconds.clear()
            self.step_s = None
            self.start(self.state.step)

    def step_done(self, step: int) -> None:
        """`step` steps are done, the next one begins."""
        now, before = time.monotonic(), self.state
        if before.phase == STEP:
            self._seconds.append(now - before.since)
            self.step_s = statistics.median(self._seconds)
        self.state = Activity(STEP, step, now)

    def own(self, seconds: float | None) -> None:
        """Add this rank's own part of the present step: its waiting for data, and its work."""
        if seconds is not None:
            self._own.append(seconds)
            self.own_s = statistics.median(self._own)

    def end(self) -> None:
        self.state = Activity(END, self.state.step, time.monotonic())
