"""A run as a Slurm job: a script to read, and the commands that hand it over.

A user's values are never run as code. `launch.cluster_config` checks values in `#SBATCH` lines; values in shell lines
are quoted; the run's name, which may hold any character, is an argument of sbatch.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from conf.environment import passed_on
from conf.errors import TransientError, UserError
from data_pipeline.files import publish
from launch.cluster_config import Chain, SlurmConfig
from launch.job import Job, rank_arguments, supervised
from trainer.run.exit_codes import PREEMPTED

TEMPLATE = "job.sbatch.jinja"
WAIT_S = 60  # after the end of the first rank the others are killed
PREVIOUS = "PREVIOUS_JOB"  # in a command of a chain: the id of the job before it, known once that one is submitted

_MEMORY = ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU")
_GPUS = ("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS", "SBATCH_GPUS_PER_TASK", "SBATCH_GRES")
OVERRULES = {
    "time": ("SBATCH_TIMELIMIT",),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), _MEMORY),
    **dict.fromkeys(("gpus-per-node", "gpus", "gpus-per-task", "gres"), _GPUS),
    "requeue": ("SBATCH_NO_REQUEUE",),
    "no-requeue": ("SBATCH_REQUEUE",),
}
"""Environment variables that override an `#SBATCH` line and whose name does not follow from the option's name."""


def prepare(job: Job) -> list[list[str]]:
    """Writes job.sbatch; returns the sbatch command of each job of the chain, for `submit`.

    Raises:
        UserError: a name or path that Slurm would not take as it is, or a chain of a sweep.
    """
    slurm, n = _slurm(job), len(job.configs)
    _check_text(job, slurm)
    if slurm.chain > 1 and n > 1:
        raise UserError(
            f"cluster.slurm.chain={slurm.chain} and a sweep of {n} runs: each run of a sweep requeues itself when its "
            "time is up; leave the chain out, or submit one run at a time"
        )
    if slurm.array_limit is not None and n == 1:
        raise UserError(
            f"cluster.slurm.array_limit={slurm.array_limit} is for a sweep, and this is one run: leave it out"
        )
    script = job.folder / "job.sbatch"
    publish(script, render(job).encode())
    words = _sbatch(job)
    if slurm.chain == 1:
        return [[*words, str(script)]]
    return [[*words, *_after(slurm, link), str(script), str(link)] for link in range(1, slurm.chain + 1)]


def submit(commands: list[list[str]]) -> list[str]:
    """Runs what `prepare` returned; the ids of the jobs.

    Raises:
        UserError: no sbatch here.
        TransientError: Slurm does not take a job; what it says. Those before it in the chain are submitted.
    """
    ids: list[str] = []
    env = environment(commands)
    for command in commands:
        words = [w.replace(PREVIOUS, ids[-1]) if ids and w.startswith("--dependency=") else w for w in command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=env)
        except FileNotFoundError:
            raise UserError(
                "no sbatch here: run launch.submit on a login node of the cluster, or dry_run=true"
            ) from None
        if done.returncode:
            before = f" (submitted before it: {', '.join(ids)})" if ids else ""
            raise TransientError(f"sbatch ended with {done.returncode}: {done.stderr.strip()}{before}")
        ids.append(done.stdout.strip().split(";")[0])  # ID;CLUSTER in a federation
    return ids


def environment(commands: list[list[str]]) -> dict[str, str]:
    """The passed-on environment, without what sbatch would take before lines of these commands' scripts."""
    scripts = [Path(word) for words in commands for word in words if word.endswith("/job.sbatch")]
    given = {key for path in scripts for key in re.findall(r"^#SBATCH --([\w-]+)", path.read_text(), re.MULTILINE)}
    gone = {"SBATCH_ARRAY_INX"}
    for key in given:
        gone |= set(OVERRULES.get(key, (f"SBATCH_{key.upper().replace('-', '_')}",)))
    env = passed_on()
    if ignored := sorted(gone & env.keys()):
        print(f"ignored, the job script says it itself: {', '.join(ignored)}", file=sys.stderr, flush=True)
    return {key: value for key, value in env.items() if key not in gone}


