"""Starts a job on this machine, in the foreground: torchrun, or DeepSpeed's launcher."""

from __future__ import annotations

import socket

from conf.errors import UserError
from launch.cluster_config import LocalLauncher
from launch.job import Job, rank_arguments, supervised
from trainer.plan.hardware import CPU


def prepare(job: Job) -> list[list[str]]:
    """The command of each run of the job, to be run in `job.cwd`; those of a sweep one after the other."""
    cluster = job.cluster
    if cluster.nodes > 1:
        raise UserError(f"cluster.nodes={cluster.nodes} with cluster=local, which is one machine: give cluster=ssh")
    env = {"DS_ACCELERATOR": CPU} if cluster.gpu == CPU else {}
    variables = [f"{name}={value}" for name, value in (env | cluster.env).items()]
    commands = [supervised(job, i, launcher(job, i)) for i in range(len(job.configs))]
    return [["env", *variables, *command] if variables else command for command in commands]


def launcher(job: Job, i: int) -> list[str]:
    """The command that starts the ranks of run `i` once."""
    assert job.cluster.local is not None
    ranks = str(job.cluster.gpus_per_node)
    if job.cluster.local.launcher is LocalLauncher.torchrun:
        return [
            job.python,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            ranks,
            *rank_arguments(job, i),
        ]
    alone = ["--hostfile", "/dev/null", "--master_port", str(free_port()), "--no_local_rank"]
    flag, module, frozen = rank_arguments(job, i)
    assert flag == "-m"
    return [job.python, "-m", "deepspeed.launcher.runner", *alone, "--num_gpus", ranks, "--module", module, frozen]


def free_port() -> int:
    """The kernel's choice, so that runs side by side on this machine do not meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
