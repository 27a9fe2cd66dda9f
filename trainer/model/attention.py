"""Causal self-attention over the heads of this rank, and the cache that generation keeps.

Legend: B batch, T time, S time with what the cache holds, C n_embd, H heads on this rank, D head dim.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.arithmetic import padded_n_head
from trainer.config import ModelConfig
from trainer.model.linear import ColumnLinear, RowLinear
from trainer.parallel import Mesh, tp_local_randomness


class KVCache:
    """Keys and values of every position seen, so that generation feeds each token once."""

    def __init__(self) -> None:
        self.length = 0  # positions that every layer holds
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor, n_ctx: int) -> tuple[Tensor, Tensor]:
        """Append to `layer` and return all it holds, [B, H, S, D] each."""
        if layer not in self._layers:
            B, H, _, D = k_BHTD.shape
            self._layers[layer] = (k_BHTD.new_empty(B, H, n_ctx, D), v_BHTD.new_empty(B, H, n_ctx, D))
        end = self.length + k_BHTD.shape[2]
        for held, new in zip(self._layers[layer], (k_BHTD, v_BHTD), strict=True):
            held[:, :, self.length : end] = new
        k, v = self._layers[layer]
        return k[:, :, :end], v[:, :, :end]


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(D)) v over the past. `c_attn` puts out [head, (q, k, v), D]: a rank's heads lie together.

    Where tp does not divide n_head, heads of zeros fill up: they put out zero and get no gradient, for ever.
    """

    def __init__(self, cfg: ModelConfig, layer: int, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__()
        self.layer, self.n_ctx, self.dropout, self.mesh = layer, cfg.n_ctx, cfg.dropout, mesh
        n_head = padded_n_head(cfg.n_head, mesh.tp)
        self.heads = n_head // mesh.tp
        self.c_attn = ColumnLinear(cfg.n_embd, 3 * n_head * cfg.head_dim, mesh, sequence_parallel)
        self.c_proj = RowLinear(n_head * cfg.head_dim, cfg.n_embd, mesh, sequence_parallel)

    def forward(self, x_TBC: Tensor, cache: KVCache | None = None) -> Tensor:
        qkv_TBH3D = self.c_attn(x_TBC).unflatten(-1, (self.heads, 3, -1))
        q_BHTD, k_BHTD, v_BHTD = qkv_TBH3D.permute(3, 1, 2, 0, 4).unbind()
        if cache is not None:
            k_BHTD, v_BHTD = cache.extend(self.layer, k_BHTD, v_BHTD, self.n_ctx)
        y_BHTD = self._attend(q_BHTD, k_BHTD, v_BHTD)
        return self.c_proj(y_BHTD.permute(2, 0, 1, 3).flatten(2))

    def _attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        T, S = q_BHTD.shape[2], k_BHSD.shape[2]
        past_TS = None  # not needed by a square of attention, nor by the last token alone
        if T not in (1, S):
            past_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril(S - T)
        with tp_local_randomness(self.mesh) if dropout and self.mesh.tp > 1 else nullcontext():
            return F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, attn_mask=past_TS, dropout_p=dropout, is_causal=T == S
            )
