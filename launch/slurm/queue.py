"""Jobs that Slurm's queue still knows, as squeue tells them."""

from __future__ import annotations

import os
import subprocess
from typing import NamedTuple

ANSWER_S = 15.0
FORMAT = "%F|%K|%T|%r"  # number (of an array: of all of it), element or N/A, state, reason


class Queued(NamedTuple):
    """A job that waits or runs; `element`: its number in an array, else ""."""

    job: str
    element: str
    state: str
    reason: str

    @property
    def told(self) -> str:
        """Its state, and why it waits."""
        return self.state if self.reason in ("None", "") else f"{self.state} ({self.reason})"


def jobs() -> list[Queued]:
    """This user's jobs; none where there is no squeue here, or it does not answer."""
    argv = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--format={FORMAT}"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split("|", 3) for line in done.stdout.splitlines()]
    return [Queued(row[0], "" if row[1] == "N/A" else row[1], *row[2:]) for row in rows if len(row) == 4]
