"""The vote of a step: all that ranks must agree on, in one all-reduce before the first backward."""

from __future__ import annotations

import zlib
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
    has skipped. `kinds`: a number for the kinds of its micro batches, and its square (`kinds_of`). `hours`: the run has
    trained for max_hours.
    """

    counts: tuple[float, ...]
    failed: float = 0.0
    save: float = 0.0
    overdue: float = 0.0
    stops: tuple[float, ...] = (0.0,) * len(CODES)
    skipped: float = 0.0
    kinds: tuple[float, float] = (0.0, 0.0)
    hours: float = 0.0

    def pack(self) -> list[float]:
        """The numbers to add over ranks; the counts come first, then `failed`."""
        flags = (self.failed, self.save, self.overdue, self.hours)
        return [*self.counts, *flags, self.skipped, *self.kinds, *self.stops]

    @classmethod
    def unpack(cls, numbers: Sequence[float]) -> Vote:
        """The inverse of `pack`."""
        *counts, failed, save, overdue, hours, skipped, kinds, squares = numbers[: -len(CODES)]
        stops = tuple(numbers[-len(CODES) :])
        return cls(tuple(counts), failed, save, overdue, stops, skipped, (kinds, squares), hours)

    def same_kinds(self, ranks: int) -> bool:
        """True if the votes of so many ranks, whose sum this is, have the same `kinds`: their variance is 0."""
        return ranks * self.kinds[1] == self.kinds[0] ** 2


def kinds_of(batches: Sequence[object]) -> tuple[float, float]:
    """A number below 2^16 for the types of a step's micro batches, in order; and its square.

    Exact in fp64 when they are added over up to 1,024 ranks.
    """
    number = zlib.crc32(" ".join(type(batch).__name__ for batch in batches).encode()) & 0xFFFF
    return float(number), float(number**2)


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
