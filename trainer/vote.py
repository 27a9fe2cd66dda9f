"""The vote of a step: all that ranks must agree on, in one all-reduce before the first backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.device_copies import to_device
from trainer.distributed.mesh import Mesh
from trainer.run.signals import CODES


@dataclass(frozen=True)
class Vote:
    """One rank's vote, or the sum of all ranks' votes. A sum counts the ranks that said yes.

    `counts`: of the objective's terms, in this rank's batches. `failed`: its batches could not be read, or its
    checkpoint in flight could not be written. `save`: the clock asks for a checkpoint. `overdue`: the grace after a
    stop signal is over. `stops`: the signals it got, in the order of `signals.CODES`. `skipped`: steps that its guard
    has skipped.
    """

    counts: tuple[float, ...]
    failed: float = 0.0
    save: float = 0.0
    overdue: float = 0.0
    stops: tuple[float, ...] = (0.0,) * len(CODES)
    skipped: float = 0.0

    def pack(self) -> list[float]:
        """The numbers to add over ranks; the counts come first, then `failed`."""
        return [*self.counts, self.failed, self.save, self.overdue, self.skipped, *self.stops]

    @classmethod
    def unpack(cls, numbers: Sequence[float]) -> Vote:
        """The inverse of `pack`."""
        *counts, failed, save, overdue, skipped = numbers[: -len(CODES)]
        return cls(tuple(counts), failed, save, overdue, tuple(numbers[-len(CODES) :]), skipped)


def add_votes(vote: Vote, mesh: Mesh) -> Tensor:
    """The packed sum of all ranks' votes, fp64 on the device. Collective; the host does not wait for it."""
    votes = to_device(vote.pack(), mesh.device)
    dist.all_reduce(votes)
    return votes


def gradient_counts(votes: Tensor, terms: int) -> Tensor:
    """The counts [terms] of packed votes, on the device; NaN if any rank has failed.

    NaN makes the gradient NaN, so that the engine refuses the step on every rank, at the only time in a step that the
    host waits for the device.
    """
    return torch.where(votes[terms] > 0, torch.nan, votes[:terms])
