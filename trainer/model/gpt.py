"""The GPT decoder: token and position embeddings, blocks, and a head tied to the token embedding.

Legend: B batch, T time (under sequence parallelism: this rank's part of it, between the linears), C n_embd,
V vocabulary (on this rank, padded, where it is time-first; true and whole in `logits`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.config import UserError
from trainer.config import ModelConfig, Norm, Recompute
from trainer.loss import token_loss
from trainer.model.attention import KVCache
from trainer.model.block import Block, Dropout, layer_norm, mark_sequence_parallel
from trainer.model.linear import TiedEmbedding, gather_vocab
from trainer.parallel import Mesh

__all__ = ["GPT", "KVCache"]


class GPT(nn.Module):
    """Weights are empty until `init.initialise` or a checkpoint fills them."""

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: Mesh,
        *,
        sequence_parallel: bool = False,
        recompute: Recompute = Recompute.none,
    ) -> None:
        super().__init__()
        self.cfg, self.mesh, self.recompute = cfg, mesh, recompute
        self.sequence_parallel = split = sequence_parallel and mesh.tp > 1
        self.wte = TiedEmbedding(cfg.vocab_size, cfg.n_embd, mesh, split)
        self.wpe = nn.Embedding(cfg.n_ctx, cfg.n_embd)
        mark_sequence_parallel(self.wpe, split)
        self.drop = Dropout(cfg.dropout, mesh, split)
        self.h = nn.ModuleList(Block(cfg, layer, mesh, split) for layer in range(cfg.n_layer))
        self.ln_f = layer_norm(cfg, split) if cfg.norm is Norm.pre else nn.Identity()

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Sum of -log p(label) in nats over the labels that are not IGNORE: an fp32 scalar, equal on all tp ranks."""
        logits_TBV = self.wte(self._hidden(tokens_BT, None), head=True)
        return token_loss(logits_TBV, labels_BT.t(), self.mesh)

    def logits(self, tokens_BT: Tensor, cache: KVCache | None = None, *, last: bool = False) -> Tensor:
        """Logits [B, T, V] of the token after each; `last`: after the last alone, [B, 1, V] (no sequence parallelism).

        With `cache` the tokens continue what it holds, and it grows by them.
        """
        x_TBC = self._hidden(tokens_BT, cache)
        logits_TBV = self.wte(x_TBC[-1:] if last else x_TBC, head=True)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return gather_vocab(logits_TBV, self.mesh)[..., : self.cfg.vocab_size].transpose(0, 1)

    def _hidden(self, tokens_BT: Tensor, cache: KVCache | None) -> Tensor:
        positions_T = self._positions(tokens_BT, cache)
        x_TBC = self.drop(self.wte(tokens_BT) + self.wpe(positions_T)[:, None])
        recompute = self.recompute is Recompute.full and self.training and cache is None
        for block in self.h:
            if recompute:
                x_TBC = checkpoint(block, x_TBC, use_reentrant=False, preserve_rng_state=self.cfg.dropout > 0)
            else:
                x_TBC = block(x_TBC, cache)
        return self.ln_f(x_TBC)

    def _positions(self, tokens_BT: Tensor, cache: KVCache | None) -> Tensor:
        start, T, tp = cache.length if cache else 0, tokens_BT.shape[1], self.mesh.tp
        if start + T > self.cfg.n_ctx:
            raise UserError(f"{start + T} tokens are more than model.n_ctx={self.cfg.n_ctx}: give fewer")
        if not self.sequence_parallel:
            return torch.arange(start, start + T, device=tokens_BT.device)
        if T % tp:
            raise UserError(f"parallel.sequence_parallel splits {T} tokens, which parallel.tp={tp} does not divide")
        start += self.mesh.tp_rank * (T // tp)
        return torch.arange(start, start + T // tp, device=tokens_BT.device)
