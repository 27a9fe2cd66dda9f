"""The environment that a program started from here gets. Standard library only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OF_AN_ALLOCATION = re.compile(r"(SLURMD?|SRUN|PMI[0-9X]?)_.+")
"""Names by which Slurm and MPI describe the allocation that a process runs in. The next sbatch, srun or mpirun takes
them for its own options: a job submitted from inside salloc would be bound to the cores of that shell."""
KEPT = ("SLURM_CONF", "SLURM_JWT")  # which cluster, and the right to ask it


def of_an_allocation(name: str) -> bool:
    """Return True for a variable that must not reach what is started from here."""
    return OF_AN_ALLOCATION.fullmatch(name) is not None and name not in KEPT


def passed_on() -> dict[str, str]:
    """Our environment without the description of the allocation that we run in; what is left out is told on stderr."""
    gone = [name for name in os.environ if of_an_allocation(name)]
    if gone:
        kinds = sorted({name.partition("_")[0] for name in gone})
        said = ", ".join(f"{kind}_* ({sum(name.startswith(f'{kind}_') for name in gone)})" for kind in kinds)
        print(f"not passed on, they are of the allocation that you are in: {said}", file=sys.stderr, flush=True)
    return {name: value for name, value in os.environ.items() if name not in gone}


@contextmanager
def only_passed_on() -> Iterator[None]:
    """The same for a library that starts programs by itself, with our own environment."""
    before = dict(os.environ)
    kept = passed_on()
    for name in before.keys() - kept.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)
