"""What launch.ssh makes of a cluster and a run: the hosts, what each is to run, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.frozen import freeze
from conf.schema import load
from launch.cluster_config import ClusterConfig, SshConfig, SshLauncher, Transport
from launch.job import Job
from launch.ssh.launcher import HOLD, check_elastic, needed_programs, prepare, read_hostfile
from tests.helpers.ranks import ROOT
from trainer.config.pretrain import PretrainConfig

HOSTILE = "a b$(touch x);'`touch x`\"%n %h\n#"

SIX_LANES = (
    "model=test",
    "optim=small",
    "data.path=data",
    "data.lanes=6",
    "tokens_per_step=768",
    "micro_batch_size=1",
    "run.name=x",
    "max_steps=9",
)


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


def job(folder: Path, cluster: dict[str, Any] | None = None, **ssh: Any) -> Job:
    """A run of two hosts with one CPU rank each, but for what is given."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(freeze(load(PretrainConfig, SIX_LANES)))
    given = {"name": "ssh", "nodes": 2, "gpus_per_node": 1, "gpu": "cpu", "network_gbit": 1.0, **(cluster or {})}
    hosts = {} if "hostfile" in ssh else {"hosts": ["h1", "h2"]}
    return Job(
        name="x",
        run_dir=folder.parent,
        folder=folder,
        configs=(config,),
        run_dirs=(folder.parent,),
        cluster=ClusterConfig(ssh=SshConfig(**{**hosts, **ssh}), **given),
        python=sys.executable,
        cwd=ROOT,
        max_restarts=3,
    )


def test_pdsh_starts_deepspeeds_launcher_on_every_host(tmp_path: Path) -> None:
    (argv,) = prepare(job(tmp_path / "f", {"gpus_per_node": 4, "env": {"A": "1"}}, interface="eth0"))
    assert (tmp_path / "f/hostfile").read_text() == "h1 slots=4\nh2 slots=4\n"
    assert argv[argv.index("--") + 1 :] == [sys.executable, "-m", "launch.ssh.fanout", f"{tmp_path}/f/ssh.json"]
    command = json.loads((tmp_path / "f/ssh.json").read_text())[""]
    assert command[:10] == ["pdsh", "-S", "-R", "exec", "-f", "2", "-w", "h1,h2", "sh", "-c"]
    assert command[11:13] == ["-", "ssh"] and "BatchMode=yes" in command and command[-3:-1] == ["-T", "%h"]
    line = shlex.split(command[-1])
    assert {"A=1", "DS_ACCELERATOR=cpu", "GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"} < set(line)
    assert {"--node_rank=%n", f"--hostfile={tmp_path}/f/hostfile", "--master_addr=h1", "--no_ssh"} < set(line)
    assert line[-2:] == ["trainer.pretrain", f"frozen={tmp_path}/f/config.yaml"]


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_what_pdsh_starts_hears_the_end_of_pdshs_stdin() -> None:
    script = "echo up %h; cat; echo down %h; exit 7"
    argv = ["pdsh", "-S", "-R", "exec", "-w", "h1,h2", "sh", "-c", HOLD, "-", "sh", "-c", script]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"h1: up h1\n", "h2: up h2\n"}
    out, _ = process.communicate(timeout=300)  # closes stdin
    assert (process.returncode, sorted(out.splitlines())) == (7, ["h1: down h1", "h2: down h2"])


def test_openmpi_gets_its_environment_as_words_of_env(tmp_path: Path) -> None:
    (argv,) = prepare(job(tmp_path / "f", {"env": {"A": HOSTILE}}, transport=Transport.openmpi, interface="eth0"))
    command = argv[argv.index("--") + 1 :]
    words = command[command.index("env") :]
    assert {f"A={HOSTILE}", "MASTER_ADDR=h1", "MASTER_PORT=29500", "DS_ACCELERATOR=cpu"} < set(words)
    assert words[-4:] == [sys.executable, "-m", "trainer.pretrain", f"frozen={tmp_path}/f/config.yaml"]
    given = next(word for word in command if word.startswith("--launcher_args="))
    assert shlex.split(given.partition("=")[2])[-6:] == [
        *("--mca", "oob_tcp_if_include", "eth0"),
        *("--mca", "btl_tcp_if_include", "eth0"),
    ]


def test_torchrun_is_elastic_and_joined_at_the_first_host(tmp_path: Path) -> None:
    (argv,) = prepare(job(tmp_path / "f", launcher=SshLauncher.torchrun, min_nodes=1))
    assert argv[argv.index("--") + 1 :] == [sys.executable, "-m", "launch.ssh.fanout", f"{tmp_path}/f/ssh.json"]
    commands = json.loads((tmp_path / "f/ssh.json").read_text())
    assert list(commands) == ["h1", "h2"]
    for i, (host, command) in enumerate(commands.items()):
        assert command[0] == "ssh" and command[-2] == host
        line = shlex.split(command[-1])
        assert {"--nnodes=1:2", "--nproc-per-node=1", "--rdzv-endpoint=h1:29500", f"--local-addr={host}"} < set(line)
        assert f"is_host={i == 0}," in command[-1]
        assert line[-3:] == ["-m", "trainer.pretrain", f"frozen={tmp_path}/f/config.yaml"]


@pytest.mark.parametrize("launcher", list(SshLauncher))
def test_what_is_forwarded_goes_with_ssh_and_is_written_nowhere(
    tmp_path: Path, launcher: SshLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "hush-hush")
    (argv,) = prepare(job(tmp_path / "f", {"forward": ["A_TOKEN"]}, launcher=launcher))
    written = "".join([*argv, *(path.read_text() for path in (tmp_path / "f").iterdir())])
    assert "SendEnv=A_TOKEN" in written and "--needs=A_TOKEN" in written
    assert "hush-hush" not in written


