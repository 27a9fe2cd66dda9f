"""Entry: `srun ... python -m launch.slurm.rendezvous -- COMMAND ...`: each task of a step becomes a rank, without ssh.

Slurm says which task this is and on which nodes the others are; COMMAND gets it as the names that PyTorch reads, and
takes this process's place, so that Slurm's signals and exit codes are COMMAND's.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping

from conf.errors import UserError
from trainer.diagnostics.machine import is_loopback, own_addresses
from trainer.distributed.world import World, environment
from trainer.run.exit_codes import USER_ERROR

NEEDED = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)
"""Of the step, not of the job: an `srun -n 1` in a larger job is a world of one, which SLURM_NTASKS_PER_NODE denies."""
PORTS = range(10240, 32768)  # below the ports that Linux gives out by itself


def rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """COMMAND's variables of its rank and world, from Slurm's.

    Raises:
        UserError: not in a task of an srun, or Slurm's variables do not fit together.
    """
    missing = [key for key in NEEDED if key not in env]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not in the environment: start launch.slurm.rendezvous with srun, in a job"
        )
    given = {key: env[key] for key in NEEDED}
    try:
        rank, local, node, job, step, size = (int(given[key]) for key in NEEDED[:6])
        local_size = tasks_on(given["SLURM_STEP_TASKS_PER_NODE"], node)
        main_host = first_host(given["SLURM_STEP_NODELIST"])
        if not 0 <= local < local_size <= size or not local <= rank < size:
            raise ValueError
    except ValueError:
        said = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise UserError(
            f"{said}: not as srun sets them: start launch.slurm.rendezvous with srun, and set none"
        ) from None
    before = sum(tasks_on(given["SLURM_STEP_TASKS_PER_NODE"], i) for i in range(node))
    if rank != before + local:
        raise UserError(
            f"SLURM_PROCID={rank} is task {local} of node {node}, where rank {before + local} would be: the ranks go "
            "node by node; give srun --distribution=block"
        )
    return environment(World(rank, size, local, local_size), main_host, port(job, step))


def port(job: int, step: int) -> int:
    """The rendezvous's port: another one for each of 16 steps of a job in a row, and for 1408 jobs in a row."""
    return PORTS[(16 * job + step) % len(PORTS)]


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts, where rank 0 is: `n[01-03,7],m1` -> `n01`. Raises ValueError."""
    first = re.sub(r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]", r"\1", nodes).split(",")[0]
    if not re.fullmatch(r"[\w.-]+", first, re.ASCII):
        raise ValueError(nodes)
    return first


def tasks_on(counts: str, node: int) -> int:
    """Tasks on the `node`-th node of a step: 3 for node 2 of `4(x2),3`. Raises ValueError."""
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if match is None:
            break
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    raise ValueError(counts)


def narrowed(env: Mapping[str, str], cores: set[int]) -> str | None:
    """A sentence where this task may run on fewer cores than were asked for each."""
    asked = env.get("SLURM_CPUS_PER_TASK", "")
    if not asked.isdecimal() or len(cores) >= int(asked):
        return None
    return (
        f"rank {env['SLURM_PROCID']} on {socket.gethostname()} may run on {len(cores)} of the {asked} cores that "
        f"cluster.slurm.cpus_per_task asks for ({', '.join(map(str, sorted(cores)))}): see SLURM_CPU_BIND="
        f"{env.get('SLURM_CPU_BIND', '')} and the cluster's own binding"
    )


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[split + 1 :]
    try:
        if split > 1 or not command:
            raise UserError("write: srun ... python -m launch.slurm.rendezvous -- COMMAND ...")
        env = os.environ | rendezvous(os.environ)
        if narrow := narrowed(env, os.sched_getaffinity(0)):
            print(f"warning: {narrow}", file=sys.stderr, flush=True)
        speaks = env["SLURM_LOCALID"] == "0" and env.get("SLURM_STEP_NUM_NODES") != "1"  # once a node, of many
        ips = own_addresses() if speaks and "GLOO_SOCKET_IFNAME" not in env else []
        if ips and is_loopback(ips):
            print(
                f"warning: {socket.gethostname()} stands for {ips[0]} on this node, where the others cannot reach "
                "it: if ranks do not find one another, set cluster.env.GLOO_SOCKET_IFNAME to the network's interface",
                file=sys.stderr,
                flush=True,
            )
        os.execvpe(command[0], command, env)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except OSError as e:
        print(f"error: {command[0]} cannot be started: {e}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
