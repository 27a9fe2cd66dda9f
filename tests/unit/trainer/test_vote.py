"""The vote of a step: packed, added over ranks and unpacked."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch

from tests.helpers.seeds import seeded
from trainer.run.signals import CODES
from trainer.vote import Vote, gradient_counts, kinds_of


def random_vote(rng: random.Random, terms: int) -> Vote:
    flags = [float(rng.random() < 0.3) for _ in range(3)]
    stops = tuple(float(rng.random() < 0.3) for _ in CODES)
    counts, kinds = (tuple(float(rng.randrange(10**6)) for _ in range(n)) for n in (terms, 2))
    return Vote(counts, *flags, stops, float(rng.randrange(9)), kinds, float(rng.random() < 0.3))  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_sum_of_packed_votes_is_the_vote_of_sums(terms: int) -> None:
    rng = random.Random(seeded())
    for ranks in range(1, 9):
        votes = [random_vote(rng, terms) for _ in range(ranks)]
        total = Vote.unpack([sum(column) for column in zip(*(vote.pack() for vote in votes), strict=True)])
        for field in fields(Vote):
            values = [getattr(vote, field.name) for vote in votes]
            many = isinstance(values[0], tuple)
            added = tuple(sum(column) for column in zip(*values, strict=True)) if many else sum(values)
            assert getattr(total, field.name) == added, field.name
        assert Vote.unpack(votes[0].pack()) == votes[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 1024])
def test_ranks_with_other_kinds_of_micro_batches_are_found(ranks: int) -> None:
    """One rank of many, with another type, another order or another number of micro batches."""

    class A(NamedTuple):
        x: int

    class B(NamedTuple):
        x: int

    usual = [A(0), A(1), B(2)]
    for other in ([A(0), B(1), A(2)], [A(0), A(1)], [B(0)] * 3, usual):
        numbers = [kinds_of(other), *[kinds_of(usual)] * (ranks - 1)]
        total = Vote((1.0,), kinds=(sum(n for n, _ in numbers), sum(n for _, n in numbers)))
        assert total.same_kinds(ranks) == (ranks == 1 or other is usual)


def test_counts_of_a_failed_step_are_nan_for_the_gradient_alone() -> None:
    """Otherwise they are the counts, bit for bit: 2^53 - 1 is the largest that fp64 counts."""
    for failed in (0.0, 1.0, 3.0):
        votes = torch.tensor(Vote((7.0, 0.0, 2.0**53 - 1), failed=failed).pack(), dtype=torch.float64)
        counts = gradient_counts(votes, 3)
        if failed:
            assert counts.isnan().all()
        else:
            assert counts.tolist() == [7.0, 0.0, 2.0**53 - 1]
        assert Vote.unpack(votes.tolist()).failed == failed
