"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalised, for the blocks' matrices.

DeepSpeed has a Muon of its own. It orthogonalises while gradients are partitioned: the norm that it reports and clips
is the update's, and the momentum changes before a step can be refused. Also, its BF16_Optimizer accepts it only without
an mpu. This one is an optimizer like any other: in every wrapper it sees the
clipped gradient, behind the gate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config.optim import OptimConfig
from trainer.distributed.mesh import Mesh
from trainer.engine.fragments import Partition
from trainer.engine.optimizers import GatedAdamW, param_groups

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic, and five steps of it: Jordan's
STEPS = 5


@dataclass(frozen=True)
class Matrix:
    """A parameter of which this rank holds elements [start, start + length), at `offset` of a flat of ZeRO's.

    `parts`: matrices that are orthogonalised apart (c_attn's queries, keys and values). `split`: over the dp ranks.
    """

    shape: tuple[int, int]
    parts: tuple[int, int] | None  # heads, 3
    split: bool
    offset: int
    start: int
    length: int


class GatedMuon(GatedAdamW):
    """Muon for the groups that have a momentum, AdamW for the others, behind the same gate."""

    mesh: Mesh
    dtype: torch.dtype  # of Newton-Schulz' products
    matrices: dict[Tensor, list[Matrix]]  # by flat, in the same order on all dp ranks

    def attach(
        self, partitions: Iterable[Partition], mesh: Mesh, n_heads: Mapping[str, int], dtype: torch.dtype
    ) -> None:
        """Learn where the matrices lie, after ZeRO has partitioned. Collective over dp.

        `n_heads`: attention heads of each trunk, by the prefix of its parameters' names.
        """
        self.mesh = mesh
        self.dtype = dtype
        self.matrices = {}
        mine = [p for p in partitions if is_matrix(p.name, p.shape)]
        lengths: list[Any] = [None] * mesh.dp
        dist.all_gather_object(lengths, [p.length for p in mine], group=mesh.dp_group)
        only = [flat for group in self.param_groups if "momentum" in group for flat in group["params"]]
        for p, held in zip(mine, zip(*lengths, strict=True), strict=True):
            rows, columns = p.shape
            prefix, _, layer = p.name.rpartition("h.")
            parts = (n_heads[prefix], 3) if layer.endswith("c_attn.weight") else None
            matrix = Matrix((rows, columns), parts, max(held) < rows * columns, p.offset, p.start, p.length)
            flat = only[0] if p.flat is None else p.flat
            if matrix.split or matrix.length:
                self.matrices.setdefault(flat, []).append(matrix)

    @torch.no_grad()
    def update(self) -> None:
        held = {}
        for group in self.param_groups:
            for flat in group["params"] if "momentum" in group else ():
                if flat.grad is not None:
                    self._update_flat(flat, flat.grad, group)
                    held[flat], flat.grad = flat.grad, None  # AdamW passes by what has no gradient
        super().update()
        for flat, grad in held.items():
            flat.grad = grad

    def _update_flat(self, flat: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if self.grad_scale is not None:
            grad = grad / self.grad_scale
        momentum = self.state[flat]["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(momentum, group["momentum"])
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for m in self.matrices.get(flat, ()):
            mine = nesterov[m.offset : m.offset + m.length]
            whole = self._gather(mine, m) if m.split else mine
            if m.length:
                update = orthogonal(whole.view(m.shape), m.parts, self.dtype).reshape(-1)
                flat[m.offset : m.offset + m.length].sub_(update[m.start : m.start + m.length], alpha=group["lr"])

    def _gather(self, mine: Tensor, m: Matrix) -> Tensor:
        whole = mine.new_zeros(m.shape[0] * m.shape[1])
        whole[m.start : m.start + m.length] = mine
        dist.all_reduce(whole, group=self.mesh.dp_group)
        return whole


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return True for the blocks' matrices of any trunk; embeddings, heads, biases and gains are AdamW's."""
    return re.match(r"(\w+\.)*h\.\d+\.", name) is not None and len(shape) == 2


def orthogonal(x: Tensor, parts: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """An update of the shape of `x` [out, in], of singular values near 1 and times sqrt(max(1, out / in)), fp32."""
    if parts is not None:  # rows are [head, (q, k, v), D]: each of the three is a matrix
        heads, three = parts
        qkv = x.view(heads, three, -1, x.shape[1]).transpose(0, 1)
        done = torch.stack([orthogonal(y.reshape(-1, x.shape[1]), None, dtype) for y in qkv])
        return done.view(three, heads, -1, x.shape[1]).transpose(0, 1).reshape(x.shape)
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[0] > x.shape[1]
    y = (x.mT if tall else x).to(dtype)
    y = y / (y.norm() + 1e-7)
    for _ in range(STEPS):
        square = y @ y.mT
        y = torch.addmm(y, b * square + c * (square @ square), y, beta=a)
    scale: float = max(1.0, x.shape[0] / x.shape[1]) ** 0.5
    return (y.mT if tall else y).float() * scale


def muon(model: nn.Module, cfg: OptimConfig) -> GatedMuon:
    """Matrices of the blocks under Muon, embeddings under AdamW with weight decay, the rest without."""
    assert cfg.muon_lr is not None and cfg.momentum is not None  # OptimConfig has seen to it
    named = list(model.named_parameters())
    matrices = [p for name, p in named if is_matrix(name, tuple(p.shape))]
    others = [(name, p) for name, p in named if not is_matrix(name, tuple(p.shape))]
    ratio = cfg.muon_lr / cfg.lr
    first = {"params": matrices, "weight_decay": cfg.weight_decay, "momentum": cfg.momentum, "lr_ratio": ratio}
    groups = [first, *param_groups(others, cfg.weight_decay)]
    return GatedMuon(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
