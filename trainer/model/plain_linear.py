"""The model's linears and its tied embedding on one rank: plain torch.

A forward is plain `F.linear`, so that torch.compile sees one graph. Weights are left empty for `init.py`.

Legend: T time, B batch, C n_embd, V vocabulary, padding included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.arithmetic import LOSS_CHUNK_BYTES, padded_vocab_size

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
Reduce = Callable[[Tensor, int], Tensor]  # (logits of some rows, the first row) -> results


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` as it is when it is called: ZeRO-3 replaces it by one that does not keep the gathered weight."""
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """y = x Aᵀ + b, A [out, in], on one rank."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.product: Product = product  # fp8.py has another

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class TiedEmbedding(nn.Module):
    """The token embedding, and with `head=True` the output layer on the same weight [V, C].

    One module for both, so that ZeRO-3's hooks gather the weight for either use. `n_true`: rows that are tokens; the
    others, at the end, are padding, whose logits are numbers that the loss must leave out.
    """

    def __init__(self, vocab_size: int, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(padded_vocab_size(vocab_size, 1), n_embd))
        self.n_true = vocab_size

    def forward(self, x: Tensor, head: bool = False, reduce: Reduce | None = None) -> Tensor:
        """Tokens [B, T] -> x_TBC; with `head` x_TBC -> logits_TBV; with `reduce` see `in_chunks`."""
        if reduce is not None:
            return in_chunks(x, self._logits, reduce, len(self.weight), self.n_true)
        return self._logits(x) if head else F.embedding(x.t(), self.weight)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def in_chunks(x_NC: Tensor, head: Callable[[Tensor], Tensor], reduce: Reduce, V: int, n_true: int) -> Tensor:
    """The results of `reduce(logits_nV, first row)` for each chunk of rows, one after the other; padding is -inf.

    No more logits than a chunk's are held. Called in the embedding's own forward, so that ZeRO-3 gathers the weight
    once for all of them.
    """
    rows = max(1, LOSS_CHUNK_BYTES // (4 * V))
    out = []
    for i, part in enumerate(x_NC.split(rows)):
        logits_nV = head(part)
        with torch.no_grad():  # p = 0 there, hence the gradient is 0 as it is: nothing for autograd to see
            logits_nV[:, n_true:] = -torch.inf
        out.append(reduce(logits_nV, i * rows))
    return torch.cat(out)
