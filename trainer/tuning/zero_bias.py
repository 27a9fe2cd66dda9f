"""The bias of a reward model's head by which demonstrations score 0 in the mean, set when training is over.

A ranking loss does not say where the scores' zero lies. What follows here from the weights and the examples alone: a
run that is killed meanwhile does it again, to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainer.data.example_feed import Collate, shares
from trainer.engine.engine import Engine
from trainer.engine.fragments import assign, owned

BIAS = "head.bias"


class Scored(NamedTuple):
    """Examples to score, numbered from 0."""

    number: int
    collate: Collate


def set_zero_bias(
    engine: Engine, demonstrations: Scored, answers: Scored, size: int, on_progress: Callable[[], None]
) -> dict[str, float]:
    """Subtract the demonstrations' mean score from the bias. Collective.

    Returns the bias, and the mean and the standard deviation of the `answers`' scores, by which a penalty that is to be
    added to rewards is chosen. `size`: examples of a micro batch. `on_progress` is called at each.
    """
    mean, _ = _moments(engine, demonstrations, size, on_progress)
    bias = torch.zeros((), dtype=torch.float64, device=engine.mesh.device)
    for fragment in owned(engine.module, engine.adam):
        if fragment.name == BIAS:
            bias += fragment.views["master"].sum()
    dist.all_reduce(bias, group=engine.mesh.dp_group)  # one rank has it
    zero = float(bias) - mean
    assign(engine.module, engine.adam, BIAS, zero)
    mean, std = _moments(engine, answers, size, on_progress)
    return {"reward/zero_bias": zero, "reward/score_mean": mean, "reward/score_std": std}


def _moments(engine: Engine, scored: Scored, size: int, on_progress: Callable[[], None]) -> tuple[float, float]:
    """The mean and the standard deviation of scores, of equal bits on all ranks."""
    mesh, terms = engine.mesh, engine.objective.terms
    totals = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    of = [terms.index("score"), terms.index("score_square")]
    for batch in shares([[i] for i in range(scored.number)], scored.collate, mesh, size):
        on_progress()
        totals[:2] += engine.evaluate(batch)[of]
        totals[2] += engine.objective.counts(batch)[of[0]]
    dist.all_reduce(totals, group=mesh.dp_group)
    dist.broadcast(totals, src=0)
    total, squares, number = totals.tolist()
    mean = total / number
    return mean, math.sqrt(max(0.0, squares / number - mean * mean))
