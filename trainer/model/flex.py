"""FlexAttention: attention on a GPU that skips the blocks of which no token sees another (arXiv 2412.05496).

It is torch's own Triton kernel, compiled at its first use, with the mask's definition compiled in. It has no dropout
and no cache, and its backward is for GPUs alone: everything else is `scaled_dot_product_attention` with a bias.

Legend: B batch, H heads on this rank, T time, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trainer.config.attention import Pattern
from trainer.model import arithmetic
from trainer.model.mask import segment_positions

BLOCK = arithmetic.FLEX_BLOCK
COMPILED = 64  # variants of one function: kinds x lengths x batches x (training, validation); torch's own limit is 8


def takes(device: torch.device, T: int, S: int, head_dim: int, dropout: float) -> bool:
    """True if attention of T queries over S keys can be FlexAttention, and has blocks to skip."""
    return device.type == "cuda" and arithmetic.flex_attention(T, S, head_dim, dropout)


def block_mask(pattern: Pattern, T: int, device: torch.device, segment_ids_BT: Tensor | None = None) -> BlockMask:
    """The mask of `pattern` over T tokens for all heads: one for all rows (cached), or one for each row's segments."""
    if segment_ids_BT is None:
        return _kept(pattern, T, device)
    place_BT, ids_BT = segment_positions(segment_ids_BT).int(), segment_ids_BT

    def in_segment(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.sees(place_BT[b, q], place_BT[b, k]) & (ids_BT[b, q] == ids_BT[b, k])

    B = len(segment_ids_BT)
    return _on(device, create_block_mask)(in_segment, B, None, T, T, device=device, BLOCK_SIZE=BLOCK)


@lru_cache(maxsize=64)
def _kept(pattern: Pattern, T: int, device: torch.device) -> BlockMask:
    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.sees(q, k)

    with torch.inference_mode(False):  # kept for training too, which takes no tensor of inference mode
        return create_block_mask(sees, None, None, T, T, device=device, BLOCK_SIZE=BLOCK)


def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v over what `mask` shows, [B, H, T, D]. Inside a compiled block a part of its graph."""
    if torch.compiler.is_compiling():
        return flex_attention(q_BHTD, k_BHTD, v_BHTD, block_mask=mask)
    return _on(q_BHTD.device, flex_attention)(q_BHTD, k_BHTD, v_BHTD, block_mask=mask)


def _on(device: torch.device, function: Callable) -> Callable:
    """Compiled on a GPU: as it stands it would hold all scores, or all pairs of the mask, in memory."""
    return _compiled(function) if device.type == "cuda" else function


@lru_cache
def _compiled(function: Callable) -> Callable:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED)
    return torch.compile(function, fullgraph=True, dynamic=False)
