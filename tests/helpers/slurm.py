"""A throw-away Slurm of two nodes on this machine: its own munge, one controller, two slurmd on loopback addresses.

Needs root and Debian's slurm-wlm and munge; `missing()` says what is not there. Nothing in /etc is touched: the nodes'
names are known only in their own mount namespaces.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.helpers.http_server import wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "unshare")
NODES = (1, 2)


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    gone = [program for program in PROGRAMS if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")]
    if gone:
        return f"no {gone[0]} here (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "munge and slurmd are started as root only"


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@contextmanager
def cluster(root: Path, **settings: str) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and the others speak to it; the partition is "main"; `settings` of slurm.conf."""
    for name in ("run", "log", "state", *(f"spool.n{i}" for i in NODES)):
        (root / name).mkdir(parents=True)
        (root / name).chmod(0o755)
    root.chmod(0o755)
    hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.1.{i} n{i}\n" for i in NODES)
    (root / "hosts").write_text(hosts)
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o400)
    conf = root / "slurm.conf"
    conf.write_text(configuration(root, settings))
    env = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = [f"--key-file={root}/munge.key", f"--socket={root}/run/munge.sock", f"--pid-file={root}/run/munged.pid"]
    munge += [f"--log-file={root}/log/munged.log", f"--seed-file={root}/state/munged.seed"]
    node = f"mount --bind {root}/hosts /etc/hosts && exec slurmd -f {conf} -N "
    try:
        subprocess.run(["munged", "--force", *munge], env=env, check=True, capture_output=True)
        subprocess.run(["slurmctld", "-f", str(conf)], env=env, check=True, capture_output=True)
        for i in NODES:
            subprocess.run(["unshare", "--mount", "sh", "-c", f"{node}n{i}"], env=env, check=True, capture_output=True)
        wait_for(lambda: said(env, "sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(NODES)), 30)
        yield env
    finally:
        with suppress(OSError):
            subprocess.run(["scancel", "-u", "root"], env=env, capture_output=True)
            wait_for(lambda: not said(env, "squeue", "-h"), 20)
        for name in (*(f"slurmd.n{i}" for i in NODES), "slurmctld", "munged"):
            stop(root / "run" / f"{name}.pid")


def said(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()


def stop(pid_file: Path) -> None:
    with suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, 15)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), 20)


def configuration(root: Path, settings: dict[str, str]) -> str:
    """Without cgroups and accounting, which a container may lack, and quick to schedule."""
    host = socket.gethostname().split(".")[0]
    control, *ports = free_ports(1 + len(NODES))
    run = root / "run"
    lines = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": control,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={run}/munge.sock,cred_expire=8",  # a requeued job waits so long and a second more
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "SlurmctldPidFile": run / "slurmctld.pid",
        "SlurmdPidFile": run / "slurmd.%n.pid",
        "StateSaveLocation": root / "state",
        "SlurmdSpoolDir": root / "spool.%n",
        "SlurmctldLogFile": root / "log" / "slurmctld.log",
        "SlurmdLogFile": root / "log" / "slurmd.%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "sched_interval=1,sched_min_interval=2,bf_interval=1,batch_sched_delay=0",
        "KillWait": 3,
        "SlurmdTimeout": 10,
        "CompleteWait": 0,
        **settings,
    }
    nodes = [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.1.{i} Port={port} CPUs=2 RealMemory=8000 State=UNKNOWN"
        for i, port in zip(NODES, ports, strict=True)
    ]
    partition = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    return "\n".join([*(f"{key}={value}" for key, value in lines.items()), *nodes, partition, ""])