@pytest.mark.parametrize("launcher", list(SshLauncher))
def test_hostile_paths_and_values_stay_data(tmp_path: Path, launcher: SshLauncher) -> None:
    """The line that ssh gives to the remote shell is run by one here, with the host's programs replaced by printf."""
    folder = tmp_path / HOSTILE.replace("/", "") / "f"
    made = job(folder, {"env": {"A": HOSTILE}}, launcher=launcher)
    prepare(replace(made, python="python", cwd=tmp_path))
    commands = json.loads((folder / "ssh.json").read_text())
    if launcher is SshLauncher.deepspeed:
        line = re.sub("%(.)", lambda m: {"%": "%", "n": "0"}[m[1]], commands[""][-1])  # as pdsh does
    else:
        line = commands["h1"][-1]
    show = tmp_path / "bin"
    show.mkdir()
    (show / "python").write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.environ['A'], *sys.argv]))"
    )
    (show / "python").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env={"PATH": f"{show}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    said = json.loads(done.stdout)
    assert (said[0], said[-1]) == (HOSTILE, f"frozen={folder}/config.yaml")
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize(
    ("cluster", "ssh", "message"),
    [
        ({}, {"hosts": []}, r"cluster.ssh.hosts=\[\] and cluster.ssh.hostfile=None: give one of the two"),
        ({}, {"hosts": ["h1", "-oProxyCommand=x"]}, "'-oProxyCommand=x' is no host name: letters"),
        ({}, {"hosts": ["h1", "root@h2"]}, "'root@h2' is no host name: .* ~/.ssh/config"),
        ({}, {"hosts": ["h1", "h[2-3]"]}, "is no host name"),
        ({}, {"hosts": ["h1", "h1"]}, "h1 is there twice"),
        ({"nodes": 3}, {}, "cluster.nodes=3, but cluster.ssh.hosts names 2 hosts: make them the same"),
        ({}, {"master_port": 80}, "cluster.ssh.master_port=80: give 1024 to 65535"),
        ({}, {"interface": "eth0 x"}, "cluster.ssh.interface='eth0 x': give a network interface"),
        ({}, {"min_nodes": 1}, "min_nodes=1: deepspeed starts a fixed number .*launcher=torchrun"),
        ({}, {"min_nodes": 3, "launcher": SshLauncher.torchrun}, "min_nodes=3: give 1 to cluster.nodes=2"),
        (
            {},
            {"transport": Transport.openmpi, "launcher": SshLauncher.torchrun},
            "transport=openmpi with launcher=torch",
        ),
        ({}, {"hostfile": "/not/there"}, "cluster.ssh.hostfile=/not/there cannot be read: No such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, cluster: dict[str, Any], ssh: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        prepare(job(tmp_path / "f", cluster, **ssh))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "f/hostfile").exists()


def test_a_sweep_is_refused(tmp_path: Path) -> None:
    one = job(tmp_path / "f")
    with pytest.raises(UserError, match="sweep gives 2 runs: over ssh they are started one by one"):
        prepare(replace(one, configs=one.configs * 2))


def test_what_a_way_to_start_needs_here() -> None:
    needed = {t: needed_programs(SshConfig(transport=t)) for t in Transport}
    assert needed == {Transport.pdsh: ["ssh", "pdsh"], Transport.openmpi: ["ssh", "mpirun", "ompi_info"]}
    assert needed_programs(SshConfig(launcher=SshLauncher.torchrun)) == ["ssh"]


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == "pdsh" else name)
    with pytest.raises(UserError, match="needs pdsh here, which is not installed"):
        prepare(job(tmp_path / "f"))
    prepare(job(tmp_path / "f", launcher=SshLauncher.torchrun))  # needs none


def test_a_number_of_hosts_that_cannot_train_is_named(tmp_path: Path) -> None:
    """Before the start. Six lanes: one, two and three hosts divide them, four and five do not."""
    frozen = tmp_path / "config.yaml"
    frozen.write_text(freeze(load(PretrainConfig, SIX_LANES)))
    cluster = job(
        tmp_path / "f", {"nodes": 3}, launcher=SshLauncher.torchrun, min_nodes=1, hosts=["a", "b", "c"]
    ).cluster
    check_elastic(frozen, cluster)
    with pytest.raises(UserError, match=r"min_nodes=1: a run on 4, 5 of the 6 hosts cannot be \(.*data.lanes=6"):
        check_elastic(frozen, replace(cluster, nodes=6))


def test_a_hostfile_is_deepspeeds(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# mine\n\nh1 slots=8\nh-2.example.org   slots=8  # new\n")
    assert read_hostfile(path, 8) == ["h1", "h-2.example.org"]
    (tmp_path / "f").mkdir()
    prepare(job(tmp_path / "f", {"gpus_per_node": 8}, hostfile=str(path)))
    assert (tmp_path / "f/hostfile").read_text() == "h1 slots=8\nh-2.example.org slots=8\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1 slots=8\nh2\n", r"hosts:2: 'h2': write HOST slots=N"),
        ("h1 8\n", r"hosts:1: 'h1 8': write HOST slots=N"),
        ("h1 slots=4\n", r"hosts:1: h1 has slots=4, but cluster.gpus_per_node=8: every host runs as many"),
        ("\0" * 9000, r"hosts:1: .{0,330}: write HOST slots=N"),
    ],
)
def test_a_damaged_hostfile_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(tmp_path / "hosts", 8)
