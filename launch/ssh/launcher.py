"""Starts a job on hosts that take ssh: DeepSpeed's launcher on a fixed number of them, or torchrun, where they may come
and go. The hosts share the checkout, the data and the run folder at the same paths.

What a host is to do is one argv until ssh wants a line, which `shlex.join` makes: no value of the config becomes code.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from conf.errors import UserError, of_nature
from conf.frozen import thaw
from data_pipeline.files import publish, publish_json
from launch.cluster_config import ClusterConfig, SshConfig, SshLauncher, Transport
from launch.job import Job, rank_arguments, supervised
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.world import World
from trainer.plan.choose import settle
from trainer.plan.hardware import CPU
from trainer.plan.layout_rules import check_layout

HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # Linux's own limit
PROGRAMS = {Transport.pdsh: ["pdsh"], Transport.openmpi: ["mpirun", "ompi_info"]}
HOSTFILE_BYTES = 1 << 20
SILENCE_S = {SshLauncher.deepspeed: 60, SshLauncher.torchrun: 180}
"""A connection that brings nothing for so long is lost, on both ends; a host that may come and go is waited for longer,
for it is taken back with the least ado while its connection lives."""
NODE_RANK = "--node_rank=%n"  # pdsh's own sign for a host's number
HOLD = 'exec "$@" </proc/$PPID/fd/0'  # $PPID: pdsh, which gives nobody its stdin
GRACE_S = 60  # for a rank that saves before it ends
LAST_CALL_S = 15  # torchrun starts without the missing hosts so long after min_nodes of them have come


def prepare(job: Job) -> list[list[str]]:
    """Write the hostfile and what each host runs into the job's folder; returns the command that starts it all.

    Raises:
        UserError: hosts, ports or programs that cannot be, or a number of hosts in the elastic range that cannot train.
    """
    ssh = job.cluster.ssh
    assert ssh is not None
    if len(job.configs) > 1:
        raise UserError(f"sweep gives {len(job.configs)} runs: over ssh they are started one by one, without sweep")
    hosts = hosts_of(job.cluster)
    _check(job.cluster, ssh)
    publish(job.folder / "hostfile", "".join(f"{h} slots={job.cluster.gpus_per_node}\n" for h in hosts).encode())
    if ssh.launcher is SshLauncher.deepspeed and ssh.transport is Transport.openmpi:
        return [supervised(job, 0, _openmpi(job, ssh, hosts), grace_s=2 * GRACE_S + 30)]  # mpirun's own, and its end
    if ssh.launcher is SshLauncher.deepspeed:
        commands = {"": _pdsh(job, ssh, hosts)}  # which puts the hosts' names before what they say by itself
    else:
        check_elastic(job.configs[0], job.cluster)
        commands = {
            host: _ssh(job, host, _on_host(job, ssh, _torchrun(job, ssh, hosts, i))) for i, host in enumerate(hosts)
        }
    publish_json(job.folder / "ssh.json", commands)
    return [supervised(job, 0, [job.python, "-m", "launch.ssh.fanout", str(job.folder / "ssh.json")])]


def hosts_of(cluster: ClusterConfig) -> list[str]:
    """The names of cluster.ssh.hosts or hostfile, checked and counted."""
    ssh = cluster.ssh
    assert ssh is not None
    if bool(ssh.hosts) == bool(ssh.hostfile):
        raise UserError(
            f"cluster.ssh.hosts={ssh.hosts} and cluster.ssh.hostfile={ssh.hostfile}: give one of the two, "
            "such as cluster.ssh.hosts=[h1,h2]"
        )
    hosts = ssh.hosts or read_hostfile(Path(ssh.hostfile or ""), cluster.gpus_per_node)
    source = "cluster.ssh.hosts" if ssh.hosts else ssh.hostfile
    for name in hosts:
        if not HOST.fullmatch(name):
            raise UserError(
                f"{source}: {name!r} is no host name: letters, digits, '.', '_' and '-'; a user or a port for it "
                "stands in ~/.ssh/config"
            )
    twice = sorted({h for h in hosts if hosts.count(h) > 1})
    if twice:
        raise UserError(f"{source}: {', '.join(twice)} is there twice: name each host once")
    if len(hosts) != cluster.nodes:
        raise UserError(f"cluster.nodes={cluster.nodes}, but {source} names {len(hosts)} hosts: make them the same")
    return hosts


def read_hostfile(path: Path, slots: int) -> list[str]:
    """The hosts of a file in DeepSpeed's format, `HOST slots=N` with # comments; N must be cluster.gpus_per_node."""
    try:
        with path.open("rb") as f:
            text = f.read(HOSTFILE_BYTES).decode(errors="replace")
    except OSError as e:
        raise of_nature(e, f"cluster.ssh.hostfile={path} cannot be read: {e.strerror}") from None
    hosts = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch(r"slots=\d{1,4}", words[1]):
            raise UserError(f"{path}:{number}: {line[:80]!r}: write HOST slots=N")
        if int(words[1].removeprefix("slots=")) != slots:
            raise UserError(
                f"{path}:{number}: {words[0]} has {words[1]}, but cluster.gpus_per_node={slots}: "
                "every host runs as many"
            )
        hosts.append(words[0])
    return hosts


