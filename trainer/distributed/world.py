"""This process's rank. The only reader of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass

from conf.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run; `local_world_size` of them are on its node, None if unknown."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
"""Open MPI's names. mpirun sets neither rank 0's address nor its port."""


def read_world() -> World:
    """Read the variables that torchrun, deepspeed, mpirun or Slurm's rendezvous set; without them, one rank alone.

    Alone, the process becomes a world of one and takes a free port for it.

    Raises:
        UserError: RANK without WORLD_SIZE or the like: a launcher that set half of what is needed.
    """
    keys: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not any(k in os.environ for k in keys) and OPENMPI["RANK"] in os.environ:
        absent = [k for k in (*OPENMPI.values(), "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
        if absent:
            raise UserError(
                f"{OPENMPI['RANK']} in the environment but not {', '.join(absent)}: start with torchrun or deepspeed, "
                "or give mpirun MASTER_ADDR and MASTER_PORT with -x"
            )
        os.environ.update({k: os.environ[name] for k, name in OPENMPI.items()})
    known = [k for k in keys if k in os.environ]
    if not known:
        import socket

        with socket.socket() as s:  # port 0: the kernel's choice, so that runs side by side do not meet
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    elif len(known) < len(keys):
        missing = ", ".join(k for k in keys if k not in known)
        raise UserError(
            f"{', '.join(known)} in the environment but not {missing}: start with torchrun or deepspeed, or unset them"
        )
    # torchrun's name, and DeepSpeed's launcher's
    size = next((k for k in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if k in os.environ), None)
    keys += (size,) if size else ()
    try:
        world = World(*(int(os.environ[k]) for k in keys))
    except ValueError:
        given = ", ".join(f"{k}={os.environ[k]!r}" for k in keys)
        raise UserError(f"{given}: these must be integers; start with torchrun or deepspeed") from None
    if world.local_world_size is not None and not world.local_rank < world.local_world_size <= world.world_size:
        given = ", ".join(f"{k}={os.environ[k]}" for k in keys)
        raise UserError(f"{given}: {size} counts the ranks of a node; start with torchrun or deepspeed, or unset it")
    return world


def sees_one_gpu() -> None:
    """Tell DeepSpeed, which takes LOCAL_RANK for the number of a GPU, that this rank sees one alone."""
    for name in ("LOCAL_RANK", OPENMPI["LOCAL_RANK"]):
        if name in os.environ:
            os.environ[name] = "0"


def environment(world: World, master: str, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank, for `read_world` and torch; rank 0 is on the host `master`."""
    names = {"RANK": world.rank, "WORLD_SIZE": world.world_size, "LOCAL_RANK": world.local_rank}
    local = {} if world.local_world_size is None else {"LOCAL_WORLD_SIZE": world.local_world_size}
    return {k: str(v) for k, v in {**names, **local, "MASTER_ADDR": master, "MASTER_PORT": port}.items()}
