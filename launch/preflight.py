"""Checks of a run before it is sent to a cluster, and the plan's forecast for it. No torch."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from conf.errors import TransientError, UserError
from data_pipeline.files import read_json
from launch.cluster_config import ClusterConfig
from launch.job import SUBMITTED
from launch.plan import cluster_of, cut, simulated
from launch.slurm.queue import jobs
from trainer.check import check
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.world import World
from trainer.plan.choose import rows, way_out
from trainer.plan.course import course, seconds
from trainer.plan.hardware import CPU
from trainer.plan.workload import Workload
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import read_heartbeats

FRESH_S = 60.0  # a heartbeat younger than this is of a run that goes on


def preflight(cfg: PretrainConfig, cluster: ClusterConfig) -> tuple[PretrainConfig, list[str]]:
    """The config to freeze, with what the plan chooses at each start left open, and lines that describe the run.

    Raises:
        UserError: what its ranks would refuse, or a model that does not fit on them.
    """
    if cfg.gpu not in (None, cluster.gpu):
        raise UserError(f"gpu={cfg.gpu}, but cluster.gpu={cluster.gpu}: leave gpu out, the run is for cluster.gpu")
    machines, price = cluster_of(cluster)
    ranks = machines.world_size
    cfg = replace(cfg, gpu=cluster.gpu)
    checked = check(cfg, World(0, ranks, 0, cluster.gpus_per_node))
    cfg = replace(cfg, tracking=checked.cfg.tracking)  # the nodes may have other variables
    step = checked.state.get("step", 0)
    lines = [f"{cfg.run.name}: {'resumes at' if checked.state else 'starts at'} step {step} of {cfg.max_steps}"]
    lines += filter(None, (checked.chosen, checked.tracked, checked.done))
    if cluster.gpu == CPU:
        return cfg, [*lines, f"  {ranks} ranks on CPUs, for which nothing is planned: memory and time are not checked"]
    work = Workload.of(checked.cfg)
    (row,) = rows(checked.cfg, machines)  # with what the ranks will choose, nothing is open
    if not row.fits:
        raise UserError(way_out(row, work, checked.cfg.parallel, checked.cfg.micro_batch_size, machines))
    parts = course(
        cfg.data,
        n_ctx=cfg.model.n_ctx,
        tokens_per_step=cfg.tokens_per_step,
        ramp=cfg.batch_ramp,
        max_steps=cfg.max_steps,
    )
    left_s = seconds(work, row.layout, machines, parts) * (1 - step / cfg.max_steps)
    stated = "" if cluster.price_per_gpu_hour is not None else ", at a price that is assumed"
    guess = " (links simulated)" if simulated(machines) else ""
    lines.append(
        f"  {cluster.nodes} x {cluster.gpus_per_node} {machines.gpu.name}: {row.layout}, "
        f"{row.memory.gib()['total']:.1f} of {row.room_gib:.1f} GiB a rank"
    )
    lines.append(
        f"  about {row.tokens_per_s:,.0f} tokens/s{guess}, {left_s / 86400:.2f} days, "
        f"{left_s / 3600 * ranks * price:,.0f} USD{stated}"
    )
    return cfg, [*lines, *cut(cfg.max_hours, left_s / 3600)]


def alive(run_dir: Path) -> str | None:
    """A warning if a rank of this run has just written a heartbeat."""
    for beat in read_heartbeats(RunFolder(run_dir).heartbeats):
        age = time.time() - beat.time
        if age < FRESH_S and beat.phase != "end":
            return (
                f"warning: rank {beat.rank} of {run_dir} was at work on {beat.host!r} {max(0, age):.0f} s ago: while "
                f"it is, this start is refused; take_over={beat.generation} takes the run over from it"
            )
    return None


def queued(run_dir: Path) -> str | None:
    """A warning if squeue shows that an earlier job of this run still waits or runs."""
    ids: set[str] = set()
    for path in RunFolder(run_dir).submissions.glob(f"*/{SUBMITTED}"):
        with suppress(UserError, TransientError):  # damaged: launch.status tells
            started = read_json(path, "the others are asked for").get("jobs")
            ids.update(map(str, started if isinstance(started, list) else ()))
    if not ids:
        return None
    waiting = sorted(ids.intersection(job.job for job in jobs()))
    if not waiting:
        return None
    which = ", ".join(waiting)
    return f"warning: {run_dir} is in the queue already, as job {which}: scancel it if this one is to replace it"
