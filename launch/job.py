"""A job: the frozen configs of a run, or of each run of a sweep, and the folders and cluster to start them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.frozen import literal
from launch.cluster_config import ClusterConfig

SUBMITTED = "submitted.json"  # in a submission's folder, once it has been started: Slurm's ids, commands, time


@dataclass(frozen=True)
class Job:
    name: str  # run.name
    run_dir: Path  # absolute
    folder: Path  # run_dir/submit/0001: frozen configs, code version, and what the launcher writes
    configs: tuple[Path, ...]  # the frozen config of each array element; one, where it is no sweep
    run_dirs: tuple[Path, ...]  # the run folder of each
    cluster: ClusterConfig
    python: str
    cwd: Path  # the checkout
    max_restarts: int
    allow_pipe: bool = False  # which no frozen config grants


def supervised(job: Job, i: int, launcher: Sequence[str], grace_s: int | None = None) -> list[str]:
    """The command that starts `launcher` again when it fails, as long as the checkpoints of element `i` advance.

    `grace_s`: for what a launcher that has ended left behind; None: launch.supervise's own.
    """
    own = [f"run.dir={literal(str(job.run_dirs[i]))}", f"max_restarts={job.max_restarts}"]
    own += [] if grace_s is None else [f"grace_s={grace_s}"]
    return [job.python, "-m", "launch.supervise", *own, "--", *launcher]


def rank_arguments(job: Job, i: int) -> list[str]:
    """The arguments with which a Python interpreter trains element `i`."""
    allowed = ["data.allow_pipe=true"] if job.allow_pipe else []
    return ["-m", "trainer.pretrain", f"frozen={job.configs[i]}", *allowed]
