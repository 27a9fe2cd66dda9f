"""Job scripts on a real Slurm that binds tasks to cores: what ranks get and what jobs say; nothing is trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cluster_config import ClusterConfig, SlurmConfig
from launch.job import Job
from launch.slurm.launcher import prepare, submit
from launch.status.report import gather
from tests.helpers import slurm
from tests.helpers.http_server import wait_for
from tests.helpers.ranks import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
if "trainer.pretrain" not in sys.argv[1:3]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
about = {{"env": dict(os.environ), "cores": len(os.sched_getaffinity(0))}}
if os.environ.get("STOPS"):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # so that one that comes before sigwait is not lost
    open(f"{{sys.argv[-1].partition('=')[2]}}.up", "w").close()
    signal.sigwait([signal.SIGTERM])
    print("stopped by SIGTERM after step 7, saved /x", file=sys.stderr, flush=True)
    while not any("saved /x" in path.read_text() for path in pathlib.Path(about["env"]["OUTPUTS"]).glob("slurm-*.out")):
        time.sleep(0.05)  # a cancelled srun does not wait for the last words of a task that has ended
    os.kill(os.getpid(), signal.SIGKILL)  # as srun does with those that are left of a cancelled step
with open(f"{{sys.argv[-1].partition('=')[2]}}.rank-{{os.environ['RANK']}}", "w") as f:
    json.dump(about, f)
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if why := slurm.missing():
        pytest.skip(f"Slurm cannot be started: {why}")
    with slurm.cluster(tmp_path_factory.mktemp("slurm"), TaskPlugin="task/affinity") as made:
        yield made


def done(job: Job, env: dict[str, str], given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Slurm's record of the job when it has ended, and its output."""
    for name, value in {**env, **given}.items():
        monkeypatch.setenv(name, value)
    [number] = submit(prepare(job))
    if "STOPS" in given:
        wait_for((job.folder / "c.up").exists, 60)
        subprocess.run(["scancel", number], env=env, check=True)

    def known() -> str:
        return slurm.said(env, "scontrol", "show", "job", "-o", number)

    wait_for(lambda: re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT)", known()) is not None, 60)
    return known(), (job.folder / f"slurm-{number}.out").read_text()


def job(root: Path, nodes: int = 1, ranks: int = 1, **options: Any) -> Job:
    """A job whose ranks write their environment and their number of cores beside its config."""
    folder = root / "submit" / "0001"
    folder.mkdir(parents=True)
    python = root / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    of_cluster = ClusterConfig("x", nodes, ranks, "cpu", network_gbit=1, slurm=SlurmConfig(**options))
    return Job("it's a job", root, folder, (folder / "c",), (root / "run",), of_cluster, str(python), ROOT, 0)


def rank(made: Job, number: int = 0) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((made.folder / f"c.rank-{number}").read_text())
    return about


def test_a_submitters_own_allocation_does_not_reach_the_job(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from inside `salloc --mem-per-cpu` or `srun --pty --cpu-bind`: all of it are orders to the next srun."""
    inherited = {"SLURM_MEM_PER_CPU": "10", "SLURM_CPU_BIND": "map_cpu:0", "SLURM_NTASKS": "7", "SRUN_DEBUG": "9"}
    inherited |= {"PMI_RANK": "3", "PMIX_NAMESPACE": "other"}
    made = job(tmp_path, mem="100", cpus_per_task=2)
    state, said = done(made, env, {**inherited, "MY_OWN": "kept"}, monkeypatch)
    assert "JobState=COMPLETED" in state, said
    assert rank(made)["cores"] == 2
    got = rank(made)["env"]
    assert got["MY_OWN"] == "kept" and got["SLURM_CONF"] == env["SLURM_CONF"] and got["SLURM_NTASKS"] == "1"
    assert {"SLURM_MEM_PER_CPU", "PMI_RANK", "PMIX_NAMESPACE"}.isdisjoint(got) and got["SRUN_DEBUG"] != "9", got
    assert "not passed on" in capsys.readouterr().err


def test_options_and_a_prologue_are_taken_as_they_were_given(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comment = 'it\'s "a" #1 $(touch hit) 100% \\ b'
    options = {"comment": comment, "nice": "7", "nodelist": "n2", "spread-job": ""}
    prologue = ["module_like() {", "  export FROM_PROLOGUE=$1", "}", "module_like 'its value'"]
    made = job(tmp_path, options=options, prologue=prologue)
    state, said = done(made, env, {"SBATCH_COMMENT": "overruled"}, monkeypatch)
    assert "JobState=COMPLETED" in state, said
    assert "Nice=7" in state in state and "NodeList=n2" in state, state
    assert re.findall(r"Comment=(.*?) +(?=[A-Z]\w+=)", state) == [comment]
    assert rank(made)["env"]["FROM_PROLOGUE"] == "its value"


def test_a_cancelled_run_that_has_saved_is_told_as_stopped(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(tmp_path, cpus_per_task=1)
    state, said = done(made, env, {"STOPS": "1", "OUTPUTS": str(made.folder)}, monkeypatch)
    wait_for(lambda: '"exit"' in (tmp_path / "run" / "supervise.jsonl").read_text(), 60)
    told = gather(tmp_path / "run", time.time())["state"]
    assert "JobState=CANCELLED" in state and told["state"] == "stopped by a signal", (told, said)
    assert "stopped by SIGTERM after step 7, saved /x" in told["why"]
