"""Causal self-attention over the heads of this rank, and what it asks of a cache of keys and values.

Legend: B batch, T time, S time with what the cache holds, C n_embd, H heads on this rank, D head dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from trainer.config.model import ModelConfig
from trainer.distributed.mesh import Mesh
from trainer.distributed.randomness import tp_local_randomness
from trainer.model import flex
from trainer.model.arithmetic import padded_n_head
from trainer.model.linear import column_linear, row_linear
from trainer.model.mask import DENSE, attention_bias, patterns

Mask = Tensor | BlockMask | None  # a bias on the scores, FlexAttention's blocks, or nothing beyond causality
FASTEST_FIRST = [  # on Hopper: cuDNN's kernels, written for it, before FlashAttention-2
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def layer_masks(
    cfg: ModelConfig,
    T: int,
    S: int,
    like: Tensor,
    segment_ids_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    *,
    dropout: float = 0.0,
    any_length: bool = False,
) -> dict[str, Mask]:
    """The mask for each letter of a model's attention; built once a forward.

    `positions_BT`: of the queries, where the rows of a cache have different lengths, or of branches (`attention_bias`).
    `any_length`: texts have any length, as in generation: compiling a kernel for each would cost more than it saves.
    `dropout`: the dropout of attention's weights. FlexAttention has no dropout, so with it a sparse pattern is computed
    as dense attention with a bias, on a GPU too: correct, but no faster than dense and with [T, T] in memory.
    """
    out: dict[str, Mask] = {}
    for kind, pattern in patterns(cfg, S).items():
        sparse = pattern != DENSE or segment_ids_BT is not None
        if sparse and not any_length and positions_BT is None and flex.takes(like.device, T, S, cfg.head_dim, dropout):
            out[kind] = flex.block_mask(pattern, T, like.device, segment_ids_BT)
        else:
            out[kind] = attention_bias(T, S, like, segment_ids_BT, pattern, positions_BT)
    return out


def sdpa_backends(device: torch.device) -> list[SDPBackend] | None:
    """In which order causal attention tries torch's kernels; None leaves it to torch."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return FASTEST_FIRST if hopper else None


class Cache(Protocol):
    """Keys and values of a batch of texts: the token at position p of a row is in slot p. See trainer/inference."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions of each row's next T tokens: [B, T], or [1, T] where all rows have one length."""

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store them at `positions(T)` of a layer and return the layer's slots 0..S-1, [B, H, S, D] each."""

    def grow(self, rows: int, T: int) -> None:
        """Count T tokens more in each of the rows, once all layers have stored them."""


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v over the past. `c_attn` puts out [head, (q, k, v), D]: a rank's heads lie together.

    If tp does not divide n_head, extra heads of zeros are added: their output is zero and they never get a gradient.
    """

    def __init__(self, cfg: ModelConfig, layer: int, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = cfg.dropout
        self.mesh = mesh
        n_head = padded_n_head(cfg.n_head, mesh.tp)
        self.heads = n_head // mesh.tp
        self.backends = sdpa_backends(mesh.device)
        self.c_attn = column_linear(cfg.n_embd, 3 * n_head * cfg.head_dim, mesh, sequence_parallel)
        self.c_proj = row_linear(n_head * cfg.head_dim, cfg.n_embd, mesh, sequence_parallel)

    def forward(self, x_TBC: Tensor, mask: Mask = None, cache: Cache | None = None) -> Tensor:
        """`mask`: what `layer_masks` says of these positions."""
        qkv_TBH3D = self.c_attn(x_TBC).unflatten(-1, (self.heads, 3, -1))
        q_BHTD, k_BHTD, v_BHTD = qkv_TBH3D.permute(3, 1, 2, 0, 4).unbind()
        if cache is not None:
            k_BHTD, v_BHTD = cache.extend(self.layer, k_BHTD, v_BHTD)
        if isinstance(mask, BlockMask):
            y_BHTD = flex.attend(q_BHTD, k_BHTD, v_BHTD, mask)
        else:
            y_BHTD = self._attend(q_BHTD, k_BHTD, v_BHTD, mask)
        return self.c_proj(y_BHTD.permute(2, 0, 1, 3).flatten(2))

    def _attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        is_causal = bias is None and q_BHTD.shape[2] == k_BHSD.shape[2]
        # The choice stands here, inside the graph: around a compiled model it is not in the compile cache's key, and a
        # cached graph would keep the kernel of another run.
        kernels = self.backends if is_causal else None
        with (
            tp_local_randomness(self.mesh) if dropout and self.mesh.tp > 1 else nullcontext(),
            sdpa_kernel(kernels, set_priority=True) if kernels else nullcontext(),
        ):
            return F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, attn_mask=bias, dropout_p=dropout, is_causal=is_causal
            )
