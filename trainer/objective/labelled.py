"""GPT-1's fine-tuning: L3 = L2 + lambda L1, a task's loss and that of the language model on the same sequences.

Each term is divided by its own global count: L2 by the examples of the step, L1 by its label tokens. The released code
averages L1 within each sequence first, then over the sequences: where all sequences are equally long the two agree.

Legend: T time, R sequences, N examples, C n_embd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.config import IGNORE
from data_pipeline.examples.examples_config import Task
from trainer.objective.heads import WithHead


class LabelledBatch(NamedTuple):
    """A micro batch of labelled examples; the sequences of an example stand side by side, two of each similarity."""

    tokens: Tensor  # [R, T]
    labels: Tensor  # [R, T] of the language model: the next token, or IGNORE
    ends: Tensor  # [R] the place of the extract token
    owner: Tensor  # [R] the example of a sequence, ascending
    target: Tensor  # [N] fp32: the class, the similarity or the number of the right answer; NaN: no example


class LabelledTask:
    """The terms of one task: `label` (L2), with lambda > 0 `lm` (L1), and the figure `acc` where a label is a number.

    classification: cross entropy of the head's outputs, one for each class.
    similarity: the squared error of the head's output on the sum of the states of both orders.
    choice: cross entropy over the answers of each example, each with an output of the head.
    """

    def __init__(self, task: Task, lm_weight: float, head_dropout: float) -> None:
        self._task = task
        self._head_dropout = head_dropout
        self._has_lm = lm_weight > 0
        self._has_classes = task is not Task.similarity
        self.terms = ("label", *["lm"] * self._has_lm, *["acc"] * self._has_classes)
        self.weights = (1.0, *[lm_weight] * self._has_lm, *[0.0] * self._has_classes)

    def counts(self, batch: LabelledBatch) -> list[float]:
        """The examples and, for the language model, the label tokens."""
        examples = float((~batch.target.isnan()).sum())
        tokens = float((batch.labels != IGNORE).sum())
        return [examples, *[tokens] * self._has_lm, *[examples] * self._has_classes]

    def sums(self, module: WithHead, batch: LabelledBatch) -> Tensor:
        """The sums of the terms over the micro batch, fp32."""
        x_TRC = module.hidden(batch.tokens)
        scores = self._scores(module, x_TRC, batch)
        lm = [module.run_loss(module.wte, x_TRC, batch.labels.t(), module.mesh)] if self._has_lm else []
        counted_N = ~batch.target.isnan()
        if not self._has_classes:
            error_N = (scores[:, 0] - batch.target).where(counted_N, 0.0)
            return torch.stack([error_N.square().sum(), *lm])
        column_N = self._column(batch, batch.target.nan_to_num()).where(counted_N, IGNORE)
        loss = F.cross_entropy(scores, column_N, ignore_index=IGNORE, reduction="sum")
        return torch.stack([loss, *lm, (scores.argmax(-1) == column_N).sum().float()])

    def predictions(self, module: WithHead, batch: LabelledBatch) -> Tensor:
        """The class, the similarity or the number of the answer that the head gives each example, fp32 [N]."""
        scores = self._scores(module, module.hidden(batch.tokens), batch)
        if not self._has_classes:
            return scores[:, 0]
        return (scores.argmax(-1) - self._column(batch, torch.zeros_like(batch.target))).float()

    def _scores(self, module: WithHead, x_TRC: Tensor, batch: LabelledBatch) -> Tensor:
        """The head's outputs, fp32 [N, K]; of a choice [N, R], -inf for the answers of other examples."""
        N = len(batch.target)

        def merge(x_RC: Tensor) -> Tensor:
            if self._task is Task.similarity:
                x_RC = x_RC[0::2] + x_RC[1::2]
            mask_NC = F.dropout(x_RC.new_ones(N, x_RC.shape[1]), self._head_dropout, module.training)
            return x_RC * (mask_NC[batch.owner] if self._task is Task.choice else mask_NC)

        scores: Tensor = module.head(x_TRC, batch.ends, merge)
        if self._task is not Task.choice:
            return scores
        own_NR = batch.owner == torch.arange(N, device=batch.owner.device)[:, None]
        return scores[:, 0].where(own_NR, -torch.inf)

    def _column(self, batch: LabelledBatch, label_N: Tensor) -> Tensor:
        """The column of `_scores` that a label means, int64 [N]."""
        if self._task is not Task.choice:
            return label_N.long()
        first_N = torch.searchsorted(batch.owner, torch.arange(len(label_N), device=batch.owner.device))
        return first_N + label_N.long()
