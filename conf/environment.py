"""The environment of the programs that we start. Standard library only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OF_AN_ALLOCATION = re.compile(r"(SLURMD?|SRUN|PMI[0-9X]?)_.+")
"""Names by which Slurm and MPI describe the allocation that a process runs in. The next sbatch, srun or mpirun takes
them for its own options: a job submitted from inside salloc would be bound to the cores of that shell."""
KEPT = ("SLURM_CONF", "SLURM_JWT")  # the cluster, and the right to use it


def of_an_allocation(name: str) -> bool:
    """Return True for a variable that must not reach a program that we start."""
    return OF_AN_ALLOCATION.fullmatch(name) is not None and name not in KEPT


def passed_on() -> dict[str, str]:
    """Our environment without the variables of the allocation that we run in; prints to stderr which are left out."""
    gone = [name for name in os.environ if of_an_allocation(name)]
    if gone:
        kinds = sorted({name.partition("_")[0] for name in gone})
        said = ", ".join(f"{kind}_* ({sum(name.startswith(f'{kind}_') for name in gone)})" for kind in kinds)
        print(f"not passed on, they are of the allocation that you are in: {said}", file=sys.stderr, flush=True)
    return {name: value for name, value in os.environ.items() if name not in gone}


@contextmanager
def only_passed_on() -> Iterator[None]:
    """Set our own environment to `passed_on()`, for a library that starts programs with it."""
    before = dict(os.environ)
    kept = passed_on()
    for name in before.keys() - kept.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)
