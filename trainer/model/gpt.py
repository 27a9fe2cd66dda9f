"""The GPT decoder: token and position embeddings, blocks, and a head tied to the token embedding.

Legend: B batch, T time (under sequence parallelism: this rank's part of it, between the linears), C n_embd,
V vocabulary (on this rank, padded, where it is time-first; true and whole in `logits`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.errors import UserError
from trainer.config.model import ModelConfig, Norm
from trainer.config.parallel import Recompute
from trainer.distributed.mesh import Mesh
from trainer.model.attention import KVCache, Mask, layer_masks
from trainer.model.block import Block, Dropout, layer_norm, mark_sequence_parallel
from trainer.model.linear import TiedEmbedding, gather_vocab
from trainer.model.loss import token_loss
from trainer.model.mask import segment_positions

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
        selective = recompute is Recompute.selective
        self.h = nn.ModuleList(Block(cfg, layer, mesh, split, selective) for layer in range(cfg.n_layer))
        self.ln_f = layer_norm(cfg, split) if cfg.norm is Norm.pre else nn.Identity()
        self.run_block, self.run_loss = run_block, run_loss  # compiled.compile_model replaces them

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
        """Sum of -log p(label) in nats over the labels that are not IGNORE: an fp32 scalar, equal on all tp ranks.

        With `segment_ids_BT`, which never fall along a row, each segment is computed as if it stood alone.
        """
        return self.run_loss(self.wte, self._hidden(tokens_BT, None, segment_ids_BT), labels_BT.t(), self.mesh)

    def logits(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        *,
        last: bool = False,
        segment_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each; `last`: after the last alone, [B, 1, V] (no sequence parallelism).

        With `cache` the tokens continue what it holds, and it grows by them. With `segment_ids_BT` (without a cache)
        each segment is computed as if it stood alone.
        """
        x_TBC = self._hidden(tokens_BT, cache, segment_ids_BT)
        logits_TBV = self.wte(x_TBC[-1:] if last else x_TBC, head=True)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return gather_vocab(logits_TBV, self.mesh)[..., : self.cfg.vocab_size].transpose(0, 1)

    def _hidden(self, tokens_BT: Tensor, cache: KVCache | None, segment_ids_BT: Tensor | None) -> Tensor:
        if cache is not None and segment_ids_BT is not None:
            raise ValueError("a KVCache continues one text: it takes no segment_ids_BT")
        positions_TB = self._positions(tokens_BT, cache, segment_ids_BT)
        x_TBC = self.drop(self.wte(tokens_BT) + self.wpe(positions_TB))
        T = tokens_BT.shape[1]
        S = T + (cache.length if cache else 0)
        dropout = self.cfg.dropout if self.training else 0.0
        masks = layer_masks(self.cfg, T, S, x_TBC, segment_ids_BT, dropout=dropout, cached=cache is not None)
        recompute = self.recompute is Recompute.full and self.training and cache is None
        keep_rng = self.cfg.dropout > 0
        for layer, block in enumerate(self.h):
            mask = masks[self.cfg.kind(layer)]
            if recompute:
                x_TBC = checkpoint(self.run_block, block, x_TBC, mask, use_reentrant=False, preserve_rng_state=keep_rng)
            elif cache is None:
                x_TBC = self.run_block(block, x_TBC, mask)
            else:
                x_TBC = block(x_TBC, mask, cache)
        return self.ln_f(x_TBC)

    def _positions(self, tokens_BT: Tensor, cache: KVCache | None, segment_ids_BT: Tensor | None) -> Tensor:
        """[T, B], or [T, 1] where all rows have the same; under sequence parallelism this rank's part of T."""
        start, T, tp = cache.length if cache else 0, tokens_BT.shape[1], self.mesh.tp
        if start + T > self.cfg.n_ctx:
            raise UserError(f"{start + T} tokens are more than model.n_ctx={self.cfg.n_ctx}: give fewer")
        if segment_ids_BT is None:
            positions_TB = torch.arange(start, start + T, device=tokens_BT.device)[:, None]
        else:
            positions_TB = segment_positions(segment_ids_BT).t()
        if not self.sequence_parallel:
            return positions_TB
        if T % tp:
            raise UserError(f"parallel.sequence_parallel splits {T} tokens, which parallel.tp={tp} does not divide")
        return positions_TB.chunk(tp)[self.mesh.tp_rank]


def run_block(block: nn.Module, x_TBC: Tensor, mask: Mask) -> Tensor:
    """A function of the block, so that a graph of it takes the parameters of any layer."""
    y_TBC: Tensor = block(x_TBC, mask)
    return y_TBC


def run_loss(wte: nn.Module, x_TBC: Tensor, labels_TB: Tensor, mesh: Mesh) -> Tensor:
    """The head and the loss: together they are where logits live."""
    return token_loss(wte(x_TBC, head=True), labels_TB, mesh)
