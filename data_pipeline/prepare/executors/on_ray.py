"""The tasks of a stage over a Ray cluster: the one that RAY_ADDRESS names, or one on this machine for this run only.

datatrove's executor does each task, and this module schedules them. datatrove's own RayPipelineExecutor (0.10.1) forks
a pool inside Ray's actor, which inherits Ray's SIGTERM handler: a SIGTERM that arrives in a finalizer is lost, and the
pool waits forever. It also logs a task's exception and continues, and waits forever if an actor does not start.
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

LOCAL = "local"  # ray.init's word for a cluster of its own


@contextmanager
def cluster() -> Iterator[None]:
    """Join or start the cluster; at the end, a cluster that was started here is stopped.

    Raises:
        UserError: Ray is not installed, or nothing answers at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray_address() != LOCAL:  # retries of some 40 s each, before Ray reports that nothing answers
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    try:
        import ray
    except ImportError:
        raise UserError("executor=ray needs ray: pip install 'gradus[ray]'") from None
    try:
        ray.init(ray_address(), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise UserError(f"executor=ray: RAY_ADDRESS={ray_address()}: {e}") from None
    try:
        yield
    finally:
        ray.shutdown()


def ray_address() -> str:
    return os.environ.get("RAY_ADDRESS") or LOCAL


def run(executor: PipelineExecutor, workers: int, memory_gib: int) -> None:
    """Run the tasks that are not complete, at most `workers` at a time; 0 = as many as the cluster takes.

    A task whose process or node dies is started again, three times; the first error that a task raises ends the stage.

    Raises:
        UserError: no node can take a task, or a task's process died each time.
        Exception: what a task raised.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    check_memory(memory_gib)
    remote_task = ray.remote(num_cpus=1, memory=memory_gib << 30, max_retries=3)(task)
    shared, folder = ray.put(executor), Path.cwd()
    waiting = iter(executor.get_incomplete_ranks())
    running = {remote_task.remote(shared, rank, folder): rank for rank in islice(waiting, workers or None)}
    while running:
        (ended,), _ = ray.wait(list(running))
        rank = running.pop(ended)
        try:
            ray.get(ended)
        except RayTaskError as e:
            raise e.cause from None
        except RayError as e:
            raise UserError(
                f"executor=ray: the process of task {rank} died each time, perhaps because memory ran out: see "
                f"executor.memory_gib={memory_gib} and {executor.logging_dir.path}/logs: {str(e).splitlines()[0]}"
            ) from None
        running |= {remote_task.remote(shared, rank, folder): rank for rank in islice(waiting, 1)}


def task(executor: Any, rank: int, folder: Path) -> None:
    os.chdir(folder)  # a node starts in another folder, and the user's paths may be relative
    executor._run_for_rank(rank, rank)


def check_memory(memory_gib: int) -> None:
    """Refuse tasks too large for a cluster on this machine: it does not grow, and Ray would wait forever."""
    import ray

    if ray_address() == LOCAL and memory_gib << 30 > (limit := ray.cluster_resources()["memory"]):
        raise UserError(
            f"executor.memory_gib={memory_gib}: Ray has {limit / 2**30:.1f} GiB for tasks here: give less, or name a "
            f"cluster by RAY_ADDRESS"
        )
