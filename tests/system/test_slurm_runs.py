"""Runs on a real Slurm of two nodes, one rank on each: whatever stops one, it goes on as if nothing had been.

Every run has the same data and seed, so that all are compared with one that was left alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import slurm
from tests.helpers.http_server import wait_for
from tests.helpers.ranks import ROOT
from tests.system.runs import TINY, make_data, pretrain
from tests.system.test_resume import story
from trainer.run.folder import RunFolder
from trainer.run.heartbeat import read_heartbeats
from trainer.run.journal import read_journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 300
HOSTILE = 'it\'s "a" $(touch hit) 100% run'


@dataclass(frozen=True)
class Site:
    """A cluster, the run that all others must equal, and where they go."""

    root: Path
    env: dict[str, str]
    whole: Path
    overrides: tuple[str, ...]

    def submit(self, name: str, *words: str) -> tuple[Path, list[str]]:
        """The run folder and the ids of the jobs."""
        run = self.root / HOSTILE / name
        argv = [sys.executable, "-m", "launch.submit", "cluster=slurm", f"run.name={HOSTILE} {name}", f"run.dir={run}"]
        size = ["cluster.nodes=2", "cluster.gpus_per_node=1", "cluster.gpu=cpu", "cluster.slurm.partition=main"]
        argv += [*size, "cluster.env.OMP_NUM_THREADS=1", *words, "--", *self.overrides]
        done = subprocess.run(argv, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return run, done.stdout.splitlines()[-1].removeprefix("submitted: ").split(", ")

    def control(self, *words: str) -> None:
        subprocess.run(words, env=self.env, check=True, timeout=300)

    def job(self, id: str) -> dict[str, str]:
        """What Slurm knows of it."""
        said = slurm.said(self.env, "scontrol", "show", "job", "-o", id)
        return dict(re.findall(r"(JobState|Restarts|ExitCode|Reason)=(\S*)", said))

    def wait(self, id: str, seconds: float = 200, **expected: str) -> None:
        try:
            wait_for(lambda: expected.items() <= self.job(id).items(), seconds)
        except AssertionError:
            pytest.fail(f"{id} is {self.job(id)}, not {expected}\n{self.logs()}")

    def logs(self) -> str:
        found = sorted((self.root / HOSTILE).rglob("slurm-*.out"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-5000:]}" for path in found)

    def reached(self, run: Path, step: int) -> None:
        """Returns when the run's last start is past `step`."""
        try:
            wait_for(lambda: step < last(run), 200)
        except AssertionError:
            pytest.fail(f"{run} stands at {last(run)}, not past {step}\n{self.logs()}")

    def same(self, run: Path) -> None:
        assert len(story(run)) == STEPS, self.logs()
        assert story(run) == story(self.whole), self.logs()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if why := slurm.missing():
        pytest.skip(f"Slurm cannot be started: {why}")
    root = tmp_path_factory.mktemp("slurm_runs")
    own = (f"data.path={make_data(root / 'data')}", f"max_steps={STEPS}", "checkpoint.every_steps=40")
    own += ("model.dropout=0.1", "eval.every=50", "watch.hang_min_s=400")
    whole = root / "whole"
    pretrain(whole, *own, ranks=2)
    with slurm.cluster(root / "slurm") as env:
        yield Site(root, env, whole, (*TINY, *own))
    assert not list(root.rglob("hit")) and not (ROOT / "hit").exists(), "a name was run as a command"


def last(run: Path) -> int:
    journal = run / "metrics.jsonl"
    return read_journal(journal)[-1].step if journal.exists() and read_journal(journal) else 0


def saved(run: Path) -> int:
    latest = RunFolder(run).latest()
    return int(latest.name[5:13]) if latest else 0


def starts(run: Path) -> int:
    return len(list((run / "generations").iterdir()))


