"""Settings of the machines that a run is for, and of how it is started there. Standard library only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum

from conf.environment import of_an_allocation
from conf.errors import MISSING, UserError
from trainer.run.redact import redact, secret_name

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class SshLauncher(Enum):
    deepspeed = "deepspeed"  # a fixed number of hosts
    torchrun = "torchrun"  # elastic: goes on with min_nodes of them or more, and takes lost ones back


class Transport(Enum):
    pdsh = "pdsh"
    openmpi = "openmpi"  # deepspeed only


class LocalLauncher(Enum):
    torchrun = "torchrun"
    deepspeed = "deepspeed"


class Chain(Enum):
    singleton = "singleton"  # the next job runs when this one has ended, however
    afterok = "afterok"  # when it has ended well


@dataclass
class SlurmConfig:
    """`#SBATCH` lines and what the job does before it trains; null leaves Slurm's own default."""

    partition: str | None = None  # as sbatch's option of this name
    account: str | None = None  # as sbatch's
    qos: str | None = None  # as sbatch's
    time: str | None = None  # as Slurm writes it: 30 (minutes), 12:00:00, 2-00 (days and hours)
    exclusive: bool = False  # nodes for this job alone
    cpus_per_task: int | None = None  # as sbatch's, for each rank
    mem: str | None = None  # of a node: 200G; 0 = all
    constraint: str | None = None  # as sbatch's
    reservation: str | None = None  # as sbatch's
    exclude: list[str] = field(default_factory=list)  # names of nodes to leave out
    container: str | None = None  # an image for the pyxis plugin's --container-image; it sees the checkout and the run
    container_mounts: list[str] = field(default_factory=list)  # what else it sees, the data for one: FROM:TO
    container_python: str = "python3"  # the interpreter in it
    options: dict[str, str] = field(default_factory=dict)  # other long options of sbatch: {gres: gpu:a100:4}; "" = none
    modules: list[str] = field(default_factory=list)  # loaded before the start
    prologue: list[str] = field(default_factory=list)  # lines of your own shell, run as they are: conda, apptainer, ...
    signal_s: int = 120  # before the time limit, where Slurm may be a minute early: then the run saves and ends
    requeue: bool = True  # by itself when its time is up, and by Slurm when a node is lost
    chain: int = 1  # jobs of which the next goes on when the time of one is up; after the last, requeue counts
    chain_by: Chain = Chain.singleton
    array_limit: int | None = None  # of a sweep so many runs at a time; null = as many as Slurm starts

    def __post_init__(self) -> None:
        for key, (form, allowed) in FORMS.items():
            given = getattr(self, key)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not re.fullmatch(form, value, re.ASCII):
                    raise UserError(f"cluster.slurm.{key}: {value!r}: give {allowed}")
        for key, limit in (("cpus_per_task", 1 << 16), ("signal_s", 65535), ("chain", 1000), ("array_limit", 1 << 16)):
            value = getattr(self, key)
            if value is not None and not 1 <= value <= limit:
                raise UserError(f"cluster.slurm.{key}={value}: give 1 to {limit}")
        for name, value in self.options.items():
            self._check_option(name, value)
        for line in self.prologue:
            if not line.strip() or "\0" in line:
                raise UserError(f"cluster.slurm.prologue: {line!r} is no line of a shell: give one, or leave it out")
        if self.time is not None and self.signal_s + EARLY_S >= seconds(self.time):
            raise UserError(
                f"cluster.slurm.time={self.time} is {seconds(self.time)} s and signal_s={self.signal_s}, a signal "
                f"that may come {EARLY_S} s early: the job would end as soon as it starts; give a longer time or a "
                "smaller signal_s"
            )

    def _check_option(self, name: str, value: str) -> None:
        given = f"cluster.slurm.options.{name}"
        if own := OWN_OPTIONS.get(name):
            raise UserError(f"{given}: the job script says that itself: {own}")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
            raise UserError(f"{given}: give the name of a long option of sbatch, without its dashes, such as gres")
        if not value.isprintable():
            raise UserError(f"{given}={value!r}: give one line without control characters, which sbatch does not take")
        if name == "dependency" and self.chain > 1:
            raise UserError(
                f"{given} and cluster.slurm.chain={self.chain}, whose jobs wait for one another: leave one out"
            )

    @property
    def asks_for_gpus(self) -> bool:
        """True if an option asks for the GPUs of the job, in place of --gpus-per-node."""
        return self.gpus_of_gres is not None or bool(GPU_OPTIONS & self.options.keys())

    @property
    def gpus_of_gres(self) -> int | None:
        """GPUs of a node: 4 for gpu:a100:4 or gpu:a100:3,gpu:1; None if gres asks for none."""
        kinds = [part.split(":") for part in self.options.get("gres", "").split(",")]
        counts = [int(kind[-1]) if kind[-1].isdecimal() else 1 for kind in kinds if kind[0] == "gpu"]
        return sum(counts) if counts else None


