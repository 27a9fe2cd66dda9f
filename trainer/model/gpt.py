"""The GPT decoder: token and position embeddings, blocks, and a head tied to the token embedding.

Legend: B batch, T time (under sequence parallelism: this rank's part of it, between the linears), C n_embd,
V vocabulary (on this rank, padded, where it is time-first; true and whole in `logits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.errors import UserError
from trainer.config.model import ModelConfig, Norm
from trainer.config.parallel import Recompute
from trainer.distributed.mesh import Mesh
from trainer.model.attention import Cache, Mask, layer_masks
from trainer.model.block import Block, Dropout, layer_norm, mark_sequence_parallel
from trainer.model.linear import TiedEmbedding, gather_vocab, split_sequence, tied_embedding
from trainer.model.loss import token_loss
from trainer.model.mask import segment_positions
from trainer.model.specs import ParamSpec, specs


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
        self.cfg = cfg
        self.mesh = mesh
        self.recompute = recompute
        self.inference = False  # inside `for_inference`
        self.sequence_parallel = split = sequence_parallel and mesh.tp > 1
        self.wte = tied_embedding(cfg.vocab_size, cfg.n_embd, mesh, split)
        self.wpe = nn.Embedding(cfg.n_ctx, cfg.n_embd)
        mark_sequence_parallel(self.wpe, split)
        self.drop = Dropout(cfg.dropout, mesh, split)
        selective = recompute is Recompute.selective
        self.h = nn.ModuleList(Block(cfg, layer, mesh, split, selective) for layer in range(cfg.n_layer))
        self.ln_f = layer_norm(cfg, split) if cfg.norm is Norm.pre else nn.Identity()
        self.run_block = run_block  # compile.compile_model replaces both
        self.run_loss = run_loss

    def forward(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(self, *args)`, such as an objective's sums: DeepSpeed's hooks surround a module's forward."""
        return function(self, *args)

    def freeze(self, blocks: int) -> None:
        """Keep the weights of the first blocks as they are: their gradient becomes 0, and they do not decay.

        They stay trained parameters with moments of 0, so that every wrapper and checkpoint is as without it.
        """
        for p in self.h[:blocks].parameters():
            p.register_hook(torch.zeros_like)
            p.frozen = True  # type: ignore[attr-defined]

    def specs(self) -> dict[str, ParamSpec]:
        """Every parameter by name, with those of heads and other trunks that are attached to this one."""
        own = specs(self.cfg, self.mesh.tp)
        attached: dict[str, Any] = {name: child for name, child in self.named_children() if hasattr(child, "specs")}
        return own | {f"{name}.{key}": spec for name, child in attached.items() for key, spec in child.specs().items()}

    def touch(self) -> Tensor:
        """A scalar whose gradient reaches every parameter of the trunk, at the least cost."""
        device = next(self.parameters()).device
        return self.hidden(torch.zeros(1, self.mesh.tp, dtype=torch.int64, device=device)).sum()

    def logits(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        *,
        index_B: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each; with `index_B` after one token of each row alone, [B, 1, V].

        With `segment_ids_BT` (without a cache) each segment is computed as if it stood alone.
        """
        x_TBC = self.hidden(tokens_BT, cache, segment_ids_BT)
        if index_B is not None:  # under sequence parallelism only inside `for_inference`
            x_TBC = x_TBC[index_B, torch.arange(len(index_B), device=x_TBC.device)][None]
        logits_TBV = self.wte(x_TBC, head=True)
        return gather_vocab(logits_TBV, self.mesh)[..., : self.cfg.vocab_size].transpose(0, 1)

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """Forwards inside take texts of any length on all layouts: no gradient, dropout, graph or split sequence."""
        split, training = self.sequence_parallel, self.training
        self._set_inference(True, split=False)
        self.eval()
        try:
            with torch.no_grad():  # not inference_mode: ZeRO-3 allocates weights inside that training uses afterwards
                yield
        finally:
            self._set_inference(False, split)
            self.train(training)

    def _set_inference(self, inference: bool, split: bool) -> None:
        self.inference = inference
        if split != self.sequence_parallel:
            self.sequence_parallel = split
            split_sequence(self, split)

    def hidden(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        segment_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states x_TBC after the last block and norm: the head's input.

        With `cache` the tokens continue what each row of it holds, and it grows by them. With `segment_ids_BT` each
        segment of a row is computed as if it stood alone, with `positions_BT` too as if it stood after segment 0, at
        these positions (all below n_ctx); such a row may be longer than n_ctx.
        """
        if cache is not None and segment_ids_BT is not None:
            raise ValueError("a cache continues one text a row: it takes no segment_ids_BT")
        T = tokens_BT.shape[1]
        S = T + (cache.longest if cache is not None else 0)
        if self.cfg.n_ctx < S and positions_BT is None:
            raise UserError(f"{S} tokens are more than model.n_ctx={self.cfg.n_ctx}: give fewer")
        masked_BT = positions_BT  # where attention does not see what follows from a token's place in the row
        if cache is not None:
            positions_BT = cache.positions(T, tokens_BT.device)
            masked_BT = positions_BT if len(positions_BT) > 1 else None
        elif segment_ids_BT is None:
            positions_BT = torch.arange(T, device=tokens_BT.device)[None]
        elif positions_BT is None:
            positions_BT = segment_positions(segment_ids_BT)
        positions_TB = self._part(
            positions_BT.t()
        )  # before the embedding, which says less of a T that tp does not divide
        x_TBC = self.drop(self.wte(tokens_BT) + self.wpe(positions_TB))
        masks = layer_masks(
            self.cfg,
            T,
            S,
            x_TBC,
            segment_ids_BT,
            masked_BT,
            dropout=self.cfg.dropout if self.training else 0.0,
            any_length=self.inference or cache is not None,
        )
        x_TBC = self._blocks(x_TBC, masks, cache)
        if cache is not None:
            cache.grow(*tokens_BT.shape)
        return self.ln_f(x_TBC)

    def _blocks(self, x_TBC: Tensor, masks: dict[str, Mask], cache: Cache | None) -> Tensor:
        recompute = self.recompute is Recompute.full and self.training and cache is None
        keep_rng = self.cfg.dropout > 0
        for layer, block in enumerate(self.h):
            mask = masks[self.cfg.kind(layer)]
            if recompute:
                x_TBC = checkpoint(self.run_block, block, x_TBC, mask, use_reentrant=False, preserve_rng_state=keep_rng)
            elif cache is None and not self.inference:
                x_TBC = self.run_block(block, x_TBC, mask)
            else:
                x_TBC = block(x_TBC, mask, cache)
        return x_TBC

    def _part(self, positions_TB: Tensor) -> Tensor:
        """This rank's part of T under sequence parallelism, else all of it."""
        T, tp = len(positions_TB), self.mesh.tp
        if not self.sequence_parallel:
            return positions_TB
        if T % tp:
            raise UserError(f"parallel.sequence_parallel splits {T} tokens, which parallel.tp={tp} does not divide")
        return positions_TB.chunk(tp)[self.mesh.tp_rank]


def run_block(block: nn.Module, x_TBC: Tensor, mask: Mask) -> Tensor:
    """A function of the block, so that a graph of it takes the parameters of any layer."""
    y_TBC: Tensor = block(x_TBC, mask)
    return y_TBC


def run_loss(wte: TiedEmbedding, x_TBC: Tensor, labels_TB: Tensor, mesh: Mesh) -> Tensor:
    """The head and the loss in one function, so that logits live nowhere else."""
    return token_loss(wte(x_TBC, head=True), labels_TB, mesh, wte.n_true)


def is_frozen(p: nn.Parameter) -> bool:
    """Return True for a weight that `GPT.freeze` keeps."""
    return getattr(p, "frozen", False)