def render(job: Job) -> str:
    """The script: of a sweep one for all its elements, each started by its SLURM_ARRAY_TASK_ID."""
    environment = Environment(
        loader=PackageLoader("launch.slurm", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"q": shlex.quote, "sbatch": quoted}
    slurm, cluster = _slurm(job), job.cluster
    env = {"DS_ACCELERATOR": "cpu"} if cluster.gpu == "cpu" else {}
    env |= {"OMP_NUM_THREADS": str(slurm.cpus_per_task)} if slurm.cpus_per_task else {}
    return environment.get_template(TEMPLATE).render(
        slurm=slurm,
        cluster=cluster,
        cwd=str(job.cwd),
        env=env | cluster.env,
        commands=[lines(supervised(job, i, srun(job, i))) for i in range(len(job.configs))],
        preempted=PREEMPTED,
        again=(shlex.join(_sbatch(job)), shlex.join(map(str, (job.folder / "job.sbatch", *_last_link(slurm))))),
    )


def quoted(value: str) -> str:
    """The value of an option in an `#SBATCH` line, where quotes and backslashes count and # begins a comment."""
    return (
        value if re.fullmatch(r"[\w.,:=/@%+*-]+", value, re.ASCII) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    )


def srun(job: Job, i: int) -> list[str]:
    """The one step of a start, each of its tasks a rank. cpus-per-task is said again: srun no longer asks the job.

    One rank's end does not kill the others at once: stopped by a signal all end with the same code, but not in the same
    moment, and one that srun killed meanwhile would hide it. Where a rank is lost, most find it out by themselves.
    """
    slurm, python, container = _slurm(job), job.python, []
    if slurm.container is not None:
        python = slurm.container_python
        above = job.run_dirs[i].parent  # MLflow's file lies beside the runs, where no other tracker is given
        seen = dict.fromkeys((job.cwd, above if above != above.parent else job.run_dirs[i], job.folder))
        mounts = ",".join([*(f"{path}:{path}" for path in seen), *slurm.container_mounts])
        container = [f"--container-image={slurm.container}", f"--container-mounts={mounts}"]
        container += [f"--container-workdir={job.cwd}"]
    cpus = [f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []
    label = ["--label"] if job.cluster.nodes * job.cluster.gpus_per_node > 1 else []  # whose line it is
    step = [
        "srun",
        *label,
        "--export=ALL",
        "--mpi=none",
        "--distribution=block",
        "--kill-on-bad-exit=0",
        f"--wait={WAIT_S}",
    ]
    return [*step, *cpus, *container, python, "-m", "launch.slurm.rendezvous", "--", python, *rank_arguments(job, i)]


def lines(command: list[str]) -> list[list[str]]:
    """A command as lines to read: each ends where another program's words begin."""
    split: list[list[str]] = [[]]
    for word in command:
        split[-1].append(word)
        if word == "--":
            split.append([])
    return split


def output(job: Job) -> Path:
    """The file that a job's output goes to; %j, %A and %a stand for Slurm's numbers of the job."""
    return job.folder / ("slurm-%A_%a.out" if len(job.configs) > 1 else "slurm-%j.out")


def _sbatch(job: Job) -> list[str]:
    """The command that submits the script, up to the script."""
    path = f"{str(job.folder).replace('%', '%%')}/{output(job).name}"
    return ["sbatch", "--parsable", "--export=ALL", f"--job-name={job.name}", f"--output={path}"]


def _last_link(slurm: SlurmConfig) -> list[str]:
    """The argument of the script where a job of a chain stands for itself: it has nobody behind it."""
    return [str(slurm.chain)] if slurm.chain > 1 else []


def _after(slurm: SlurmConfig, link: int) -> list[str]:
    if slurm.chain_by == Chain.singleton:  # of this user and job name; by it a chain also waits for one before it
        return ["--dependency=singleton"]
    return [f"--dependency=afterok:{PREVIOUS}", "--kill-on-invalid-dep=yes"] if link > 1 else []


def _check_text(job: Job, slurm: SlurmConfig) -> None:
    """Slurm takes a backslash in an output path apart, and writes names and paths into lines of its own."""
    for key, text in (("name", job.name), ("dir", str(job.run_dir))):
        if not text.isprintable() or (key == "dir" and "\\" in text):
            raise UserError(f"run.{key}={text!r}: Slurm takes no line breaks, control characters and, in a path, \\")
    paths: list[Path] = [job.cwd, job.folder, *job.run_dirs] if slurm.container is not None else []
    for path in paths:
        if {",", ":"} & set(str(path)):
            raise UserError(f"{path}: a container's mounts cannot hold , or :, give another run.dir or checkout")


def _slurm(job: Job) -> SlurmConfig:
    assert job.cluster.slurm is not None
    return job.cluster.slurm
