"""Slow ranks, which make the others wait, found by their heartbeats."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from trainer.run.heartbeat import Heartbeat

SLOW, LONG_S, AGAIN_S = 1.5, 60.0, 600.0  # x the median, for so long, said so often


class Stragglers:
    """Rank 0 compares the ranks' own parts of a step. Seconds are medians over the last steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slow_since: dict[int, float] = {}
        self._said: dict[int, float] = {}
        self.row: dict[str, float] = {}  # for the journal

    def look(self, beats: Sequence[Heartbeat]) -> None:
        own = {beat.rank: beat for beat in beats if beat.own_s is not None}
        if len(own) < 2:
            return
        middle = statistics.median_low([b.own_s or 0.0 for b in own.values()])  # of two the faster
        if middle <= 0:
            return
        slowest = max(own.values(), key=lambda b: b.own_s or 0.0)
        self.row = {"speed/straggler": (slowest.own_s or 0.0) / middle, "speed/slowest_rank": float(slowest.rank)}
        now = self._clock()
        slow = {rank: b for rank, b in own.items() if (b.own_s or 0.0) > SLOW * middle}
        self._slow_since = {rank: self._slow_since.get(rank, now) for rank in slow}
        for rank, beat in slow.items():
            if now - self._slow_since[rank] >= LONG_S and now - self._said.get(rank, -AGAIN_S) >= AGAIN_S:
                self._said[rank] = now
                say(
                    f"rank {rank} on {beat.host} is slow: {beat.own_s:.3g} s of its own in each step, where the median "
                    f"of all ranks is {middle:.3g} s: all wait for it"
                )


def say(text: str) -> None:
    """One line on stderr, which may be gone."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"watch: {text}\n")
        sys.stderr.flush()
