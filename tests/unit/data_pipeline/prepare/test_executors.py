"""A task that fails ends the whole command in one line, and no later stage runs on what it left."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from datatrove.pipeline.base import PipelineStep

from conf.errors import TransientError, UserError
from data_pipeline.prepare.executors.executors import execute, require_complete
from data_pipeline.prepare.prepare_config import Executor, ExecutorConfig
from data_pipeline.prepare.stages import Stage

WORDS = r"^'?the words of task 1'?$"


class Fails(PipelineStep):
    """Task 1 fails in one of several ways; the others leave a file."""

    type, name = "stage", "fails"

    def __init__(self, out: Path, how: str) -> None:
        super().__init__()
        self.out, self.how = out, how

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if rank == 1:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"mistake": UserError, "passing": TransientError, "bug": KeyError}[self.how](
                f"the words of task {rank}"
            )
        self.out.mkdir(exist_ok=True)
        (self.out / str(rank)).touch()


def stages(folder: Path, how: str) -> list[tuple[Path, Stage]]:
    names = ("first", "second")
    return [(folder / "logs" / name, Stage(name, Fails(folder / name, how), 3)) for name in names]


@pytest.mark.parametrize(("how", "error"), [("mistake", UserError), ("passing", TransientError), ("bug", KeyError)])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_raised_and_ends_the_work(how: str, error: type, workers: int, tmp_path: Path) -> None:
    with pytest.raises(error, match=WORDS) as raised:
        execute(stages(tmp_path, how), ExecutorConfig(workers=workers))
    assert type(raised.value) is error
    assert not (tmp_path / "second").exists()
    assert not (tmp_path / "logs" / "first" / "completions" / "00001").exists()
    assert "the words of task 1" in (tmp_path / "logs" / "first" / "logs" / "task_00001.log").read_text()


def test_a_worker_that_is_killed_ends_the_work_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a worker process was killed.*executor.workers=2"):
        execute(stages(tmp_path, "killed"), ExecutorConfig(workers=2))
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "error"), [("mistake", UserError), ("passing", TransientError), ("bug", KeyError), ("killed", UserError)]
)
def test_on_ray_as_well(how: str, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gradus[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = "task 1 died" if how == "killed" else WORDS
    with pytest.raises(error, match=words) as raised:
        execute(stages(tmp_path, how), ExecutorConfig(name=Executor.ray, workers=2, memory_gib=1))
    assert type(raised.value) is error and "\n" not in str(raised.value)
    assert not (tmp_path / "second").exists()


def test_slurm_gets_no_orders_from_the_submitters_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = tmp_path / "sbatch"
    fake.write_text(f'#!/bin/sh\n/usr/bin/env > "{tmp_path}/seen"\necho Submitted batch job 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    given = {"SLURM_MEM_PER_NODE": "1", "SRUN_DEBUG": "9", "SLURM_CONF": "/its/conf", "MY_OWN": "kept"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    execute(stages(tmp_path, "none"), ExecutorConfig(name=Executor.slurm, partition="main"))
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "seen").read_text().splitlines())
    assert {name: seen.get(name) for name in given} == given | {"SLURM_MEM_PER_NODE": None, "SRUN_DEBUG": None}
    assert given.items() <= os.environ.items()
    assert "you are in: SLURM_* (1), SRUN_* (1)\n" in capsys.readouterr().err


def test_a_job_that_slurm_lets_go_too_early_stops(tmp_path: Path) -> None:
    done = tmp_path / "completions"
    done.mkdir()
    for task in (0, 2):
        (done / f"{task:05d}").touch()
    with pytest.raises(UserError, match="task 1 of the stage before is not complete"):
        require_complete(tmp_path, 3)
    (done / "00001").touch()
    require_complete(tmp_path, 3)
