"""A task of an srun becomes a rank: from Slurm's variables alone."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from launch.slurm.rendezvous import PORTS, first_host, main, port, rendezvous, tasks_on
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-09,11],m1",
}


def start(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    argv = [sys.executable, "-m", "launch.slurm.rendezvous", *words]
    return subprocess.run(argv, cwd=ROOT, env=ours | env, capture_output=True, text=True, timeout=300)


def test_a_task_becomes_a_rank() -> None:
    assert rendezvous(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(port(77, 3)),
    }


def test_the_command_replaces_the_process_with_its_words_intact() -> None:
    code = "import os, sys; print(os.environ['RANK'], os.environ['SLURM_PROCID'], sys.argv[1:], os.getppid())"
    words = ["a b", "$(touch x)", "'", "--", "é\n"]
    done = start("--", sys.executable, "-c", code, *words, **TASK)
    assert done.stdout == f"5 5 {words} {os.getpid()}\n", "no process stands between srun and the command"
    assert start("--", "sh", "-c", "exit 85", **TASK).returncode == 85


def test_a_rank_on_fewer_cores_than_asked_for_says_so() -> None:
    core = min(os.sched_getaffinity(0))
    pinned = f"import os, sys; os.sched_setaffinity(0, {{{core}}}); "
    pinned += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    said = {}
    for asked in ("1", "2"):
        env = {**os.environ, **TASK, "SLURM_CPUS_PER_TASK": asked, "SLURM_CPU_BIND": "map_cpu:0"}
        argv = [sys.executable, "-c", pinned, "-m", "launch.slurm.rendezvous", "--", "true"]
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        said[asked] = (done.returncode, [line for line in done.stderr.splitlines() if "may run on" in line])
    assert said["1"] == (0, [])
    assert said["2"][0] == 0 and said["2"][1][0].startswith("warning: rank 5 on ")
    assert (
        f"may run on 1 of the 2 cores that cluster.slurm.cpus_per_task asks for ({core}): see SLURM_CPU_BIND=map_cpu:0"
        in (said["2"][1][0])
    )


@pytest.mark.parametrize("gone", TASK)
def test_outside_an_srun_or_half_in_one_is_a_mistake(gone: str) -> None:
    with pytest.raises(UserError, match=f"^{gone} not in the environment: start launch.slurm.rendezvous with srun"):
        rendezvous({k: v for k, v in TASK.items() if k != gone})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SLURM_PROCID", "8"),
        ("SLURM_PROCID", "-1"),
        ("SLURM_PROCID", "one"),
        ("SLURM_LOCALID", "2"),
        ("SLURM_NODEID", "5"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(y3)"),
        ("SLURM_STEP_NODELIST", ""),
        ("SLURM_STEP_NODELIST", "n[1-"),
        ("SLURM_STEP_NODELIST", "$(reboot)"),
    ],
)
def test_variables_that_do_not_fit_are_all_named(key: str, value: str) -> None:
    with pytest.raises(UserError, match="not as srun sets them") as caught:
        rendezvous(TASK | {key: value})
    assert f"{key}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        ([], TASK, "error: write: srun ... python -m launch.slurm.rendezvous -- COMMAND ..."),
        (["--", "true"], {}, "error: SLURM_PROCID, SLURM_LOCALID, "),
        (["--", "no such program"], TASK, "error: no such program cannot be started: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], env: dict[str, str], message: str) -> None:
    done = start(*words, GLOO_SOCKET_IFNAME="lo", **env)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_ranks_that_do_not_go_node_by_node_are_refused() -> None:
    """srun --distribution=cyclic: the second task of node 2 would be rank 7."""
    with pytest.raises(UserError, match=r"SLURM_PROCID=7 is task 1 of node 2, where rank 5 would be: .*=block"):
        rendezvous(TASK | {"SLURM_PROCID": "7"})


def test_ports_of_nearby_steps_and_jobs_differ() -> None:
    """None of them is a port that Linux gives out."""
    job = secrets.randbelow(1 << 26)
    made = [port(job + i, step) for i in range(1408) for step in range(16)]
    assert len(set(made)) == len(made) and set(made) <= set(PORTS)
    assert max(PORTS) < 32768 and min(PORTS) > 1024


def test_the_first_host_is_the_one_that_slurm_means(tmp_path: Path) -> None:
    if not shutil.which("scontrol"):
        pytest.skip("no scontrol here (apt-get install slurm-client): Slurm's own reading of a host list is compared")
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")  # scontrol wants one to start
    env = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    rng = random.Random(seed := seeded())
    for _ in range(30):
        hosts = host_list(rng)
        words = ["scontrol", "show", "hostnames", hosts]
        said = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=300).stdout.split()
        assert first_host(hosts) == said[0], (seed, hosts)


def host_list(rng: random.Random) -> str:
    """As Slurm writes them: names, with one or two brackets of numbers and ranges, zeros in front, and suffixes."""

    def bracket() -> str:
        width, at, parts = rng.choice([1, 2, 4]), rng.randrange(5), []
        for _ in range(rng.randint(1, 3)):
            first = at + rng.randint(1, 4)
            at = first + rng.choice([0, 0, 3])
            parts.append(f"{first:0{width}d}" + (f"-{at:0{width}d}" if at > first else ""))
        return f"[{','.join(parts)}]"

    def name() -> str:
        stem = rng.choice(["n", "gpu-", "rack1-node", "a.b.c"])
        return stem + rng.choice(["", "7", "012", bracket(), bracket(), f"{bracket()}c{bracket()}"])

    return ",".join(name() for _ in range(rng.randint(1, 3)))


def test_tasks_on_each_node_are_as_many_as_were_counted() -> None:
    rng = random.Random(seed := seeded())
    runs = [(rng.randint(1, 8), rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]
    counts = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else f"{tasks}" for tasks, nodes in runs)
    expected = [tasks for tasks, nodes in runs for _ in range(nodes)]
    assert [tasks_on(counts, i) for i in range(len(expected))] == expected, seed
    with pytest.raises(ValueError):
        tasks_on(counts, len(expected))


@pytest.mark.parametrize(
    ("addresses", "env", "told"),
    [
        (["127.0.1.1", "::1"], {}, True),
        (["fe80::1%eth0", "10.0.0.7"], {}, False),
        ([], {}, False),
        (["127.0.1.1"], {"GLOO_SOCKET_IFNAME": "eth0"}, False),
        (["127.0.1.1"], {"SLURM_LOCALID": "1"}, False),
        (["127.0.1.1"], {"SLURM_STEP_NUM_NODES": "1"}, False),
    ],
)
def test_a_name_that_no_other_host_can_reach_is_told_once_a_node(
    addresses: list[str],
    env: dict[str, str],
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = TASK | {"SLURM_LOCALID": "0", "SLURM_PROCID": "4"} | env
    if env.get("SLURM_LOCALID"):
        task["SLURM_PROCID"] = "5"
    monkeypatch.setattr(os, "environ", task)
    monkeypatch.setattr("launch.slurm.rendezvous.own_addresses", lambda: addresses)
    monkeypatch.setattr(os, "execvpe", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["rendezvous", "--", "true"])
    main()
    assert ("stands for 127.0.1.1 on this node" in capsys.readouterr().err) == told
