"""Starts the node check on the nodes of a Slurm allocation, or on this machine, and reads what it found."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from conf.frozen import literal
from launch.config import DoctorConfig
from trainer.diagnostics.check_result import CheckResult, fail, from_json
from trainer.plan.hardware import CPU
from trainer.run.nvidia_smi import nvidia_smi

CPU_RANKS = 2  # of a node without GPUs
STAGES = 7  # of trainer.diagnostics.node_check, each with its own time limit
START_S = 120.0  # to import torch on all of them
NAME = "nodes"


def examine_nodes(cfg: DoctorConfig, root: Path) -> list[CheckResult]:
    """The results that rank 0 of the check prints; if it prints none, one failure with the launcher's last output."""
    argv, limit_s = command(cfg), START_S + STAGES * cfg.timeout_s
    env = {**os.environ, **cfg.cluster.env, **({"DS_ACCELERATOR": CPU} if cfg.cluster.gpu == CPU else {})}
    with tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(argv, cwd=root, env=env, stdout=out, stderr=err, start_new_session=True)
        except OSError as e:
            return [fail(NAME, f"{argv[0]} cannot be started: {e.strerror}", "install it, or put it into PATH")]
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where we are interrupted: srun passes SIGTERM on to its tasks
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break
        out.seek(0)
        err.seek(0)
        findings = read(out.read().decode(errors="replace"))
        if findings is not None:
            return findings
        lines = [line for line in err.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"no answer within {limit_s:g} s" if code is None else f"ended with exit code {code}"
    cure = "see what the launcher says on one node: srun -N1 hostname" if argv[0] == "srun" else "see what it says"
    return [fail(NAME, f"{argv[0]}: {how}, and rank 0 told nothing: {lines[-1] if lines else 'no output'}", cure)]


def command(cfg: DoctorConfig) -> list[str]:
    """The command: srun over all nodes of the allocation; outside of one, torchrun on this machine."""
    allocated = "SLURM_JOB_ID" in os.environ
    gpus = 0 if cfg.cluster.gpu == CPU else gpus_of_a_node(os.environ, cfg.cluster.gpus_per_node)
    ranks = gpus or CPU_RANKS
    expected = 0 if cfg.cluster.gpu == CPU else cfg.cluster.gpus_per_node
    check = ["-m", "trainer.diagnostics.node_check", f"run.dir={literal(str(Path(cfg.run.dir).absolute()))}"]
    check += [f"gpus_per_node={expected}", f"timeout_s={cfg.timeout_s}"]
    if not allocated:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *check]
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if expected:
        check.append(f"network_gbit={cfg.cluster.network_gbit}")
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * ranks}", f"--ntasks-per-node={ranks}", "--overcommit"]
    step += ["--overlap", "--distribution=block", "--export=ALL", "--mpi=none", "--kill-on-bad-exit=0"]
    step += [f"--gpus-per-node={gpus}"] if gpus else []
    return [*step, sys.executable, "-m", "launch.slurm.rendezvous", "--", sys.executable, *check]


def gpus_of_a_node(env: Mapping[str, str], wanted: int) -> int:
    """GPUs of a node: those that Slurm gave, else those of nvidia-smi that CUDA_VISIBLE_DEVICES allows.

    salloc runs its command where it was typed, on a login node as a rule: there Slurm tells what was asked for, and
    where GPUs were asked for in another way (--gres, a whole node) nothing: then srun is to give the `wanted`.
    """
    if "SLURM_JOB_ID" in env:
        on_node, asked = env.get("SLURM_GPUS_ON_NODE", ""), env.get("SLURM_GPUS_PER_NODE", "")
        if "SLURMD_NODENAME" in env and on_node.isdecimal():
            return int(on_node)
        kinds = re.findall(r"(?:^|,)(?:[^:,]+:)*(\d+)(?=,|$)", asked)  # 8, h100:8, a:1,b:2
        return sum(map(int, kinds)) or wanted
    visible = env.get("CUDA_VISIBLE_DEVICES")
    count = len(nvidia_smi("index"))
    return count if visible is None else min(count, len([v for v in visible.split(",") if v not in ("", "-1")]))


def read(out: str) -> list[CheckResult] | None:
    """The findings in the last line that holds some: libraries print into the same stream."""
    for line in reversed(out.splitlines()):
        with suppress(ValueError, TypeError, KeyError):
            return [from_json(body) for body in json.loads(line)["findings"]]
    return None
