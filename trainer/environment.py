"""environment/0001.json: what a start of a run ran on, and what code. No torch of its own; no secret.

Of the environment only what steers a training is told: an unknown variable may hold anything.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from data_pipeline.manifest import publish_json
from trainer.redact import redact_command, redact_tree
from trainer.run_folder import RunFolder

STEERING = re.compile(
    r"(CUDA|NCCL|GLOO|UCX|FI|OMPI|OMP|MKL|TORCH|TORCHINDUCTOR|TORCHELASTIC|PYTORCH|TRITON|DS|DEEPSPEED|SLURM|MLFLOW|HF"
    r"|PYTHON|LD|ROCR|HIP|CONDA|VIRTUAL)_?.*|PATH|TZ|LANG|LC_.*|MASTER_ADDR|MASTER_PORT|WORLD_SIZE|HOSTNAME"
)
CODE = Path(__file__).resolve().parent.parent
GPUS = ("index", "name", "memory.total", "driver_version")
PATIENCE_S = 30.0  # for git and nvidia-smi


def gather(folder: RunFolder) -> dict[str, Any]:
    """Takes a second: not on the training thread."""
    body = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [dict(zip(GPUS, row, strict=False)) for row in nvidia_smi(GPUS)],
        "python": sys.version,
        "packages": {d.metadata["Name"]: d.version for d in sorted(distributions(), key=lambda d: d.name.lower())},
        "code": code_version(folder),
        "environment": {k: v for k, v in sorted(os.environ.items()) if STEERING.fullmatch(k)},
    }
    return {**redact_tree(body), "command": redact_command(sys.orig_argv)}


def store(folder: RunFolder, generation: int) -> None:
    folder.environments.mkdir(exist_ok=True)
    publish_json(folder.environments / f"{generation:04d}.json", gather(folder))


def code_version(folder: RunFolder) -> dict[str, Any] | None:
    """As launch.submit froze it, else as git has it here; None where nobody knows."""
    frozen = sorted(folder.root.glob("submit/[0-9]*/code.json"))
    if frozen:
        body = json.loads(frozen[-1].read_text(encoding="utf-8"))
        return body if isinstance(body, dict) else None
    commit = _output("git", "-C", str(CODE), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(CODE), "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changed.strip()), "changed": changed.splitlines()}


def nvidia_smi(fields: tuple[str, ...]) -> list[list[str]]:
    """One row for each GPU of this node, as the driver's own program tells; none where there is no such program."""
    out = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    return [[cell.strip() for cell in line.split(",")] for line in (out or "").splitlines() if line.strip()]


def _output(*argv: str) -> str | None:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
