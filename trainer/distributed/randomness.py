"""torch's generators at places of a run: dropout by (seed, step, micro step, dp rank), the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.distributed.mesh import Mesh
from trainer.distributed.seeds import stable_seed


def seed_dropout(mesh: Mesh, seed: int, step: int, micro_step: int) -> None:
    """Before each micro step: dropout becomes a pure function of these and dp_rank, equal over the tp ranks."""
    torch.manual_seed(stable_seed("dropout", seed, step, micro_step, mesh.dp_rank))


@contextmanager
def tp_local_randomness(mesh: Mesh) -> Iterator[None]:
    """Randomness inside differs over the tp ranks: for activations of which each rank holds its own part.

    The seed is drawn from the replicated stream, so that activation recompute, which rewinds that stream, gets it
    again; from the CPU's part of it, so that no one waits for a GPU.
    """
    key = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([mesh.device] if mesh.device.type == "cuda" else []):
        torch.manual_seed(stable_seed(key, mesh.tp_rank))
        yield
