"""Checks of Slurm: its commands, its controller, the partition that a job asks for."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from launch.cluster_config import ClusterConfig, SlurmConfig, seconds
from trainer.diagnostics.check_result import CheckResult, fail, ok
from trainer.plan.hardware import CPU

PROGRAMS = ("sbatch", "srun", "scontrol", "sinfo")
ANSWER_S = 15.0
FIELDS = "%R|%P|%a|%l|%D|%T|%G"  # partition, with * where it is the default, up, time limit, nodes, state, GPUs
USABLE = ("idle", "mixed", "allocated", "completing", "planned", "reserved")


def commands() -> CheckResult:
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return fail("slurm commands", f"not in PATH: {', '.join(absent)}", "log in to a login node, or load its module")
    return ok("slurm commands", ", ".join(PROGRAMS))


def controller() -> CheckResult:
    """Check that the controller, or one of its backups, is up."""
    said = _said(["scontrol", "ping"])
    if re.search(r"\bis UP\b", said):
        return ok("slurm controller", said)
    return fail("slurm controller", said or "says nothing", "ask the cluster's administrators; scontrol ping")


def partition(cluster: ClusterConfig, slurm: SlurmConfig) -> Iterator[CheckResult]:
    """Check that the partition is up, allows the job's time, and has the nodes and GPUs that it asks for."""
    table = [row for line in _said(["sinfo", "-h", "-o", FIELDS]).splitlines() if len(row := line.split("|")) == 7]
    names = sorted({row[0] for row in table})
    wanted = slurm.partition.split(",") if slurm.partition else sorted({r[0] for r in table if r[1].endswith("*")})
    if not table:
        yield fail("partition", "sinfo names none", "sinfo must answer here: see the controller's line")
    elif not wanted:
        yield fail("partition", f"none is the default of {', '.join(names)}", "give cluster.slurm.partition=NAME")
    for name in wanted if table else ():
        rows = [row for row in table if row[0] == name]
        if not rows:
            yield fail("partition", f"{name!r} is none of {', '.join(names)}", "give another cluster.slurm.partition")
        else:
            yield _partition(name, rows, cluster, slurm)


def _partition(name: str, rows: Sequence[list[str]], cluster: ClusterConfig, slurm: SlurmConfig) -> CheckResult:
    up, limit = rows[0][2], rows[0][3]
    usable = [row for row in rows if row[5].rstrip("*~#!%$@^-+") in USABLE and not row[5].endswith("*")]
    nodes = sum(int(row[4]) for row in usable)
    gpus = max((gpus_of(row[6]) for row in usable), default=0)
    text = f"{name} is {up}, {nodes} of {sum(int(row[4]) for row in rows)} nodes usable, limit {limit}"
    if up != "up":
        return fail("partition", text, "give another cluster.slurm.partition, or wait until it is up")
    if nodes < cluster.nodes:
        return fail(
            "partition", f"{text}; the run is for {cluster.nodes}", "give fewer cluster.nodes; sinfo -R says why"
        )
    if cluster.gpu != CPU and gpus < cluster.gpus_per_node:
        asked = f"cluster.gpus_per_node={cluster.gpus_per_node}"
        return fail("partition", f"{text}, {gpus} GPUs on a node; {asked}", "give fewer, or cluster.gpu=cpu")
    if slurm.time is not None and seconds(slurm.time) > limit_of(limit):
        asked = f"cluster.slurm.time={slurm.time}"
        return fail("partition", f"{text}; {asked}", "give less time, and cluster.slurm.chain=N jobs in a row")
    return ok("partition", text)


def limit_of(time: str) -> float:
    """A time limit in seconds; sinfo writes infinite or n/a for none."""
    return seconds(time) if time[:1].isdecimal() else math.inf


def gpus_of(gres: str) -> int:
    """GPUs of a node, from gpu:8, gpu:h100:8(S:0-1), gpu:a:1,gpu:b:2."""
    counts = re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres)
    return sum(map(int, counts))


def _said(argv: list[str]) -> str:
    """The output of a command, or its errors if it has none. Raises OSError, subprocess.TimeoutExpired."""
    said = subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_S, errors="replace")
    return said.stdout.strip() or said.stderr.strip()
