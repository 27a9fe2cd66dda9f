"""A check of the hardware: every so often one micro step's loss and gradients are computed twice and compared.

A processor or memory that is wrong now and then raises no error; its numbers go into everyone's weights. What is made
twice from the same weights, batch and dropout seed must have the same bits: on a CPU always, on a GPU under
deterministic=true, without which this is refused. The gradients are torch's own, of the plain module: what DeepSpeed
accumulates is not touched. Of each gradient the sum of its bits, read as integers, is kept, not the gradient itself;
two errors that cancel out in that sum are missed, and so is what is wrong the same way twice.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import torch
from torch import Tensor

from conf.errors import UserError
from trainer.config.health import GuardConfig
from trainer.data.feed import AnyBatch
from trainer.distributed.collective import all_ranks
from trainer.distributed.randomness import seed_dropout
from trainer.engine.engine import Engine, to_device

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def recheck(engine: Engine, every: int, run_seed: int, step: int, batch: AnyBatch) -> None:
    """Compute a micro step of `step` twice, if one is due: each `every` steps, 0 for never. Collective.

    Raises:
        UserError: on every rank, where one got other bits: it names the rank, its host and what differs.
    """
    if every == 0 or (step + 1) % every:
        return

    def seed() -> None:
        seed_dropout(engine.mesh, run_seed, step, 0)

    what = f"guard.recheck_every={every}: step {step} computed twice is not the same, and the run stops unsaved"
    all_ranks(what, lambda: compare(engine, batch, seed))


def compare(engine: Engine, batch: AnyBatch, seed: Callable[[], None]) -> None:
    """Raises UserError if two passes over one batch differ in a bit."""
    first, second = (_fingerprint(engine, batch, seed) for _ in range(2))
    names = ["the loss", *(f"the gradient of {name}" for name, _ in engine.module.named_parameters())]
    differ = [name for name, same in zip(names, (first == second).tolist(), strict=True) if not same]
    if differ:
        raise UserError(
            f"host {socket.gethostname()}, device {engine.mesh.device}: {len(differ)} of {len(names)} tensors "
            f"differ, the first is {differ[0]}: take the machine out, and resume from a checkpoint "
            "that is not newer than the last recheck without a difference"
        )


def check_recheck(guard: GuardConfig, deterministic: bool, device: str) -> None:
    """Raises UserError if two passes need not be equal on this kind of device."""
    if guard.recheck_every and device == "cuda" and not deterministic:
        raise UserError(
            f"guard.recheck_every={guard.recheck_every} on a GPU without deterministic=true: kernels add in any "
            "order, so that two passes differ anyway; give deterministic=true, or guard.recheck_every=0"
        )


def _fingerprint(engine: Engine, batch: AnyBatch, seed: Callable[[], None]) -> Tensor:
    """[1 + parameters] int64, of the loss and of each gradient."""
    seed()
    sums = engine.module(engine.objective.sums, to_device(batch, engine.mesh.device))
    grads = torch.autograd.grad(sums.sum(), list(engine.module.parameters()), materialize_grads=True)
    return torch.stack([_bits(x) for x in (sums, *grads)])


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(BITS[x.dtype]).sum(dtype=torch.int64)
