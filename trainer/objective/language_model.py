"""The language model: -log p of each next token, summed over the labels that are not IGNORE."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.config import IGNORE
from data_pipeline.stream.loader import Batch
from trainer.model.gpt import GPT
from trainer.model.loss import token_losses


class LanguageModel:
    """One term, in nats: a step minimises the mean over its valid labels."""

    terms = ("lm",)
    weights = (1.0,)

    def counts(self, batch: Batch) -> list[float]:
        """The number of valid labels."""
        return [float((batch.labels != IGNORE).sum())]

    def sums(self, module: GPT, batch: Batch) -> Tensor:
        """The sum of -log p(label), fp32 [1]."""
        return lm_loss(module, *batch)[None]


def lm_loss(model: GPT, tokens_BT: Tensor, labels_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
    """Sum of -log p(label) in nats over the labels that are not IGNORE: an fp32 scalar, equal on all tp ranks.

    With `segment_ids_BT`, which never fall along a row, each segment is computed as if it stood alone.
    """
    return model.run_loss(model.wte, model.hidden(tokens_BT, segment_ids_BT=segment_ids_BT), labels_BT.t(), model.mesh)


def token_log_p(model: GPT, tokens_BT: Tensor, labels_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
    """log p(label) of each token in nats, 0 where the label is IGNORE: fp32 [B, T], equal on all tp ranks."""
    logits_TBV = model.wte(model.hidden(tokens_BT, segment_ids_BT=segment_ids_BT), head=True)
    return -token_losses(logits_TBV, labels_BT.t(), model.mesh, model.wte.n_true).t()
