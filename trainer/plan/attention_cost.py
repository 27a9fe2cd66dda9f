"""The share of attention's blocks that a kernel visits, pattern by pattern. Standard library only."""

from __future__ import annotations

from functools import lru_cache

from trainer.config.attention import Pattern
from trainer.config.model import ModelConfig
from trainer.model.arithmetic import FLEX_BLOCK as BLOCK
from trainer.model.arithmetic import flex_attention


def visited(model: ModelConfig, layer: int) -> float:
    """Share of the n_ctx x n_ctx scores that are computed, 0..1; causal and dense: a little over one half."""
    return _visited(model.pattern(model.kind(layer)), model.n_ctx)


def biased(model: ModelConfig, document_mask: bool, on_gpu: bool) -> set[str]:
    """The letters whose attention takes a bias and computes all scores, as trainer/model/attention.py decides."""
    if on_gpu and flex_attention(model.n_ctx, model.n_ctx, model.head_dim, model.dropout):
        return set()
    letters = {model.kind(layer) for layer in range(model.n_layer)}
    return {kind for kind in letters if document_mask or not model.pattern(kind).sees_all(model.n_ctx)}


@lru_cache
def _visited(pattern: Pattern, n_ctx: int) -> float:
    blocks = -(-n_ctx // BLOCK)
    return sum(pattern.sees_block(q, k, BLOCK) for q in range(blocks) for k in range(q + 1)) / blocks**2