EARLY_S = 60  # Slurm's own resolution
GPU_OPTIONS = {"gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"}
_OURS = "leave it out"
OWN_OPTIONS = {
    **{
        name: f"give cluster.slurm.{name.replace('-', '_')}"
        for name in ("partition", "account", "qos", "time", "exclusive")
    },
    **{
        name: f"give cluster.slurm.{name.replace('-', '_')}"
        for name in ("cpus-per-task", "mem", "constraint", "reservation")
    },
    **{name: f"give cluster.slurm.{name}" for name in ("exclude", "requeue")},
    "no-requeue": "give cluster.slurm.requeue=false",
    "signal": "give cluster.slurm.signal_s",
    "array": "give sweep, and cluster.slurm.array_limit",
    "nodes": "give cluster.nodes",
    "ntasks-per-node": "give cluster.gpus_per_node",
    "job-name": "give run.name",
    "container-image": "give cluster.slurm.container",
    **dict.fromkeys(
        ("ntasks", "export", "export-file", "output", "error", "open-mode", "parsable", "wrap", "chdir"), _OURS
    ),
    **dict.fromkeys(("wait", "test-only", "help", "version", "usage", "kill-on-invalid-dep"), _OURS),
}
"""Options of sbatch that the script has from other settings."""
WORDS = r"\w[\w.@+-]*"
FORMS = {
    "partition": (rf"{WORDS}(,{WORDS})*", "names of letters, digits and . _ - + @, with commas between them"),
    "account": (WORDS, "a name of letters, digits and . _ - + @"),
    "qos": (WORDS, "a name of letters, digits and . _ - + @"),
    "time": (r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", "minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S"),
    "mem": (r"\d+[KMGT]?", "a number of megabytes, or one with K, M, G or T behind it"),
    "constraint": (r"[\w.&|*,:()\[\]+-]+", "names of features, joined by & | * , and in ( ) or [ ]"),
    "reservation": (rf"{WORDS}(,{WORDS})*", "names of letters, digits and . _ - + @, with commas between them"),
    "exclude": (r"\w[\w.-]*", "names of hosts, each by itself"),
    "container": (r"\S(.*\S)?", "an image, or null"),
    "container_python": (r"\S(.*\S)?", "the interpreter in the container"),
    "modules": (r"\w[\w.+@/-]*", "names of letters, digits and . _ - + @ /"),
    "container_mounts": (r"[^:,\s][^:,]*:/[^:,]*(:[\w+]+)?", "FROM:TO or FROM:TO:FLAGS, without commas"),
}
"""What the values are made of that stand in lines which Slurm, pyxis or modules take apart."""


def seconds(time: str) -> int:
    """Slurm's time in seconds."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, rest_s = [*parts, 0, 0][:3]
    else:
        hours, minutes, rest_s = [0, *parts, 0][:3] if len(parts) < 3 else parts
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest_s


@dataclass
class SshConfig:
    hosts: list[str] = field(default_factory=list)  # one rank for each GPU on each
    hostfile: str | None = None  # instead of hosts: DeepSpeed's, lines of `HOST slots=N`
    launcher: SshLauncher = SshLauncher.deepspeed
    transport: Transport = Transport.pdsh
    min_nodes: int | None = None  # torchrun: goes on with so many; null = all of them
    master_port: int = 29500  # where the ranks meet, on the first host
    interface: str | None = None  # the network interface for gloo and NCCL


@dataclass
class LocalConfig:
    launcher: LocalLauncher = LocalLauncher.torchrun  # what starts the ranks


@dataclass
class ClusterConfig:
    """The machines that a run is for."""

    name: str = MISSING  # the choice of cluster=
    nodes: int = 1  # of the run
    gpus_per_node: int = 8  # ranks on each
    gpu: str = "h100_80gb"  # a row of the plan's table; a wrong name gets the list of them
    network_gbit: float = MISSING  # of a node, all its adapters together, one direction
    price_per_gpu_hour: float | None = None  # USD, what you pay; null = the plan's own rough assumption
    memory_gib: float | None = None  # of one GPU, where yours has another size than the table says
    env: dict[str, str] = field(default_factory=dict)  # environment variables of every rank; no secrets
    forward: list[str] = field(
        default_factory=list
    )  # names of the submitter's own that every rank gets; nowhere written
    slurm: SlurmConfig | None = None  # launch.submit starts a run by the one of these three that is there
    ssh: SshConfig | None = None
    local: LocalConfig | None = None

    def __post_init__(self) -> None:
        for key in ("nodes", "gpus_per_node"):
            if getattr(self, key) < 1:
                raise UserError(f"cluster.{key}={getattr(self, key)}: give at least 1")
        for key in ("network_gbit", "memory_gib"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"cluster.{key}={value}: give a positive number")
        if self.slurm is not None and self.slurm.gpus_of_gres not in (None, self.gpus_per_node):
            raise UserError(
                f"cluster.slurm.options.gres={self.slurm.options['gres']} and "
                f"cluster.gpus_per_node={self.gpus_per_node}: a node has a rank for each GPU, make them the same"
            )
        for name, value in self.env.items():
            if not _VARIABLE.fullmatch(name) or "\0" in value:
                raise UserError(f"cluster.env: {name!r} is no variable: give letters, digits and _, and no zero byte")
            if secret_name(name) or redact(value) != value:
                raise UserError(
                    f"cluster.env.{name} looks like a secret, which the run folder would show: export it in your shell "
                    f"and give cluster.forward=[{name}]"
                )
        for name in self.forward:
            if not _VARIABLE.fullmatch(name) or name in self.env:
                raise UserError(f"cluster.forward: {name!r}: give names of variables that cluster.env does not set")
            if of_an_allocation(name):
                raise UserError(
                    f"cluster.forward: {name} is of the allocation that you are in and orders to the next program: "
                    f"leave it out, or say what you mean, cluster.env.{name}=VALUE"
                )
        if self.price_per_gpu_hour is not None and not 0 <= self.price_per_gpu_hour < math.inf:
            raise UserError(f"cluster.price_per_gpu_hour={self.price_per_gpu_hour}: give 0 or more, or null")
