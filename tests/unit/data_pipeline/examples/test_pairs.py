"""The pairs of a comparison, and the accuracy of preferring length."""

from __future__ import annotations

import numpy as np

from data_pipeline.examples.pairs import pairs_line, pairs_of
from data_pipeline.examples.read import Preference
from tests.helpers.ranked import random_preferences
from tests.helpers.seeds import seeded


def test_pairs_are_the_better_and_the_worse_without_ties() -> None:
    assert pairs_of(np.array([1, 0, 1, 2])).tolist() == [[0, 3], [1, 0], [1, 2], [1, 3], [2, 3]]
    assert pairs_of(np.array([0, 0])).shape == (0, 2)


def test_longer_answers_are_counted_over_all_pairs() -> None:
    """A plain loop over pairs, where equal lengths are half a pair."""
    some = random_preferences(np.random.default_rng(seeded()), 50, vocab_size=9, longest=12)
    right = total = 0.0
    for item in some:
        for i, a in enumerate(item.answers):
            for j, b in enumerate(item.answers):
                if item.ranks[i] < item.ranks[j]:
                    total += 1
                    right += 1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0
    assert f"in {100 * right / total:.1f}% of {total:,.0f} held-out pairs" in pairs_line(some, "held-out")


def test_a_longer_worse_answer_is_none_of_them() -> None:
    short, long = np.zeros(1, np.int32), np.zeros(5, np.int32)
    item = Preference(short, (long, short), np.array([1, 0]))
    assert "in 0.0% of 1 training pairs" in pairs_line([item], "training")
