"""The GPUs of this node as nvidia-smi lists them. Standard library only."""

from __future__ import annotations

import csv
import subprocess

TIMEOUT_S = 30.0


def nvidia_smi(*fields: str) -> list[dict[str, str]]:
    """A row of `fields` for each GPU; [] if nvidia-smi is absent, fails, takes more than TIMEOUT_S or lists nothing."""
    argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = csv.reader(done.stdout.splitlines() if done.returncode == 0 else [], skipinitialspace=True)
    rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]
