"""Direct preference optimisation (Rafailov et al. 2023): of two answers, the better one is to gain on a reference.

Legend: N pairs, T time. The reward that is implied in a model is beta x (its log p of an answer - the reference's).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.config import IGNORE
from trainer.model.gpt import GPT
from trainer.objective.language_model import token_log_p


class Pairs(NamedTuple):
    """Rows of N chosen answers, then of the N rejected ones, each behind its prompt."""

    tokens: Tensor  # [2N, T]
    labels: Tensor  # [2N, T]: the answer and its end token, elsewhere IGNORE; a pair without labels counts nothing


class Preference:
    """-log sigmoid of the margin between the rewards of two answers, a mean over pairs.

    Beside it the share of pairs whose chosen answer has the higher reward (an equal one counts half), the model's log p
    of the chosen and of the rejected answer, and the margin.
    """

    terms = ("dpo", "accuracy", "chosen", "rejected", "margin")
    weights = (1.0, 0.0, 0.0, 0.0, 0.0)

    def __init__(self, beta: float, reference: GPT | None = None) -> None:
        self.beta = beta
        self.reference = reference  # frozen, without dropout; to be there before the first batch

    def counts(self, batch: Pairs) -> list[float]:
        """The number of pairs, for each term."""
        return [float(_counted(batch).sum())] * len(self.terms)

    def sums(self, module: GPT, batch: Pairs) -> Tensor:
        """Each term's sum over the pairs, fp32 [5]."""
        assert self.reference is not None
        with torch.no_grad():
            base_2N = _log_p(self.reference, batch)
        log_p_2N = _log_p(module, batch)
        chosen_N, rejected_N = (self.beta * (log_p_2N - base_2N)).chunk(2)
        margin_N = chosen_N - rejected_N
        right_N = 0.5 + 0.5 * margin_N.detach().sign()
        figures = (right_N, *log_p_2N.detach().chunk(2), margin_N.detach())
        return (torch.stack([-F.logsigmoid(margin_N), *figures]) * _counted(batch)).sum(-1)


def _log_p(model: GPT, batch: Pairs) -> Tensor:
    """log p of each row's answer in nats: fp32 [2N]."""
    return token_log_p(model, batch.tokens, batch.labels).sum(-1)


def _counted(batch: Pairs) -> Tensor:
    """The pairs that have labels: bool [N]."""
    return (batch.labels[: len(batch.labels) // 2] != IGNORE).any(-1)
