"""Checks run side by side, each in a process of its own with a time limit: a disk that hangs holds nobody up."""

from __future__ import annotations

import json
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from trainer.diagnostics.check_result import CheckResult, fail, from_json

MOST = 1 << 20  # bytes of what a check may say


class Check(NamedTuple):
    name: str
    look: Callable[[], Iterable[CheckResult]]
    limit_s: float
    late: str = "look at what it waits for, and try again"  # what to do where the limit is reached


def run_checks(checks: Sequence[Check]) -> list[CheckResult]:
    """The results of all checks, in order; an exception, or no answer within its limit, fails that check alone."""
    said = {i: bytearray() for i in range(len(checks))}
    started, late = time.monotonic(), set[int]()
    fds: dict[int, int] = {}
    pids: dict[int, int] = {}
    try:
        for i, check in enumerate(checks):
            fds[i], pids[i] = _start(check)
        _listen(fds, said, {i: started + check.limit_s for i, check in enumerate(checks)}, late)
    finally:  # also where we are told to end
        for pid in pids.values():
            _end(pid)
    return [f for i, check in enumerate(checks) for f in _findings(check, bytes(said[i]), late=i in late)]


def _listen(fds: dict[int, int], said: dict[int, bytearray], deadlines: dict[int, float], late: set[int]) -> None:
    """Read until each check has ended or its deadline has passed; fills `said` and `late`."""
    with selectors.DefaultSelector() as selector:
        for i, fd in fds.items():
            selector.register(fd, selectors.EVENT_READ, i)
        while selector.get_map():
            for key, _ in selector.select(0.1):
                data = os.read(key.fd, 1 << 16)
                said[key.data] += data
                if not data or len(said[key.data]) > MOST:
                    selector.unregister(key.fd)
                    os.close(key.fd)
            for key in list(selector.get_map().values()):
                if time.monotonic() > deadlines[key.data]:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    late.add(key.data)


def _start(check: Check) -> tuple[int, int]:
    """(what it says is read from there, its process), which has a session of its own, to be ended with all in it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return read, pid
    try:
        os.setsid()
        os.close(read)
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)
        try:
            results = list(check.look())
        except Exception as e:
            results = [fail(check.name, f"{type(e).__name__}: {e}", "mend what it names, or report it as a bug")]
        with os.fdopen(write, "w", encoding="utf-8") as f:
            json.dump([result.as_json() for result in results], f)
    finally:
        os._exit(0)


def _end(pid: int) -> None:
    """Kill a check and all that it started. One that waits for a dead disk cannot be reaped: it is not waited for."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for _ in range(20):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
                continue
        return


def _findings(check: Check, said: bytes, late: bool) -> list[CheckResult]:
    if late:
        return [fail(check.name, f"no answer within {check.limit_s:g} s", check.late)]
    try:
        return [from_json(body) for body in json.loads(said)]
    except (ValueError, TypeError, KeyError):
        return [fail(check.name, "its process died", "look for a kill for want of memory (dmesg)")]
