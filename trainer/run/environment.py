"""environment/0001.json: the machine and the code of a start of a run. No torch of its own; no secret.

Of the environment it has only the variables that steer a training: an unknown one may hold anything.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_pipeline.files import publish_json, read_json
from trainer.run.code_version import code_version, packages
from trainer.run.folder import RunFolder
from trainer.run.nvidia_smi import nvidia_smi
from trainer.run.redact import redact_command, redact_tree

STEERING = re.compile(
    r"(CUDA|NCCL|GLOO|UCX|FI|OMPI|OMP|MKL|TORCH|TORCHINDUCTOR|TORCHELASTIC|PYTORCH|TRITON|DS|DEEPSPEED|SLURM|MLFLOW|HF"
    r"|PYTHON|LD|ROCR|HIP|CONDA|VIRTUAL)_?.*|PATH|TZ|LANG|LC_.*|MASTER_ADDR|MASTER_PORT|WORLD_SIZE|HOSTNAME"
)
VERSION = ("commit", "dirty", "untracked")  # of which two versions of the code differ, beside the patch
GPUS = ("index", "name", "memory.total", "driver_version")


def gather(folder: RunFolder) -> dict[str, Any]:
    """All facts about this start. Takes a second: not for the training thread."""
    body = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": nvidia_smi(*GPUS),
        "python": sys.version,
        "code": code_of(folder),
        "environment": {k: v for k, v in sorted(os.environ.items()) if STEERING.fullmatch(k)},
    }
    return {**redact_tree(body), "packages": packages(), "command": redact_command(sys.orig_argv)}


def store(folder: RunFolder, generation: int) -> None:
    """Write the file of this start."""
    folder.environments.mkdir(exist_ok=True)
    publish_json(folder.environments / f"{generation:04d}.json", gather(folder), private=True)


def code_of(folder: RunFolder) -> dict[str, Any]:
    """The version of the code that runs; if the newest launch.submit froze another one, also that one."""
    version, patch = code_version()
    own = {key: value for key, value in version.items() if key not in ("packages", "python")}  # those are in gather
    frozen = sorted(folder.submissions.glob("[0-9]*/code.json"))
    if not frozen:
        return own
    body = read_json(frozen[-1], "this start goes on")
    theirs = {key: body.get(key) for key in VERSION}
    of_sweep = Path(str(body["folder"])) if "folder" in body else frozen[-1].parent
    with contextlib.suppress(OSError):
        theirs["changes"] = sha256((of_sweep / "code.patch").read_bytes()).hexdigest()
    ours = {key: own.get(key) for key in VERSION} | ({"changes": sha256(patch).hexdigest()} if patch else {})
    differ = {key: value for key, value in theirs.items() if value != ours.get(key)}
    differ |= {"changes": None} if "changes" in ours and "changes" not in theirs else {}
    return {**own, "submitted": {"number": frozen[-1].parent.name, **differ}} if differ else own


def owner(folder: RunFolder) -> str:
    """The user whose run it is, also where another one sends it; the number of one without a name here."""
    try:
        return folder.root.owner()
    except KeyError:
        return str(folder.root.stat().st_uid)
