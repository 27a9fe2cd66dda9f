"""Comparisons to micro batches: every answer a row of its own, all answers to a prompt in one micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
import torch

from data_pipeline.examples.pairs import pairs_of
from data_pipeline.examples.read import Preference
from trainer.data.collate import MULTIPLE, row_tokens
from trainer.data.example_feed import Collate, Rows
from trainer.objective.ranking import Comparisons

_NONE = Preference(np.zeros(0, np.int32), (np.zeros(1, np.int32),), np.zeros(1, np.int32))


def comparisons(preferences: Sequence[Preference], n_ctx: int, multiple: int = MULTIPLE) -> Collate:
    """Micro batches as long as their longest answer, rounded up to a `multiple`, at most n_ctx."""

    def collate(rows: Rows) -> Comparisons:
        some = [preferences[i] for row in rows for i in row]
        dummies = sum(not row for row in rows)
        numbers = [n for n, item in enumerate(some) for _ in item.answers] + [-1] * dummies
        texts = [np.concatenate([item.prompt, x]) for item in [*some, *[_NONE] * dummies] for x in item.answers]
        tokens = np.zeros((len(texts), row_tokens(max(map(len, texts)), n_ctx, multiple)), np.int64)
        for row, ids in zip(tokens, texts, strict=True):
            row[: len(ids)] = ids
        ends = np.array([len(ids) - 1 for ids in texts], np.int64)
        pairs, weights = map(torch.from_numpy, _pairs(some))
        numbered = torch.tensor(numbers, dtype=torch.int64)
        return Comparisons(torch.from_numpy(tokens), torch.from_numpy(ends), numbered, pairs, weights)

    return collate


def _pairs(some: Sequence[Preference]) -> tuple[np.ndarray, np.ndarray]:
    """The pairs and their weights; ties are left out of the sum, and still count in C(K, 2)."""
    pairs, weights, first = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)], 0
    for item in some:
        k, own = len(item.answers), pairs_of(item.ranks)
        pairs.append(first + own)
        weights.append(np.full(len(own), 1 / max(1, comb(k, 2)), np.float32))
        first += k
    return np.concatenate(pairs), np.concatenate(weights)
