"""Validation: the mean loss over each set, the same bits on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from conf.errors import UserError
from trainer.data.feed import AnyBatch, Feed, agree
from trainer.distributed.device_copies import to_device
from trainer.engine.engine import Engine
from trainer.objective.objective import weighted_loss


class Losses(NamedTuple):
    """The loss over sets of one kind by their weights, and that of each set."""

    mean: float
    each: dict[str, float]


class Validation(NamedTuple):
    """The losses of the validation sets, and those of training windows if there are any."""

    val: Losses
    train: Losses | None


def validate(
    engine: Engine, feed: Feed, step: int, on_progress: Callable[[], None] = lambda: None
) -> Validation | None:
    """The losses after `step` updates; None without a validation set. Collective.

    `on_progress` is called at each batch.

    Raises:
        UserError: on every rank, where one cannot read its batches.
    """
    sets = feed.validation(step)

    def losses_of(trained: bool) -> Losses | None:
        own = [s for s in sets if s.trained == trained]
        each = {s.name: _loss_on(engine, s.batches, on_progress) for s in own}
        return Losses(sum(s.weight * each[s.name] for s in own) / sum(s.weight for s in own), each) if own else None

    val = losses_of(trained=False)
    return Validation(val, losses_of(trained=True)) if val else None


def _loss_on(
    engine: Engine, batches: Iterator[tuple[AnyBatch, UserError | None]], on_progress: Callable[[], None]
) -> float:
    """The loss on one set: every rank runs the same number of forwards and gets the same bits."""
    mesh, objective = engine.mesh, engine.objective
    terms = len(objective.terms)
    unread = None
    totals = torch.zeros(2 * terms + 1, dtype=torch.float64, device=mesh.device)  # sums, counts, failed ranks
    for batch, error in batches:
        on_progress()
        unread = unread or error
        totals[:terms] += engine.evaluate(batch)
        totals[terms:] += to_device([*objective.counts(batch), float(error is not None)], mesh.device)
    dist.all_reduce(totals, group=mesh.dp_group)
    dist.broadcast(totals, src=0)  # whether this is the best loss is decided on equal bits
    *numbers, failed = totals.tolist()
    if failed:
        agree(mesh, unread)
    return weighted_loss(objective, numbers[:terms], numbers[terms:])