def supervised(run: Path) -> list[str]:
    """The events."""
    rows = run / "supervise.jsonl"
    return [json.loads(line)["event"] for line in rows.read_text().splitlines()] if rows.exists() else []


def rank_pid(run: Path, rank: int) -> int:
    return next(beat.pid for beat in read_heartbeats(run / "heartbeats") if beat.rank == rank)


def test_a_signal_then_a_lost_node_then_done(site: Site) -> None:
    run, [job] = site.submit("story")
    site.reached(run, 20)
    site.control("scancel", "--signal=USR1", job)
    site.wait(job, Restarts="1")
    at = saved(run)
    assert 20 < at < STEPS and at % 40, "a checkpoint of its own"
    site.reached(run, at + 20)
    site.control("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    site.wait(job, Restarts="2")
    assert last(run) < STEPS
    slurm.said(
        site.env, "scontrol", "update", "nodename=n2", "state=resume"
    )  # refused where it has come back by itself
    site.wait(job, JobState="COMPLETED", Restarts="2")
    assert starts(run) == 3
    site.same(run)


@pytest.mark.long
def test_the_time_limit_is_a_signal_before_it(site: Site) -> None:
    """Slurm looks at limits every 30 s; a rank stands still until then, so that the run is not done before."""
    run, [job] = site.submit("limit", "cluster.slurm.time=2", "cluster.slurm.signal_s=10")
    site.reached(run, 20)
    pid = rank_pid(run, 1)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: any(": SIGUSR1\n" in log.read_text() for log in run.rglob("slurm-*.out")), 200)
    finally:
        os.kill(pid, signal.SIGCONT)
    site.wait(job, Restarts="1")
    assert 20 < saved(run) < STEPS
    site.wait(job, JobState="COMPLETED")  # on a slow machine after another stop or two
    assert starts(run) == 1 + int(site.job(job)["Restarts"])
    site.same(run)


def test_a_job_that_never_saves_is_not_requeued_for_ever(site: Site) -> None:
    run, [job] = site.submit("idle", "max_restarts=1")
    for stops in range(2):
        site.wait(job, JobState="RUNNING", Restarts=str(stops))
        wait_for(lambda n=stops + 1: supervised(run).count("start") == n, 60)
        site.control("scancel", "--batch", "--signal=USR1", job)
        wait_for(lambda n=stops + 1: supervised(run).count("stopped without a checkpoint") == n, 100)
    site.wait(job, JobState="FAILED", ExitCode="1:0", Restarts="1")
    assert "stopped by SIGUSR1 2 times in a row after step 0 without a new checkpoint" in site.logs()


def test_an_array_of_two_one_preempted_one_with_a_killed_rank(site: Site) -> None:
    run, [job] = site.submit("array", "sweep=[['seed=1337'],['log_every=1']]")
    runs = [run.with_name(f"array-{i}") for i in range(2)]
    for one in runs:
        site.reached(one, 45)
    os.kill(rank_pid(runs[1], 1), signal.SIGKILL)
    site.control("scancel", "--signal=USR1", f"{job}_0")
    site.wait(f"{job}_0", JobState="COMPLETED", Restarts="1")
    site.wait(f"{job}_1", JobState="COMPLETED", Restarts="0")
    for one in runs:
        assert starts(one) == 2
        site.same(one)


@pytest.mark.long
def test_a_chain_of_three_jobs_is_one_run(site: Site) -> None:
    run, jobs = site.submit("chain", "cluster.slurm.chain=3", "cluster.slurm.chain_by=afterok")
    assert len(jobs) == 3 and site.job(jobs[1])["Reason"] == "Dependency"
    at = 0
    for job in jobs[:2]:
        site.reached(run, at + 20)
        site.control("scancel", "--signal=USR1", job)
        site.wait(job, JobState="COMPLETED", Restarts="0")
        at = saved(run)
    site.wait(jobs[2], JobState="COMPLETED", Restarts="0")
    assert starts(run) == 3
    site.same(run)
