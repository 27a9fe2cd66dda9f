"""The tasks of a stage over a Ray cluster: the one that RAY_ADDRESS names, or one on this machine for this run alone.

datatrove's executor does each task; who calls it is ours. Its RayPipelineExecutor (0.10.1) forks a pool inside Ray's
actor, which inherits Ray's SIGTERM handler: a SIGTERM that lands in a finalizer is lost there, and the pool waits for
ever. It also logs what a task raises and goes on, and waits for ever where an actor does not start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor

from conf.errors import UserError

HERE = "local"  # ray.init's word for a cluster of its own


@contextmanager
def cluster() -> Iterator[None]:
    """Joins or begins the cluster; at the end, what was begun here is gone.

    Raises:
        UserError: Ray is not installed, or nothing answers at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address() != HERE:
        os.environ.setdefault(
            "RAY_NUM_REDIS_GET_RETRIES", "2"
        )  # of some 40 s each, before it says that nobody is there
    try:
        import ray
    except ImportError:
        raise UserError("executor=ray needs ray: pip install 'gradus[ray]'") from None
    try:
        ray.init(address(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise UserError(f"executor=ray: RAY_ADDRESS={address()}: {e}") from None
    try:
        yield
    finally:
        ray.shutdown()


def address() -> str:
    return os.environ.get("RAY_ADDRESS") or HERE


def run(executor: PipelineExecutor, workers: int, memory_gib: int) -> None:
    """Run the tasks that are not complete, at most `workers` at a time; 0 = as many as the cluster takes.

    A task whose process or node dies is begun again, three times; the first error that a task raises ends the stage.

    Raises:
        UserError: no node can take a task, or a task's process died each time.
        Exception: what a task raised.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    fits(memory_gib)
    begin = ray.remote(num_cpus=1, memory=memory_gib << 30, max_retries=3)(task)
    shared, here = ray.put(executor), Path.cwd()
    waiting = iter(executor.get_incomplete_ranks())
    running = {begin.remote(shared, rank, here): rank for rank in islice(waiting, workers or None)}
    while running:
        (ended,), _ = ray.wait(list(running))
        rank = running.pop(ended)
        try:
            ray.get(ended)
        except RayTaskError as e:
            raise e.cause from None
        except RayError as e:
            raise UserError(
                f"executor=ray: the process of task {rank} died each time, perhaps for want of memory: see "
                f"executor.memory_gib={memory_gib} and {executor.logging_dir.path}/logs: {str(e).splitlines()[0]}"
            ) from None
        running |= {begin.remote(shared, rank, here): rank for rank in islice(waiting, 1)}


def task(executor: Any, rank: int, here: Path) -> None:
    os.chdir(here)  # a node begins elsewhere; the user's paths may be relative
    executor._run_for_rank(rank, rank)


def fits(memory_gib: int) -> None:
    """A cluster may still grow; one on this machine does not, and Ray would wait for ever."""
    import ray

    if address() == HERE and memory_gib << 30 > (most := ray.cluster_resources()["memory"]):
        raise UserError(
            f"executor.memory_gib={memory_gib}: Ray has {most / 2**30:.1f} GiB for tasks here: give less, or name a "
            f"cluster by RAY_ADDRESS"
        )
