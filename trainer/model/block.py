"""One decoder block: attention and MLP, each with its residual.

Legend: B batch, T time (under sequence parallelism: this rank's part of it), C n_embd.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.model import Gelu, ModelConfig, Norm
from trainer.distributed.mesh import Mesh
from trainer.distributed.randomness import tp_local_randomness
from trainer.model.attention import Attention, Cache, Mask
from trainer.model.linear import column_linear, row_linear


class Dropout(nn.Module):
    """Dropout on x_TBC: equal on all tp ranks, or each rank's own where it holds its own part of the sequence."""

    def __init__(self, p: float, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__()
        self.p = p
        self.mesh = mesh
        self.local = sequence_parallel

    def forward(self, x_TBC: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x_TBC
        if not self.local:
            return F.dropout(x_TBC, self.p)
        with tp_local_randomness(self.mesh):
            return F.dropout(x_TBC, self.p)


def mark_sequence_parallel(module: nn.Module, sequence_parallel: bool) -> None:
    """Mark replicated parameters by whether each tp rank's gradient covers only its part of the sequence."""
    for p in module.parameters():
        p.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


def layer_norm(cfg: ModelConfig, sequence_parallel: bool) -> nn.LayerNorm:
    norm = nn.LayerNorm(cfg.n_embd, eps=cfg.layer_norm_eps)
    mark_sequence_parallel(norm, sequence_parallel)
    return norm


APPROXIMATE = {Gelu.tanh: "tanh", Gelu.exact: "none"}  # in torch's words


class MLP(nn.Module):
    """C -> 4 C -> C with GELU."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, sequence_parallel: bool, selective: bool) -> None:
        super().__init__()
        self.selective = selective
        self.gelu = partial(F.gelu, approximate=APPROXIMATE[cfg.gelu])
        self.c_fc = column_linear(cfg.n_embd, 4 * cfg.n_embd, mesh, sequence_parallel)
        self.c_proj = row_linear(4 * cfg.n_embd, cfg.n_embd, mesh, sequence_parallel)

    def forward(self, x_TBC: Tensor) -> Tensor:
        h_TB4C = self.c_fc(x_TBC)
        y_TB4C = self.gelu(h_TB4C)
        with making_again(y_TB4C, self.gelu, h_TB4C, self.selective):
            return self.c_proj(y_TB4C)


class Block(nn.Module):
    """Pre-norm (GPT-2, GPT-3): x + f(ln(x)). Post-norm (GPT-1): ln(x + f(x)).

    `selective`: what LayerNorm and GELU put out is made again in backward, not kept (`making_again`).
    """

    def __init__(
        self, cfg: ModelConfig, layer: int, mesh: Mesh, sequence_parallel: bool, selective: bool = False
    ) -> None:
        super().__init__()
        self.selective = selective
        self.pre_norm = cfg.norm is Norm.pre
        self.ln_1 = layer_norm(cfg, sequence_parallel)
        self.attn = Attention(cfg, layer, mesh, sequence_parallel)
        self.ln_2 = layer_norm(cfg, sequence_parallel)
        self.mlp = MLP(cfg, mesh, sequence_parallel, selective)
        self.drop = Dropout(cfg.dropout, mesh, sequence_parallel)

    def forward(self, x_TBC: Tensor, mask: Mask = None, cache: Cache | None = None) -> Tensor:
        if not self.pre_norm:
            r_TBC = x_TBC + self.drop(self.attn(x_TBC, mask, cache))
            h_TBC = self.ln_1(r_TBC)
            with making_again(h_TBC, self.ln_1, r_TBC, self.selective):
                return self.ln_2(h_TBC + self.drop(self.mlp(h_TBC)))
        h_TBC = self.ln_1(x_TBC)
        with making_again(h_TBC, self.ln_1, x_TBC, self.selective):
            r_TBC = x_TBC + self.drop(self.attn(h_TBC, mask, cache))
        h_TBC = self.ln_2(r_TBC)
        with making_again(h_TBC, self.ln_2, r_TBC, self.selective):
            return r_TBC + self.drop(self.mlp(h_TBC))


def making_again(y: Tensor, make: Callable[[Tensor], Tensor], x: Tensor, on: bool) -> AbstractContextManager[object]:
    """Selective recompute: backward gets `y` = make(x), kept by operations inside, from `make` again; all else is kept.

    `torch.utils.checkpoint` around the function and the linear that uses it would do as much at tp = 1. At tp > 1 it
    would run megatron-core's linears again, products and gathers of the sequence included; this never does.

    `make` draws no random numbers, and keeps `x` for its own backward anyway (LayerNorm, GELU): so `y` is all that is
    saved. A compiled graph is left alone: there `engine/compile.py` makes the compiler do the same.
    """
    if not on or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    memory = y.untyped_storage().data_ptr()  # `y` lives as long as the caller is inside: no other tensor lies there

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if kept.untyped_storage().data_ptr() != memory:
            return kept
        return kept.shape, kept.stride(), int(kept.storage_offset())

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make(x).as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
