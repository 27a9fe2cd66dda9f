"""launch.doctor on real ranks, a real Slurm and real ssh hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers import hosts, slurm
from tests.helpers.ranks import ROOT, free_port, rank_env

DOCTOR = [sys.executable, "-m", "launch.doctor", "json=true"]


def findings(text: str) -> dict[str, dict[str, str]]:
    return {f["name"]: f for f in json.loads(text.splitlines()[-1])["findings"]}


def run(argv: Sequence[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**(os.environ if env is None else env), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_of_this_machine_are_examined(tmp_path: Path) -> None:
    given = ["node=true", "cluster.gpu=cpu", f"run.dir={tmp_path / 'a b' / 'run'}", "timeout_s=120"]
    done = run([*DOCTOR, *given])
    found = findings(done.stdout)
    assert done.returncode == 0, done.stderr
    assert {n for n, f in found.items() if f["state"] == "fail"} == set()
    assert "all 2 came" in found["ranks"]["found"]
    assert "sums over 2 ranks are right" in found["all-reduce inside a node"]["found"]
    assert found["run.dir"]["state"] == "ok" and "every rank reads" in found["run.dir"]["found"]
    assert list(tmp_path.iterdir()) == []  # what was made for it is gone
    (tmp_path / "file").write_text("in the way")
    done = run([*DOCTOR, *given[:2], f"run.dir={tmp_path / 'file'}", "timeout_s=120"])
    found = findings(done.stdout)
    assert done.returncode == 1
    assert found["run.dir"]["state"] == "fail" and "rank 0" in found["run.dir"]["found"]
    assert found["process group"]["state"] == "ok"  # the others are told all the same


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    env = rank_env(0, 3, free_port())
    argv = [sys.executable, "-m", "trainer.diagnostics.node_check", f"run.dir={tmp_path}", "timeout_s=3"]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    found = findings(done.stdout)
    assert done.returncode == 1 and found["ranks"]["state"] == "fail"
    assert "ranks 1-2 of 3 did not come to 'start'" in found["ranks"]["found"]
    assert found["ranks"]["found"].endswith("there were ranks 0")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
def test_in_a_real_slurm(tmp_path: Path) -> None:
    login = [*DOCTOR, "cluster=slurm", "cluster.gpu=cpu", f"run.dir={tmp_path / 'run'}"]
    with slurm.cluster(tmp_path / "slurm") as env:
        good = findings(run([*login, "cluster.nodes=2", "cluster.slurm.partition=main"], env).stdout)
        assert {good[n]["state"] for n in ("slurm commands", "slurm controller", "partition")} == {"ok"}, good
        assert "2 of 2 nodes usable" in good["partition"]["found"]
        for given, words in {
            "cluster.slurm.partition=gpu": "'gpu' is none of main",
            "cluster.nodes=3": "the run is for 3",
            "cluster.gpu=h100_80gb": "0 GPUs on a node",
        }.items():
            done = run([*login, given], env)
            bad = findings(done.stdout)["partition"]
            assert done.returncode == 1 and bad["state"] == "fail" and words in bad["found"], bad
        limit = ["scontrol", "update", "PartitionName=main", "MaxTime=60"]
        subprocess.run(limit, env=env, check=True)
        late = findings(run([*login, "cluster.slurm.time=2:00:00"], env).stdout)["partition"]
        assert late["state"] == "fail" and "limit 1:00:00" in late["found"]
        inside = ["node=true", "cluster=slurm", "cluster.gpu=cpu", f"run.dir={tmp_path / 'run'}", "timeout_s=120"]
        done = run(["salloc", "-Q", "-N2", *DOCTOR, *inside], env)
        found = findings(done.stdout)
        assert {n for n, f in found.items() if f["state"] == "fail"} == set(), (found, done.stderr)
        assert "all 4 came to n1:" in found["ranks"]["found"] and "on 2 nodes: n1, n2" in found["ranks"]["found"]
        assert "2 ranks" in found["all-reduce between the nodes"]["found"]
        assert "on n2" in found["clock"]["found"] and "every rank reads" in found["run.dir"]["found"]
    gone = findings(run(login, env).stdout)  # the controller has stopped
    assert gone["slurm controller"]["state"] == "fail" and gone["partition"]["state"] == "fail", gone


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(hosts.missing() != "", reason=hosts.missing())
def test_hosts_over_real_ssh(tmp_path: Path) -> None:
    with hosts.Cluster("h1", "h2") as net:
        given = ["cluster=ssh", "cluster.ssh.hosts=[h1,h2]", "cluster.nodes=2", f"run.dir={tmp_path / 'run'}"]
        found = findings(net.run("h1", [*DOCTOR, *given], timeout_s=200).stdout)
        assert found["host h1"]["state"] == found["host h2"]["state"] == "ok", found
        assert found["programs"]["state"] == "ok"
        net.cut("h2")
        done = net.run("h1", [*DOCTOR, *given], timeout_s=200)
        found = findings(done.stdout)
        assert done.returncode == 1
        assert found["host h1"]["state"] == "ok" and found["host h2"]["state"] == "fail", found
