"""Validation: the mean loss over each set, the same bits on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from conf.errors import UserError
from trainer.data.feed import AnyBatch, Feed, ValidationSet, agree
from trainer.distributed.device_copies import to_device
from trainer.engine.engine import Engine
from trainer.objective.objective import Objective, figures, weighted_loss


class Losses(NamedTuple):
    """The loss over sets of one kind by their weights, that of each set, and the means of several terms by name."""

    mean: float
    each: dict[str, float]
    figures: dict[str, float]


class Validation(NamedTuple):
    """The losses of the validation sets, what they measure, in words, and the losses of training windows if any."""

    val: Losses
    measured: str
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

    def losses_of(some: Sequence[ValidationSet]) -> Losses:
        found = {s.name: _means_on(engine, s.batches, on_progress) for s in some}
        each = {name: loss for name, (loss, _) in found.items()}
        total = sum(s.weight for s in some)
        means = [sum(s.weight * found[s.name][1][k] for s in some) / total for k in range(len(engine.objective.terms))]
        loss = sum(s.weight * each[s.name] for s in some) / total
        return Losses(loss, each, figures(engine.objective, means))

    val, train = ([s for s in sets if s.trained is trained] for trained in (False, True))
    if not val:
        return None
    return Validation(losses_of(val), _measured(engine.objective, val), losses_of(train) if train else None)


def _measured(objective: Objective, sets: Sequence[ValidationSet]) -> str:
    """`lm over books 0.25 (8 windows of 64 tokens of 1b2c3d4e), web 0.75 (...)`: the same where losses compare."""
    total = sum(s.weight for s in sets)
    weighted = zip(objective.weights, objective.terms, strict=True)
    terms = " + ".join(f"{w:g} {t}" if w != 1 else t for w, t in weighted if w)
    of = [f"{s.name}{'' if s.weight == total else f' {s.weight / total:.4g}'} ({s.measures})" for s in sets if s.weight]
    return f"{terms} over {', '.join(of)}"


def _means_on(
    engine: Engine, batches: Iterator[tuple[AnyBatch, UserError | None]], on_progress: Callable[[], None]
) -> tuple[float, list[float]]:
    """The loss on one set, and the mean of each term, NaN where nothing counts.

    Every rank runs the same number of forwards and gets the same bits.
    """
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
    sums, counts = numbers[:terms], numbers[terms:]
    means = [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]
    return weighted_loss(objective, sums, counts), means
