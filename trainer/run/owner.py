"""The owner of a run folder: the start whose rank 0 goes on. Standard library only."""

from __future__ import annotations

import os
import socket
import sys
import time
from hashlib import sha256
from pathlib import Path

from conf.errors import UserError
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import Heartbeat, read_heartbeats
from trainer.run.progress import END

YOUNG_S = 60.0  # an older heartbeat is of a start that is gone
BEATS, PATIENCE_S = 3, 5.0  # so many beats, and so long on top, are waited for a sign of life
SAME_JOB = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
"""What stays when Slurm or torchrun start a job again: they ended the old ranks, or cannot reach them any more."""


def job() -> dict[str, str]:
    """The names of this job, which tell its next start from another job's, and how often Slurm has restarted it."""
    given = {name: os.environ.get(name, "none") for name in (*SAME_JOB, "SLURM_RESTART_COUNT")}
    return {name: value for name, value in given.items() if value != "none"}


def command() -> str:
    """A mark of this command line: the same when a supervisor, torchrun or Slurm starts it again."""
    return sha256("\0".join(sys.argv[1:]).encode(errors="surrogateescape")).hexdigest()


def is_repeated(run: RunFolder) -> bool:
    """True if the run's last start by a command was by this one; a rollback is a start by none."""
    for number in range(run.newest_generation(), 0, -1):
        facts = run.facts(number)
        if "command" in facts and "from" in facts:  # it has begun
            return bool(facts["command"] == command())
    return False


def refuse_living(run: RunFolder, take_over: int | None, beat_s: float) -> None:
    """Raises UserError if another start of this run goes on, unless it is number `take_over`."""
    owner = living(run, beat_s)
    if owner is None or owner.generation == take_over or _follows(run.facts(owner.generation).get("job") or {}, job()):
        return
    age = max(0, time.time() - owner.time)
    raise UserError(
        f"start {owner.generation} goes on: rank 0 is process {owner.pid} on {owner.host}, after step {owner.step}, "
        f"last heard of {age:.0f} s ago: stop it first, or give take_over={owner.generation} to take the run over"
    )


def living(run: RunFolder, beat_s: float) -> Heartbeat | None:
    """The last heartbeat of rank 0 of the start that goes on; None if there is none.

    On this host the process decides. Elsewhere the next heartbeat does, if the last is young: clocks of hosts differ.
    """
    first = _of_rank_0(run)
    if first is None or abs(time.time() - first.time) > YOUNG_S:
        return None
    deadline = time.monotonic() + BEATS * beat_s + PATIENCE_S
    while time.monotonic() < deadline:
        beat = _of_rank_0(run)
        if beat is None or beat.phase == END or _gone(beat):
            return None
        if beat.time != first.time:
            return beat
        time.sleep(min(0.1, beat_s))
    return None


def _of_rank_0(run: RunFolder) -> Heartbeat | None:
    newest = run.newest_generation()
    return next((b for b in read_heartbeats(run.heartbeats) if (b.rank, b.generation) == (0, newest)), None)


def _gone(beat: Heartbeat) -> bool:
    """True if its process was of this host and has ended, or is this one."""
    if beat.host != socket.gethostname():
        return False
    try:
        status = Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    return beat.pid == os.getpid() or status.rpartition(")")[2].split()[0] in "ZX"


def _follows(theirs: dict[str, str], ours: dict[str, str]) -> bool:
    """True if Slurm has requeued the job of that start as this one, or torchrun has started its ranks anew."""
    slurm, torchrun = ([job.get(name) for job in (theirs, ours)] for name in SAME_JOB)
    again = [int(job.get("SLURM_RESTART_COUNT", "0")) for job in (theirs, ours)]
    return (None is not slurm[0] == slurm[1] and again[0] < again[1]) or None is not torchrun[0] == torchrun[1]
