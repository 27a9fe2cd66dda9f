"""The ranking loss of a reward model: the better of two answers is to score higher.

A comparison of K answers with scores r adds -1 / C(K, 2) times the sum of log sigmoid(r_better - r_worse) over its
pairs. Only differences are learnt: where the scores' zero lies is settled when training is over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.objective.heads import WithHead


class Comparisons(NamedTuple):
    """The answers of some comparisons, each behind its prompt. What follows the end of a row is padding."""

    tokens: Tensor  # [R, T] int64
    ends: Tensor  # [R] int64: the place of the answer's last token
    numbers: Tensor  # [R] int64: of the row's comparison, from 0; -1: the row only fills the micro batch up
    pairs: Tensor  # [P, 2] int64: the rows of a better answer and of a worse one
    weights: Tensor  # [P] fp32: 1 / C(K, 2) of K answers to one prompt


class Ranking:
    """One term a comparison, and figures: the share of pairs in the right order, and the scores' mean and mean square.

    The standard deviation of the scores is the root of `score_square` less the square of `score`.
    """

    terms = ("ranking", "accuracy", "score", "score_square")
    weights = (1.0, 0.0, 0.0, 0.0)

    def counts(self, batch: Comparisons) -> list[float]:
        """The comparisons, the pairs that are no ties, and the answers, twice."""
        answers = float((batch.numbers >= 0).sum())
        return [float(batch.numbers.max() + 1), float(len(batch.pairs)), answers, answers]

    def sums(self, module: WithHead, batch: Comparisons) -> Tensor:
        """fp32 [4]; equal scores are half a pair in the right order."""
        score_R = module.head(module.hidden(batch.tokens), batch.ends)[:, 0]
        margin_P = score_R[batch.pairs[:, 0]] - score_R[batch.pairs[:, 1]]
        ranking = -(batch.weights * F.logsigmoid(margin_P)).sum()
        with torch.no_grad():
            right = (1 + margin_P.sign()).sum() / 2
            counted_R = score_R.where(batch.numbers >= 0, 0.0)
        return torch.stack([ranking, right, counted_R.sum(), counted_R.square().sum()])
