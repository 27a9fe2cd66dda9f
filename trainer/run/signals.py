"""The signals that ask a run to stop: SIGUSR1 (it goes on later), SIGTERM, SIGINT. Standard library only.

A rank keeps what it got until all ranks have agreed, at the next step, on the step to stop after (trainer/loop.py): so
one signal to one rank stops them all, at one step, with one checkpoint. Python runs a handler between two bytecodes of
the main thread, which may wait in a collective for minutes: what is done at once is done by a thread.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.run.exit_codes import ALONE, PREEMPTED
from trainer.run.progress import START, STEP, Progress

CODES = {signal.SIGUSR1: PREEMPTED, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
"""How a run ends that has stopped on a signal; where ranks got several, the last of these counts."""
AGAIN_S = 2.0  # a launcher may tell a rank twice in a moment, itself and through its process group


class Stopped(Exception):
    """No error: all ranks have agreed, and the checkpoint is published.

    `whole` is False if the run left an iteration of its feed unfinished: then `saved` is of an earlier step.
    """

    def __init__(self, number: signal.Signals, step: int, saved: Path | None, *, whole: bool = True) -> None:
        how = f"saved {saved}"
        if not whole:
            resumed = saved or "the beginning"
            how = f"inside an iteration that watch.stop_s was too short for: the run goes on from {resumed}"
        super().__init__(f"stopped by {number.name} after step {step}, {how}")
        self.code = CODES[number]


class Signals:
    """This rank's wishes. Does nothing before `install`; before `train`, a signal ends the process at once."""

    def __init__(self) -> None:
        self.got: dict[signal.Signals, float] = {}  # time.monotonic of the first of each
        self.progress: Progress | None = None  # since the first step began
        self._first = 0  # steps done by then
        self._stop_s = 0.0
        self._over = False

    def install(self) -> Signals:
        """Catch the signals, in the main thread. One that the parent ignores, as with nohup and `&`, stays ignored."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()
        return self

    def train(self, progress: Progress, stop_s: float) -> None:
        """Let signals wait for the ranks' agreement from now on: `stop_s` seconds beyond the current step."""
        self._stop_s = stop_s
        self._first = progress.state.step
        self.progress = progress

    def over(self) -> None:
        """The ranks have agreed, or the run ends, well or not: what comes now changes nothing but by insisting."""
        self._over = True

    def wishes(self) -> list[float]:
        """For the ranks' sum: 1.0 for each signal that this rank got, in the order of CODES."""
        return [float(number in self.got) for number in CODES]

    def _listen(self, pipe: int) -> None:
        while True:
            if select.select([pipe], [], [], 0.1 if self.got else None)[0]:
                for number in os.read(pipe, 64):
                    if number in CODES:
                        self._take(signal.Signals(number))
            if self.got and not self._over and self.progress is not None:
                self._check(self.progress)

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.progress is None:
            end(CODES[number], f"{number.name} before the first step: nothing to save, nothing lost")
        insisted = number is not signal.SIGUSR1 and any(
            now - since > AGAIN_S for other, since in self.got.items() if other is not signal.SIGUSR1
        )
        if insisted and (not self._over or number is signal.SIGINT):
            end(CODES[number], f"a second {number.name}: ends at once, the last checkpoint stands")
        self.got.setdefault(number, now)

    def _check(self, progress: Progress) -> None:
        """End the process if the ranks had the time to agree and have not: one of them is gone, or hangs."""
        state, first = progress.state, min(self.got.values())
        limit_s = self._stop_s + (progress.step_s or 0.0)
        if state.phase not in (START, STEP) or time.monotonic() - max(first, state.since) <= limit_s:
            return
        name = next(iter(self.got)).name
        if state.phase == START and state.step == self._first:
            end(CODES[next(iter(self.got))], f"{name} in the first step: nothing to save, nothing lost")
        progress.drain()
        end(
            ALONE,
            f"{name} after step {state.step}, and the other ranks did not agree to stop within {limit_s:.0f} s "
            f"(watch.stop_s={self._stop_s:g}): ends and saves nothing, the last checkpoint stands",
        )


OF_THIS_PROCESS = Signals()


def agreed(wishes: Sequence[float]) -> signal.Signals | None:
    """The signal to stop for, from the ranks' sum of `Signals.wishes`; None: go on."""
    return next((number for number, count in zip(reversed(CODES), reversed(wishes), strict=True) if count), None)


def end(code: int, why: str) -> NoReturn:
    """End the process from a thread, whatever the main thread does. One write, for the ranks share their stderr."""
    sys.stderr.write(f"error: {why}\n")
    sys.stderr.flush()
    os._exit(code)
