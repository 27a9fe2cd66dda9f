"""The same stages on this machine, as Slurm's array jobs, or over a Ray cluster; datatrove's executors do the tasks.

A stage that is complete is skipped, and in a stage each task that is: datatrove's marks in OUTPUT/work/logs say so.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from conf.errors import UserError
from data_pipeline.corpus.child_process import follow_parent
from data_pipeline.prepare.config import Executor, ExecutorConfig
from data_pipeline.prepare.executors import on_ray
from data_pipeline.prepare.parts import Mark, Parts
from data_pipeline.prepare.stages import Stage


def execute(stages: Sequence[tuple[Path, Stage]], cfg: ExecutorConfig) -> None:
    """Run the stages one after the other; with Slurm, submit them so that they do.

    Args:
        stages: each with the folder of its marks and logs
    """
    logger.remove()
    if cfg.name is Executor.slurm:
        submit(stages, cfg)
        return
    with on_ray.cluster() if cfg.name is Executor.ray else contextlib.nullcontext():
        for logs, stage in stages:
            with watched(stage):
                if cfg.name is Executor.ray:
                    on_ray.run(local(logs, stage, cfg), cfg.workers, cfg.memory_gib)
                else:
                    local(logs, stage, cfg).run()


@cache
def nowhere() -> TextIO:
    return Path(os.devnull).open("w")


class Quiet(LocalPipelineExecutor):
    """Tasks write to their logs; the terminal is the progress bar's."""

    def run(self) -> None:
        """As datatrove's, whose pool would wait for ever for a worker that was killed.

        Raises:
            UserError: a worker was killed.
            Exception: the first that a task raised; tasks that run are still completed.
        """
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                deepcopy(self)._run_for_rank(rank)
            return
        pool = ProcessPoolExecutor(self.workers, get_context("forkserver"), initializer=follow_parent)
        try:
            for task in as_completed([pool.submit(self._run_for_rank, rank) for rank in ranks]):
                task.result()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, perhaps for want of memory: run the same command again with fewer than "
                f"executor.workers={self.workers}; finished parts are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.redirect_stderr(nowhere()):
            return super()._run_for_rank(*args, **kwargs)


def local(logs: Path, stage: Stage, cfg: ExecutorConfig) -> Quiet:
    workers = min(stage.tasks, cfg.workers or len(os.sched_getaffinity(0)))
    return Quiet([stage.step], tasks=stage.tasks, workers=workers, logging_dir=str(logs))


class After(PipelineStep):
    """Stops a job whose stage is begun too early: Slurm holds it back for the last array alone of the one before.

    Raises:
        UserError: a task of the stage before is not complete.
    """

    type, name = "stage", "after"

    def __init__(self, logs: Path, tasks: int) -> None:
        super().__init__()
        self.logs, self.tasks = logs, tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        for task in range(self.tasks):
            if not (self.logs / "completions" / f"{task:05d}").exists():
                raise UserError(f"task {task} of the stage before is not complete: see {self.logs / 'slurm_logs'}")
        return data


def submit(stages: Sequence[tuple[Path, Stage]], cfg: ExecutorConfig) -> None:
    """One array job for each stage, each after the one before it."""
    if not shutil.which("sbatch"):
        raise UserError("executor=slurm: no sbatch here: run it on a machine that submits to the cluster")
    before: SlurmPipelineExecutor | None = None
    after: list[After] = []
    here = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    for logs, stage in stages:
        if any(c.isspace() for c in str(logs.resolve())):
            raise UserError(
                f"output: {logs.resolve()} has a space, which Slurm's scripts cannot have: give another output="
            )
        before = SlurmPipelineExecutor(
            [*after, stage.step],
            tasks=stage.tasks,
            time=cfg.time,
            partition=str(cfg.partition),
            mem_per_cpu_gb=cfg.memory_gib,
            workers=cfg.workers or -1,
            job_name=f"gradus-{logs.name}",
            qos=None,
            env_command=cfg.setup or here,
            sbatch_args={"kill-on-invalid-dep": "yes", **cfg.sbatch},
            depends=before,
            logging_dir=str(logs),
        )
        after = [After(logs, stage.tasks)]
        try:
            before.launch_job()
        except subprocess.CalledProcessError as e:
            raise UserError(
                f"executor=slurm: sbatch ended with exit code {e.returncode}, its words stand above: see "
                f"executor.partition={cfg.partition}, executor.time={cfg.time} and executor.sbatch={cfg.sbatch}"
            ) from None
        print(f"{stage.name}: Slurm job {before.job_id}" if before.job_id != -1 else f"{stage.name}: complete")


@contextmanager
def watched(stage: Stage) -> Iterator[None]:
    """A bar of a stage's input, moved by the marks of its parts."""
    if not isinstance(stage.step, Parts):
        print(f"{stage.name} ...", file=sys.stderr)
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(stage, stage.step, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(stage: Stage, parts: Parts, over: threading.Event) -> None:
    from tqdm import tqdm

    every = 0.5 if sys.stderr.isatty() else 30.0
    total = sum(file.size for task in range(stage.tasks) for file in parts.files(task))
    seen: set[str] = set()
    behind: dict[str, int] = {}  # bytes of each task's input that its marks have behind them
    records = documents = 0
    corpus = parts.marks.resolve().parts[-3]
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"{corpus}: {stage.name}", mininterval=every) as bar:
        while True:
            last = over.wait(every)
            for path in sorted(parts.marks.glob("[0-9]*-*.json")):
                if path.name not in seen:
                    seen.add(path.name)
                    try:
                        mark = Mark.load(path)
                    except UserError:
                        continue  # a damaged one is its task's to tell
                    behind[path.name.partition("-")[0]] = mark.bytes
                    records += mark.passages["read"].taken.documents
                    documents += mark.documents
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{records / seconds:,.0f} records/s, {documents:,} documents kept", refresh=False)
            bar.update(sum(behind.values()) - bar.n)
            if last:
                return
