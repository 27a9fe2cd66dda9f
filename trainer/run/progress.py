"""Where the training thread is. It alone writes, other threads read. Standard library only."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

START, STEP, VALIDATE, SAVE, END = "start", "step", "validate", "save", "end"
WINDOW = 20  # steps whose median is what a step takes
MUCH = 1.5  # x the tokens of the steps of the median: nothing is known of such a step


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
        self._own: deque[float] = deque(maxlen=WINDOW)
        self.step_s: float | None = None  # median of the last steps; None before the second
        self.own_s: float | None = None  # of this rank's own part of them
        self.drain: Callable[[], None] = lambda: None  # a moment for the checkpoint, before the process is ended
        self._work = (0, 0)  # what the steps of the median are of: tokens, n_ctx

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The training thread is in `name`; what comes after it is a step again."""
        self.at = At(name, self.at.step, time.monotonic())
        yield
        self.at = At(STEP, self.at.step, time.monotonic())

    def begin(self, step: int) -> None:
        """The first step after `step` begins: it compiles, and is counted to the start."""
        self.at = At(START, step, time.monotonic())

    def moved(self) -> None:
        """Still in the same phase, and it comes further."""
        self.at = replace(self.at, since=time.monotonic())

    def next_takes(self, tokens: int, n_ctx: int) -> None:
        """What the next step is of. Much longer, or of another length (which compiles anew), it is as the first one."""
        before, length = self._work
        if n_ctx == length and tokens <= MUCH * before:
            return
        self._work = (tokens, n_ctx)
        if before:
            self._seconds.clear()
            self.step_s = None
            self.begin(self.at.step)

    def step_done(self, step: int) -> None:
        """`step` steps are done, the next one begins."""
        now, before = time.monotonic(), self.at
        if before.phase == STEP:
            self._seconds.append(now - before.since)
            self.step_s = statistics.median(self._seconds)
        self.at = At(STEP, step, now)

    def own(self, seconds: float | None) -> None:
        """Of the step that is under way: this rank's waiting for data, and its work."""
        if seconds is not None:
            self._own.append(seconds)
            self.own_s = statistics.median(self._own)

    def end(self) -> None:
        self.at = At(END, self.at.step, time.monotonic())
