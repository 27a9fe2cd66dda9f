"""The share of attention's blocks that a kernel visits, pattern by pattern. Standard library only."""

from __future__ import annotations

from functools import lru_cache

from trainer.config.model import ModelConfig
from trainer.model.arithmetic import FLEX_BLOCK as BLOCK
from trainer.model.arithmetic import flex_attention


def visited(model: ModelConfig, layer: int) -> float:
    """Share of the n_ctx x n_ctx scores that are computed, 0..1; causal and dense: a little over one half."""
    return _visited(model.kind(layer), model.n_ctx, model.band, model.stride, model.summary)


def biased(model: ModelConfig, document_mask: bool, on_gpu: bool) -> set[str]:
    """The letters whose attention takes a bias and computes all scores, as trainer/model/attention.py decides."""
    if on_gpu and flex_attention(model.n_ctx, model.n_ctx, model.head_dim, model.dropout):
        return set()
    letters = {model.kind(layer) for layer in range(model.n_layer)}
    return {kind for kind in letters if document_mask or not model.sees_all(kind, model.n_ctx)}


@lru_cache
def _visited(kind: str, n_ctx: int, band: int | None, stride: int | None, summary: int | None) -> float:
    blocks = -(-n_ctx // BLOCK)
    seen = sum(_sees(kind, q, k, band or 0, stride or 1, summary or 0) for q in range(blocks) for k in range(q + 1))
    return seen / blocks**2


def _sees(kind: str, q: int, k: int, band: int, stride: int, summary: int) -> bool:
    """Whether a token of query block q sees one of key block k <= q."""
    near, far = max(0, (q - k) * BLOCK - BLOCK + 1), (q - k) * BLOCK + BLOCK - 1  # their distances
    if kind == "B":
        return near < band
    if kind == "S":  # its last `stride` keys, and each at a multiple of stride
        return near < stride or far // stride * stride >= near
    if kind == "F":  # its own part of `stride` keys, and the last `summary` of each part before
        own = (q * BLOCK) // stride <= (k * BLOCK + BLOCK - 1) // stride
        return own or any(j % stride >= stride - summary for j in range(k * BLOCK, (k + 1) * BLOCK))
    return True