def check_elastic(frozen: Path, cluster: ClusterConfig) -> None:
    """Raises UserError if a number of hosts from min_nodes to nodes cannot train the frozen run; names that number."""
    assert cluster.ssh is not None
    cfg = thaw(frozen, PretrainConfig)
    min_nodes = cluster.ssh.min_nodes or cluster.nodes
    refused = {}
    for nodes in range(min_nodes, cluster.nodes + 1):
        size = nodes * cluster.gpus_per_node
        try:
            check_layout(settle(cfg, World(0, size, 0, cluster.gpus_per_node))[0], size)
        except UserError as e:
            refused[nodes] = str(e)
    if refused:
        raise UserError(
            f"cluster.ssh.min_nodes={min_nodes}: a run on {', '.join(map(str, refused))} of the {cluster.nodes} hosts "
            f"cannot be ({next(iter(refused.values()))}): give another min_nodes, or a data.lanes that all of them "
            "divide"
        )


def _check(cluster: ClusterConfig, ssh: SshConfig) -> None:
    if not 1024 <= ssh.master_port <= 65535:
        raise UserError(f"cluster.ssh.master_port={ssh.master_port}: give 1024 to 65535")
    if ssh.interface is not None and not INTERFACE.fullmatch(ssh.interface):
        raise UserError(f"cluster.ssh.interface={ssh.interface!r}: give a network interface, such as eth0")
    if ssh.min_nodes is not None and ssh.launcher is not SshLauncher.torchrun:
        raise UserError(
            f"cluster.ssh.min_nodes={ssh.min_nodes}: deepspeed starts a fixed number of hosts, "
            "give cluster.ssh.launcher=torchrun"
        )
    if ssh.min_nodes is not None and not 1 <= ssh.min_nodes <= cluster.nodes:
        raise UserError(f"cluster.ssh.min_nodes={ssh.min_nodes}: give 1 to cluster.nodes={cluster.nodes}")
    if ssh.launcher is SshLauncher.torchrun and ssh.transport is not Transport.pdsh:
        raise UserError(
            f"cluster.ssh.transport={ssh.transport.value} with launcher=torchrun, which takes plain ssh: leave it out"
        )
    if absent := [program for program in needed_programs(ssh) if shutil.which(program) is None]:
        raise UserError(f"cluster.ssh needs {', '.join(absent)} here, which is not installed")


def needed_programs(ssh: SshConfig) -> list[str]:
    """The programs that must be in PATH where the run is submitted."""
    return ["ssh", *([] if ssh.launcher is SshLauncher.torchrun else PROGRAMS[ssh.transport])]


def _on_host(job: Job, ssh: SshConfig, launcher: list[str]) -> list[str]:
    """The command on a host: the launcher with its environment, for as long as the connection lasts."""
    env = _env(job, ssh)
    tether = [job.python, "-m", "launch.ssh.tether", f"--needs={','.join(job.cluster.forward)}"]
    if ssh.launcher is SshLauncher.deepspeed:  # which gives a rank 30 s to save; torchrun would start it again
        tether.append(f"--ranks={job.run_dirs[0]}")
    else:  # launch.ssh.fanout has a word for each connection from time to time; those of pdsh share one stdin
        tether.append(f"--silence={SILENCE_S[ssh.launcher]}")
        # without it the ranks meet in torchrun's own store, where one that comes back finds the addresses of the dead
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return ["env", "-C", str(job.cwd), *(f"{k}={v}" for k, v in env.items()), *tether, "--", *launcher]


