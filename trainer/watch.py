"""A thread on each rank that tells where the rank is, and ends a run that comes no further.

A step may take watch.hang_factor times the median of the last ones, and at least watch.hang_min_s; what is no step,
watch.start_s. After that the rank writes its stacks, the others see the folder and write theirs, one writes the report,
and all end with HUNG: whoever started them starts again from the last checkpoint (launch/supervise.py).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence

from trainer.exit_codes import HUNG
from trainer.hang import Spot, place_of, publish_report, read_spots, report, write_stacks
from trainer.heartbeat import Heartbeat, read_heartbeats, write_heartbeat
from trainer.progress import STEP, At, Progress
from trainer.run_folder import RunFolder
from trainer.safety_config import WatchConfig
from trainer.world import World

TICK_S = 1.0
ASLEEP = 5.0  # ticks: a thread that was away for longer was not run at all, nor was training
ANSWER_S = 10.0  # for the other ranks' stacks
FLUSH_S = 5.0  # for the journal
SLOW, LONG_S, AGAIN_S = 1.5, 60.0, 600.0  # x the median, for so long, said so often


def limit_s(cfg: WatchConfig, at: At, step_s: float | None) -> float:
    """Seconds that a rank may stay where it is. `step_s`: the median of the last steps; None before the second."""
    if at.phase != STEP or step_s is None:
        return cfg.start_s
    return max(cfg.hang_min_s, cfg.hang_factor * step_s)


class Watch:
    """Begins in the training thread. `generation` may change where a run starts anew in place."""

    def __init__(
        self,
        cfg: WatchConfig,
        run: RunFolder,
        generation: int,
        world: World,
        progress: Progress,
        flush: Callable[[], None],
    ) -> None:
        self.cfg, self.run, self.generation, self.world, self.progress = cfg, run, generation, world, progress
        self._flush = flush
        self._training, self._host = threading.get_ident(), socket.gethostname()
        self._closed = threading.Event()
        self._tick_s = min(TICK_S, cfg.beat_s)
        self._warned = False
        self.stragglers = Stragglers()
        if world.is_main and cfg.hang_min_s >= cfg.collective_s:
            _say(
                f"watch.hang_min_s={cfg.hang_min_s:g} is not below watch.collective_s={cfg.collective_s:g}: a hang "
                "ends by the collectives' timeout, without stacks"
            )
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        awake = before = time.monotonic()
        beaten = -self.cfg.beat_s
        while not self._closed.wait(self._tick_s):
            now = time.monotonic()
            if now - before > ASLEEP * self._tick_s:
                awake = now  # SIGSTOP, or a host without time for us: what stood still is no hang
            before = now
            limit = limit_s(self.cfg, self.progress.at, self.progress.step_s)
            # where the training thread hangs and holds the GIL, this thread does not run
            faulthandler.dump_traceback_later(2 * limit + ASLEEP, exit=True)
            if now - beaten >= self.cfg.beat_s:
                beaten = now
                self._beat()
            if now - max(awake, self.progress.at.since) > limit or self.run.hang(self.generation).exists():
                self._end(limit)
        faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        if self.run.newest_generation() > self.generation:
            return  # a stranded start: the files are the newer one's
        at, now = self.progress.at, time.time()
        since = now - (time.monotonic() - at.since)
        mine = (self.world.rank, self._host, os.getpid(), self.generation, now, at.step, at.phase, since)
        try:
            write_heartbeat(self.run.heartbeats, Heartbeat(*mine, self.progress.step_s, self.progress.own_s))
            if self.world.is_main:
                self.stragglers.look(read_heartbeats(self.run.heartbeats))
        except OSError as e:
            if not self._warned:
                _say(f"rank {self.world.rank} writes no heartbeat: {e}; training goes on")
            self._warned = True

    def _end(self, limit: float) -> None:
        """Stacks, report, journal, each as far as it can be had in its time; then the process ends."""
        at, folder, rank = self.progress.at, self.run.hang(self.generation), self.world.rank
        faulthandler.dump_traceback_later(ANSWER_S + FLUSH_S + 30.0, exit=True)
        spot = Spot(rank, self._host, at.step, at.phase, time.monotonic() - at.since, place_of(self._training))
        try:
            write_stacks(folder, spot)
            deadline = time.monotonic() + ANSWER_S
            while len(spots := read_spots(folder)) < self.world.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
            silent = set(range(self.world.world_size)) - {s.rank for s in spots}
            hosts = {beat.rank: beat.host for beat in read_heartbeats(self.run.heartbeats)}
            text = report(spots, {r: hosts.get(r, "a host unknown") for r in sorted(silent)}, limit)
            if publish_report(folder, rank, f"{text}\n  the stacks: {folder}"):
                _say(f"{text}\n  the stacks: {folder}")
        except OSError as e:
            _say(f"hang, and {folder} cannot be written ({e}): {spot.line()}")
        flush = threading.Thread(target=self._flush_quietly, daemon=True)
        flush.start()
        flush.join(FLUSH_S)
        time.sleep(0.5)  # a launcher ends the others as soon as one ends, and one of them may be telling
        os._exit(HUNG)

    def _flush_quietly(self) -> None:
        with contextlib.suppress(Exception):
            self._flush()


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
                _say(
                    f"rank {rank} on {beat.host} is slow: {beat.own_s:.3g} s of its own in each step, where the median "
                    f"of all ranks is {middle:.3g} s: all wait for it"
                )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"watch: {text}\n")
        sys.stderr.flush()
