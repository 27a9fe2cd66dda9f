"""Watchdog: writes each rank's heartbeat and ends a run that has stopped making progress.

A step may take watch.hang_factor times the median of the last ones, and at least watch.hang_min_s; everything else may
take watch.start_s; the end of a run has no limit here. After that the rank writes its stacks, the others see the folder
and write theirs, one writes the report, and all end with HUNG: their supervisor starts them again from the last
checkpoint (launch/supervise.py).

Each rank has two threads. One touches no file, so that a file server that fails or hangs neither stops it nor is taken
for a hang; it knows the limits and ends the process. The other writes heartbeats and looks for the others' folder.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from conf.errors import UserError
from trainer.config.health import WatchConfig
from trainer.distributed.world import World
from trainer.health.hang_report import Spot, publish_report, read_spots, report, write_stacks
from trainer.health.stragglers import Stragglers, say
from trainer.run.exit_codes import HUNG, USER_ERROR
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import Heartbeat, read_heartbeats, write_heartbeat
from trainer.run.progress import END, STEP, Progress
from trainer.run.signals import end
from trainer.run.stack_location import place_of

TICK_S = 1.0
ASLEEP = 5.0  # ticks: if this thread was not run for longer, training was not either
ANSWER_S = 10.0  # for the other ranks' stacks
FILES_S = 5.0  # for the run folder to take the report, and for the journal
DRAIN_S = 60.0  # the saver has its own, shorter limit
BACKSTOP_S, BACKSTOP = 3600.0, 10  # seconds, x the limit, the longer of both: see `Watch._watch`


def limit_s(cfg: WatchConfig, phase: str, step_s: float | None, fetch_s: float = 0.0) -> float:
    """Seconds that a rank may stay in this step or phase.

    `step_s`: the median of the last steps, None before the second. `fetch_s`: the time that a remote source may take on
    top of a step.
    """
    if phase == END:
        return math.inf
    if phase != STEP or step_s is None:
        return max(cfg.start_s, fetch_s)
    return max(cfg.hang_min_s, cfg.hang_factor * step_s) + fetch_s


class Watch:
    """The two threads, started from the training thread. A rollback sets another `generation`."""

    def __init__(
        self,
        cfg: WatchConfig,
        run: RunFolder,
        generation: int,
        world: World,
        progress: Progress,
        flush: Callable[[], None],
        fetch_s: float = 0.0,
    ) -> None:
        self.cfg = cfg
        self.run = run
        self.generation = generation
        self.world = world
        self.progress = progress
        self._flush = flush
        self._fetch_s = fetch_s
        self._training = threading.get_ident()
        self._host = socket.gethostname()
        self._closed = threading.Event()
        self._others_hang = False
        self._tick_s = min(TICK_S, cfg.beat_s)
        self.stragglers = Stragglers()
        if world.is_main:
            for line in cfg.contradictions(fetch_s):
                say(line)
        self._threads = [
            threading.Thread(target=self._watch, name="watch", daemon=True),
            threading.Thread(target=self._beat, name="heartbeat", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(FILES_S)

    def _watch(self) -> None:
        """Ends the process at the limit, without touching a file.

        If the training thread hangs and holds the GIL, this thread does not run, and faulthandler ends the process:
        late, for it goes by the clock, which goes on while a process is stopped.
        """
        awake = before = time.monotonic()
        while not self._closed.wait(self._tick_s):
            now, state = time.monotonic(), self.progress.state
            if now - before > ASLEEP * self._tick_s:
                awake = now  # SIGSTOP, or a host without time for this process: no hang
            before = now
            limit = limit_s(self.cfg, state.phase, self.progress.step_s, self._fetch_s)
            if limit == math.inf:
                faulthandler.cancel_dump_traceback_later()
                continue
            faulthandler.dump_traceback_later(max(BACKSTOP_S, BACKSTOP * limit), exit=True)
            if self._others_hang or now - max(awake, state.since) > limit:
                self._end(limit)
        faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        beaten, warned = -math.inf, False
        while not self._closed.wait(self._tick_s):
            try:
                if not self._others_hang and self.run.hang(self.generation).exists():
                    self._others_hang = True
                    if self.progress.state.phase == END:  # it answers, and ends as it was about to
                        write_stacks(self.run.hang(self.generation), self._spot())
                if time.monotonic() - beaten >= self.cfg.beat_s:
                    beaten = time.monotonic()
                    self._write()
            except OSError as e:
                if not warned:
                    say(f"rank {self.world.rank} writes no heartbeat: {e}; training goes on")
                warned = True
        with contextlib.suppress(OSError):
            self._write()  # that the run has ended

    def _write(self) -> None:
        if self.run.newest_generation() > self.generation:
            if self.run.taken_over(self.generation):
                self._end_fenced()
            return  # the files are the newer one's
        state, now = self.progress.state, time.time()
        since = now - (time.monotonic() - state.since)
        facts = (self.world.rank, self._host, os.getpid(), self.generation, now, state.step, state.phase, since)
        write_heartbeat(self.run.heartbeats, Heartbeat(*facts, self.progress.step_s, self.progress.own_s))
        if self.world.is_main:
            self.stragglers.look(read_heartbeats(self.run.heartbeats))

    def _end_fenced(self) -> None:
        """End this process, whose steps nobody needs any more."""
        try:
            self.run.fence(self.generation)
        except UserError as e:
            end(USER_ERROR, str(e))

    def _spot(self) -> Spot:
        state = self.progress.state
        seconds = time.monotonic() - state.since
        return Spot(self.world.rank, self._host, state.step, state.phase, seconds, place_of(self._training))

    def _end(self, limit: float) -> None:
        """Write stacks, report, journal and the checkpoint in flight, each within its time; then end the process."""
        spot = self._spot()
        if not _within(ANSWER_S + FILES_S, partial(self._report, spot, limit)):
            say(f"hang, and {self.run.hang(self.generation)} takes no report: {spot.line()}")
        _within(FILES_S, self._flush)
        _within(DRAIN_S, self.progress.drain)
        time.sleep(0.5)  # a launcher ends the others as soon as one ends, and one of them may be writing the report
        os._exit(HUNG)

    def _report(self, spot: Spot, limit: float) -> None:
        folder, rank = self.run.hang(self.generation), self.world.rank
        write_stacks(folder, spot)
        deadline = time.monotonic() + ANSWER_S
        while len(spots := read_spots(folder)) < self.world.world_size and time.monotonic() < deadline:
            time.sleep(0.1)
        silent = set(range(self.world.world_size)) - {s.rank for s in spots}
        hosts = {beat.rank: beat.host for beat in read_heartbeats(self.run.heartbeats)}
        text = report(spots, {r: hosts.get(r, "a host unknown") for r in sorted(silent)}, limit)
        if publish_report(folder, rank, f"{text}\n  the stacks: {folder}"):
            say(f"{text}\n  the stacks: {folder}")


def _within(seconds: float, function: Callable[[], None]) -> bool:
    """Run a function in a thread; True if it ended well in that time. An error is no more than a False."""
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(Exception):
            function()
            done.set()

    threading.Thread(target=run, daemon=True).start()
    return done.wait(seconds)