def _pdsh(job: Job, ssh: SshConfig, hosts: list[str]) -> list[str]:
    """DeepSpeed's launcher on every host at once. Left to start them by itself (without --no_ssh) it writes shell lines
    without quotes, and stops with `pkill -f`, which ends every other run on the host as well.

    pdsh dies of a signal and leaves the hosts to themselves: so each ssh gets pdsh's stdin, which launch.ssh.fanout
    closes to stop them, and then waits for what the hosts say.
    """
    launcher = [
        *(job.python, "-m", "deepspeed.launcher.runner", "--no_ssh", NODE_RANK),
        f"--hostfile={job.folder / 'hostfile'}",
        *(f"--master_addr={hosts[0]}", f"--master_port={ssh.master_port}"),
        *("--no_local_rank", "--module", *rank_arguments(job, 0)[1:]),
    ]
    line = [word if word == NODE_RANK else word.replace("%", "%%") for word in _on_host(job, ssh, launcher)]
    fan_out = ["-S", "-R", "exec", "-f", str(len(hosts)), "-w", ",".join(hosts)]
    return ["pdsh", *fan_out, "sh", "-c", HOLD, "-", *_ssh(job, "%h", line)]


def _openmpi(job: Job, ssh: SshConfig, hosts: list[str]) -> list[str]:
    """mpirun, as DeepSpeed's launcher calls it. It counts the ranks, world.py reads its numbers; no rank speaks
    MPI. The environment is `env`'s words: DeepSpeed's own way puts quotes into values that have spaces. Where a rank
    ends otherwise than with 0 mpirun waits GRACE_S, sends the others SIGTERM, waits as long, and sends SIGKILL."""
    mpirun = [*("--bind-to", "none"), *("--mca", "plm_rsh_args", shlex.join(_options(job)))]
    mpirun += ["--mca", "odls_base_sigkill_timeout", str(GRACE_S)]
    if ssh.interface is not None:
        mpirun += [*("--mca", "oob_tcp_if_include", ssh.interface), *("--mca", "btl_tcp_if_include", ssh.interface)]
    mpirun += [word for name in job.cluster.forward for word in ("-x", name)]
    env = _env(job, ssh) | {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(ssh.master_port)}
    return [
        *(job.python, "-m", "deepspeed.launcher.runner", "--launcher=openmpi", f"--launcher_args={shlex.join(mpirun)}"),
        *(f"--hostfile={job.folder / 'hostfile'}", f"--master_addr={hosts[0]}", "--force_multi", "--no_python"),
        *("env", "-C", str(job.cwd), *(f"{k}={v}" for k, v in env.items()), job.python, *rank_arguments(job, 0)),
    ]


def _env(job: Job, ssh: SshConfig) -> dict[str, str]:
    """The variables of every rank."""
    env = ({"DS_ACCELERATOR": CPU} if job.cluster.gpu == CPU else {}) | job.cluster.env
    if ssh.interface is not None:
        env |= {"GLOO_SOCKET_IFNAME": ssh.interface, "NCCL_SOCKET_IFNAME": ssh.interface}
    return env


def _torchrun(job: Job, ssh: SshConfig, hosts: list[str], i: int) -> list[str]:
    """The torchrun command that joins the i-th host to the others; the first host keeps the list of them."""
    wait = f"last_call_timeout={LAST_CALL_S},read_timeout={SILENCE_S[ssh.launcher]}"  # a cut host's torchrun lives on
    wait += ",keep_alive_interval=5,keep_alive_max_attempt=3"
    return [
        *(job.python, "-m", "torch.distributed.run"),
        f"--nnodes={ssh.min_nodes or len(hosts)}:{len(hosts)}",
        f"--nproc-per-node={job.cluster.gpus_per_node}",
        f"--max-restarts={job.max_restarts}",  # when they are used up all hosts end, and supervise starts them anew
        *("--rdzv-backend=c10d", f"--rdzv-id={job.folder}", f"--rdzv-endpoint={hosts[0]}:{ssh.master_port}"),
        *(f"--rdzv-conf=is_host={i == 0},{wait}", f"--local-addr={hosts[i]}"),
        *rank_arguments(job, 0),
    ]


def _ssh(job: Job, host: str, argv: list[str]) -> list[str]:
    return ["ssh", *_options(job), "-T", host, shlex.join(argv)]


def _options(job: Job) -> list[str]:
    """ssh's: no question is asked, a dead connection ends, and what is to be forwarded goes with it."""
    assert job.cluster.ssh is not None
    silence_s = SILENCE_S[job.cluster.ssh.launcher]
    own = ["BatchMode=yes", "ConnectTimeout=10", f"ServerAliveInterval={silence_s // 4}", "ServerAliveCountMax=4"]
    return [word for option in [*own, *(f"SendEnv={name}" for name in job.cluster.forward)] for word in ("-o", option)]
