"""Whole runs on two hosts over real ssh: through pdsh and deepspeed, and through torchrun while a host comes and goes."""

from __future__ import annotations

import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.schema import freeze, load
from launch.cluster_config import ClusterConfig, SshConfig, SshLauncher
from launch.job import Job
from launch.ssh import prepare
from tests import hosts
from tests.hosts import Cluster
from tests.ranks import ROOT
from tests.system.runs import TINY, make_data, pretrain
from trainer.journal import read_journal
from trainer.run_folder import RunFolder

why_not = hosts.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("hosts"),
    pytest.mark.skipif(bool(why_not), reason=why_not),
]
RUN = "run $(touch pwned)"
PATIENCE_S = 240  # for what takes seconds on a machine that does nothing else


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("login", "h1", "h2") as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def submit(cluster: Cluster, root: Path, *overrides: str, max_restarts: int = 0, **ssh: Any) -> subprocess.Popen[str]:
    run_dir = root / RUN
    folder = run_dir / f"submit/{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        freeze(load("pretrain", [*TINY, "run.name=x", f"run.dir={run_dir}", *overrides]))
    )
    job = Job(
        name="x",
        run_dir=run_dir,
        folder=folder,
        configs=(folder / "config.yaml",),
        run_dirs=(run_dir,),
        cluster=ClusterConfig(
            name="ssh",
            nodes=2,
            gpus_per_node=1,
            gpu="cpu",
            network_gbit=1.0,
            env={"OMP_NUM_THREADS": "1"},
            ssh=SshConfig(hosts=["h1", "h2"], interface="eth0", **ssh),
        ),
        python=sys.executable,
        cwd=ROOT,
        max_restarts=max_restarts,
    )
    (argv,) = prepare(job)
    print(shlex.join(argv))
    out = (root / "out").open("w")
    return cluster.start("login", argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)


def said(root: Path) -> str:
    return (root / "out").read_text()


def rows(root: Path) -> list[Any]:
    return rows_of(root / RUN)


def rows_of(run_dir: Path) -> list[Any]:
    journal = run_dir / "metrics.jsonl"
    return read_journal(journal) if journal.exists() else []


def data_state(run_dir: Path) -> Any:
    folder = RunFolder(run_dir)
    return folder.state(folder.latest())["data"]


def trained(root: Path, ranks: int) -> int:
    """How many starts on so many ranks have made four steps."""
    starts = re.split(r"on (\d+) cpu ranks? \(", said(root))
    return sum(
        int(n) == ranks and len(re.findall(r"step \d+/", text)) >= 4 for n, text in zip(starts[1::2], starts[2::2])
    )


def wait_until(what: Callable[[], bool], root: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert process.poll() is None, said(root)[-6000:]
        assert time.monotonic() < deadline, said(root)[-6000:]
        time.sleep(0.2)


def assert_quiet(cluster: Cluster, limit_s: float = 90) -> None:
    for host in cluster.names:
        assert cluster.wait_until_quiet(host, limit_s) == {}


def test_deepspeed_over_pdsh_trains_on_two_hosts(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    process = submit(cluster, tmp_path, f"data.path={data}", "max_steps=6")
    assert process.wait(PATIENCE_S) == 0, said(tmp_path)[-6000:]
    print(said(tmp_path))
    assert rows(tmp_path)[-1].step == 6
    pretrain(tmp_path / "alone", f"data.path={data}", "max_steps=6", "run.name=x", ranks=2)
    assert_quiet(cluster)
    assert not list(ROOT.rglob("pwned")) and not list(tmp_path.rglob("pwned"))


def test_a_host_cut_off_for_good_ends_the_run_with_one_clear_line_and_no_orphan(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    process = submit(cluster, tmp_path, f"data.path={data}", "max_steps=100000", "watch.collective_s=12")
    wait_until(lambda: any(row.step >= 4 for row in rows(tmp_path)), tmp_path, process)
    cluster.cut("h2")
    t = time.monotonic()
    try:
        assert process.wait(PATIENCE_S) not in (0, 2)
        print(time.monotonic() - t, said(tmp_path))
        assert "error: rank 0 of 2 on h1 waited for the other ranks for watch.collective_s=12 s" in said(tmp_path)
        assert_quiet(cluster)
        print(time.monotonic() - t)
    finally:
        cluster.heal("h2")


def test_torchrun_goes_on_without_a_host_that_is_cut_off_and_takes_it_back(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    slow = ("tokens_per_step=8192", "optim.schedule.kind=constant", f"data.path={data}", "watch.collective_s=12")
    elastic = {"launcher": SshLauncher.torchrun, "min_nodes": 1, "max_restarts": 3}
    process = submit(cluster, tmp_path, *slow, "max_steps=100000", **elastic)
    t = time.monotonic()
    tell = lambda what: print(round(time.monotonic() - t), what, len(rows(tmp_path)), flush=True)
    try:
        wait_until(lambda: trained(tmp_path, ranks=2) > 0, tmp_path, process)
        tell("both")
        cluster.cut("h2")
        wait_until(lambda: trained(tmp_path, ranks=1) > 0, tmp_path, process)
        tell("one")
        cluster.heal("h2")
        wait_until(lambda: trained(tmp_path, ranks=2) > 1, tmp_path, process)
        tell("both again")
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        tell("ended")
        assert_quiet(cluster)
        tell("quiet")
    finally:
        cluster.heal("h2")
        print(said(tmp_path))
    last = rows(tmp_path)[-1].step + 4
    process = submit(cluster, tmp_path, *slow, f"max_steps={last}", **elastic)
    assert process.wait(PATIENCE_S) == 0, said(tmp_path)[-6000:]
    tell("done")
    pretrain(tmp_path / "alone", *slow, f"max_steps={last}", "run.name=x", ranks=2)
    tell("reference")
    want = {row.step: row.metrics["train/loss"] for row in rows_of(tmp_path / "alone")}
    got = {row.step: row.metrics["train/loss"] for row in rows(tmp_path)}
    assert got.keys() == want.keys()
    print(max(abs(got[s] - want[s]) / want[s] for s in want))
    assert got == pytest.approx(want, rel=1e-5)
    assert data_state(tmp_path / RUN) == data_state(tmp_path / "alone")
