"""The same stages on this machine, as Slurm's array jobs, or over a Ray cluster; datatrove's executors do the tasks.

A complete stage is skipped, and so is each complete task of a stage: datatrove's marks in OUTPUT/work/logs name them.
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
from concurrent.futures import as_completed
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from loguru import logger

from conf.environment import only_passed_on
from conf.errors import UserError
from data_pipeline.corpus.workers import follow_parent, worker_pool
from data_pipeline.prepare.executors import on_ray
from data_pipeline.prepare.parts import Mark, Parts
from data_pipeline.prepare.prepare_config import Executor, ExecutorConfig
from data_pipeline.prepare.stages import Stage
from data_pipeline.prepare.step import Call


def execute(stages: Sequence[tuple[Path, Stage]], cfg: ExecutorConfig) -> None:
    """Run the stages one after the other; with Slurm, submit them so that they run in this order.

    Args:
        stages: each with the folder of its marks and logs
    """
    logger.remove()
    if cfg.name is Executor.slurm:
        with only_passed_on():  # datatrove calls sbatch with our environment
            submit(stages, cfg)
        return
    with on_ray.cluster() if cfg.name is Executor.ray else contextlib.nullcontext():
        for logs, stage in stages:
            with progress_bar(stage):
                if cfg.name is Executor.ray:
                    on_ray.run(local(logs, stage, cfg), cfg.workers, cfg.memory_gib)
                else:
                    local(logs, stage, cfg).run()


@cache
def devnull() -> TextIO:
    return Path(os.devnull).open("w")


class Quiet(LocalPipelineExecutor):
    """Tasks write to their logs; the terminal is for the progress bar."""

    def run(self) -> None:
        """As datatrove's, whose pool waits forever if a worker is killed.

        Raises:
            UserError: a worker was killed.
            Exception: the first that a task raised; running tasks are still completed.
        """
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                deepcopy(self)._run_for_rank(rank)
            return
        with worker_pool(self.workers, "forkserver", follow_parent, (), "executor.workers", "parts") as pool:
            for task in as_completed([pool.submit(self._run_for_rank, rank) for rank in ranks]):
                task.result()

    def _run_for_rank(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.redirect_stderr(devnull()):
            return super()._run_for_rank(*args, **kwargs)


def local(logs: Path, stage: Stage, cfg: ExecutorConfig) -> Quiet:
    workers = min(stage.tasks, cfg.workers or len(os.sched_getaffinity(0)))
    return Quiet([stage.step], stage.tasks, workers, logging_dir=str(logs), skip_completed=not stage.repeat)


def require_complete(logs: Path, tasks: int) -> None:
    """Stop a job whose stage starts too early: Slurm's dependency covers only the last array of the stage before.

    Raises:
        UserError: a task of the stage before is not complete.
    """
    for task in range(tasks):
        if not (logs / "completions" / f"{task:05d}").exists():
            raise UserError(f"task {task} of the stage before is not complete: see {logs / 'slurm_logs'}")


def submit(stages: Sequence[tuple[Path, Stage]], cfg: ExecutorConfig) -> None:
    """Submit one array job for each stage, each after the one before it."""
    if not shutil.which("sbatch"):
        raise UserError("executor=slurm: no sbatch here: run it on a machine that submits to the cluster")
    before: SlurmPipelineExecutor | None = None
    after: list[Call] = []
    this_python = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
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
            env_command=cfg.setup or this_python,
            sbatch_args={"kill-on-invalid-dep": "yes", **cfg.sbatch},
            depends=before,
            logging_dir=str(logs),
            skip_completed=not stage.repeat,
        )
        after = [Call("after", partial(require_complete, logs, stage.tasks), numbered=False)]
        try:
            before.launch_job()
        except subprocess.CalledProcessError as e:
            raise UserError(
                f"executor=slurm: sbatch ended with exit code {e.returncode}, its message is above: see "
                f"executor.partition={cfg.partition}, executor.time={cfg.time} and executor.sbatch={cfg.sbatch}"
            ) from None
        print(f"{stage.name}: Slurm job {before.job_id}" if before.job_id != -1 else f"{stage.name}: complete")


@contextmanager
def progress_bar(stage: Stage) -> Iterator[None]:
    """Show a stage's progress through its input, as the marks of its parts give it."""
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
    done: dict[str, int] = {}  # bytes of each task's input before its last mark
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
                        continue  # the task itself reports a damaged mark
                    done[path.name.partition("-")[0]] = mark.bytes
                    records += mark.passages["read"].taken.documents
                    documents += mark.documents
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{records / seconds:,.0f} records/s, {documents:,} documents kept", refresh=False)
            bar.update(sum(done.values()) - bar.n)
            if last:
                return
