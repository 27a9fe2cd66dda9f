"""The pairs of a comparison: each two answers of which one is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.examples.read import Preference


def pairs_of(ranks: np.ndarray) -> np.ndarray:
    """(better, worse) [P, 2]: the answers of each pair that is no tie; 0 is the best rank."""
    return np.argwhere(ranks[:, None] < ranks[None, :])


def pairs_line(preferences: Sequence[Preference], of: str) -> str:
    """The number of pairs, and the share of them in which the longer answer is the better one.

    A reward model that knows lengths alone has that accuracy. Of two equally long answers half a pair counts.
    """
    total, better = 0, 0.0
    for _, answers, ranks in preferences:
        lengths, pairs = np.array([len(answer) for answer in answers]), pairs_of(ranks)
        longer = np.sign(lengths[pairs[:, 0]] - lengths[pairs[:, 1]])
        total += len(pairs)
        better += float((1 + longer).sum()) / 2
    return (
        f"comparisons: the longer answer is the better one in {100 * better / total:.1f}% of {total:,} {of} pairs: an "
        "accuracy near it says nothing"
    )
