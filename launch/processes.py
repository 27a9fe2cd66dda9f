"""The processes below this one, whatever session they are in. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from pathlib import Path

from conf.errors import UserError
from trainer.run.heartbeat import read_heartbeats

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def become_subreaper() -> None:
    """From here on orphaned descendants become our children, whatever session they are in."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants(grace_s: float) -> None:
    """Returns when every descendant is gone: SIGTERM, `grace_s` seconds, SIGKILL.

    Reaps all dead children: not to be called before the caller has the exit code of its own.

    Raises:
        UserError: one does not even end with SIGKILL (it hangs in the kernel), so that a restart would meet it.
    """
    for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + limit_s
        signalled: set[int] = set()
        while alive := descendants():
            reap()
            for pid in set(alive) - signalled:
                send(pid, number)
                signalled.add(pid)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            reap()
            return
    raise UserError(
        f"processes {', '.join(map(str, alive))} of the failed start do not end with SIGKILL: not restarted"
    )


def descendants() -> list[int]:
    """Living descendants of this process. Reaps none, so that a signal handler may ask while `Popen.wait` waits."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended while we looked, or is not for us to see (hidepid)
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    pids = list(children.get(os.getpid(), []))
    for pid in pids:  # grows while it is walked
        pids += children.get(pid, [])
    return pids


def ranks_below(heartbeats: Path) -> set[int]:
    """Living descendants of this process that are ranks, by the heartbeats in that folder."""
    ours = {beat.pid for beat in read_heartbeats(heartbeats) if beat.host == socket.gethostname()}
    return ours.intersection(descendants())


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def send(pid: int, number: int) -> None:
    """Send a signal; nothing happens if the process has ended or is another user's."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)
