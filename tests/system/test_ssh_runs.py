"""Whole runs on two hosts over real ssh: through deepspeed with pdsh and OpenMPI, and through torchrun while a host
comes and goes."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import hosts
from tests.helpers.hosts import Cluster
from tests.helpers.ranks import ROOT
from tests.system.runs import TINY, make_data, pretrain
from trainer.run.folder import RunFolder
from trainer.run.journal import Row, read_journal

why_not = hosts.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not), reason=why_not),
]
TWO_HOSTS = (
    "cluster=ssh",
    "cluster.nodes=2",
    "cluster.gpus_per_node=1",
    "cluster.gpu=cpu",
    "cluster.network_gbit=1",
    "cluster.env.OMP_NUM_THREADS=1",
    "cluster.ssh.hosts=[h1,h2]",
    "cluster.ssh.interface=eth0",
)
ELASTIC = ("cluster.ssh.launcher=torchrun", "cluster.ssh.min_nodes=1")
RUN = "run $(touch pwned)"
PATIENCE_S = 240  # for what takes seconds on a machine that does nothing else


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("login", "h1", "h2") as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def submit(cluster: Cluster, root: Path, *overrides: str, of: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`python -m launch.submit` on the login node, which has no part in the training; `of`: the cluster."""
    argv = [sys.executable, "-m", "launch.submit", *TWO_HOSTS, *of, "run.name=x", f"run.dir={root / RUN}"]
    with (root / "out").open("a") as out:
        argv += ["--", *TINY, *overrides]
        return cluster.start("login", argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)


def said(root: Path) -> str:
    return (root / "out").read_text()


def rows(run_dir: Path) -> list[Row]:
    journal = run_dir / "metrics.jsonl"
    return read_journal(journal) if journal.exists() else []


def data_state(run_dir: Path) -> Any:
    folder = RunFolder(run_dir)
    latest = folder.latest()
    assert latest is not None
    return folder.state(latest)["data"]


def trained(root: Path, ranks: int) -> int:
    """How many starts on so many ranks have made four steps."""
    starts = re.split(r"on (\d+) cpu ranks? \(", said(root))
    return sum(
        int(n) == ranks and len(re.findall(r"step \d+/", text)) >= 4
        for n, text in zip(starts[1::2], starts[2::2], strict=True)
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


def losses(run_dir: Path) -> dict[int, float]:
    return {row.step: row.metrics["train/loss"] for row in rows(run_dir)}


@pytest.mark.parametrize("transport", ["pdsh", pytest.param("openmpi", marks=pytest.mark.long)])
def test_deepspeed_trains_on_two_hosts(
    cluster: Cluster, data: Path, tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport == "openmpi":
        if shutil.which("mpirun") is None:
            pytest.skip("mpirun is not installed (apt: openmpi-bin)")
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
            monkeypatch.setenv(name, "1")
    of = [f"cluster.ssh.transport={transport}"]
    process = submit(cluster, tmp_path, f"data.path={data}", "max_steps=6", of=of)
    assert process.wait(PATIENCE_S) == 0, said(tmp_path)
    pretrain(tmp_path / "alone", f"data.path={data}", "max_steps=6", "run.name=x", ranks=2)
    assert losses(tmp_path / RUN) == losses(tmp_path / "alone")
    assert sorted(losses(tmp_path / RUN)) == [1, 2, 3, 4, 5, 6]
    assert "x: test, " in said(tmp_path) and "on 2 cpu ranks" in said(tmp_path)
    assert_quiet(cluster)
    assert (
        not (ROOT / "pwned").exists()
        and not list(tmp_path.rglob("pwned"))
        and not Path("~/pwned").expanduser().exists()
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 85), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_one_signal_saves_on_all_hosts_before_it_is_said(
    cluster: Cluster, data: Path, tmp_path: Path, number: int, code: int
) -> None:
    overrides = (f"data.path={data}", "max_steps=100000", "checkpoint.every_steps=0", "watch.beat_s=0.1")
    process = submit(cluster, tmp_path, *overrides)
    wait_until(lambda: any(row.step >= 4 for row in rows(tmp_path / RUN)), tmp_path, process)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == code, said(tmp_path)[-6000:]
    left = {host: cluster.processes(host) for host in cluster.names}  # at once: a new start may follow
    latest = RunFolder(tmp_path / RUN).latest()
    assert latest is not None and int(latest.name[5:13]) == rows(tmp_path / RUN)[-1].step
    assert not any("trainer.pretrain" in line for lines in left.values() for line in lines.values()), left
    assert_quiet(cluster)


def test_a_host_cut_off_for_good_ends_the_run_in_one_line(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """No orphan process stays."""
    overrides = (f"data.path={data}", "max_steps=100000", "watch.collective_s=20")
    process = submit(cluster, tmp_path, *overrides, of=["max_restarts=0"])
    wait_until(lambda: any(row.step >= 4 for row in rows(tmp_path / RUN)), tmp_path, process)
    cluster.cut("h2")
    try:
        assert process.wait(PATIENCE_S) not in (0, 2), said(tmp_path)
        told = re.findall(r"^h1: error: .*", said(tmp_path), re.MULTILINE)
        assert len(told) == 1 and "rank 0 of 2 on h1 waited for the other ranks for watch.collective_s=20 s" in told[0]
        last = said(tmp_path).splitlines()[-1]
        assert last.startswith("error: 1 failures after step ") and told[0] in last
        assert_quiet(cluster)  # the one that is cut off as well
    finally:
        cluster.heal("h2")


@pytest.mark.long
def test_torchrun_goes_on_without_a_host_and_takes_it_back(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """At last it is stopped and started once more, so that it ends: nobody knows how many steps this will take."""
    overrides = (
        f"data.path={data}",
        "tokens_per_step=4096",
        "optim.schedule.kind=constant",
        "watch.collective_s=20",
    )
    process = submit(cluster, tmp_path, *overrides, "max_steps=100000", of=ELASTIC)
    try:
        wait_until(lambda: trained(tmp_path, ranks=2) == 1, tmp_path, process)
        cluster.cut("h2")
        wait_until(lambda: trained(tmp_path, ranks=1) > 0, tmp_path, process)
        cluster.heal("h2")
        wait_until(lambda: trained(tmp_path, ranks=2) == 2, tmp_path, process)
    finally:
        cluster.heal("h2")
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE_S)
    assert_quiet(cluster)
    last = rows(tmp_path / RUN)[-1].step + 4
    process = submit(cluster, tmp_path, *overrides, f"max_steps={last}", of=ELASTIC)
    assert process.wait(PATIENCE_S) == 0, said(tmp_path)
    assert_quiet(cluster)
    pretrain(tmp_path / "alone", *overrides, f"max_steps={last}", "run.name=x", ranks=2)
    assert losses(tmp_path / RUN) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert data_state(tmp_path / RUN) == data_state(tmp_path / "alone")
