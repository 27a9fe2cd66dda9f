"""ZeRO-1: DeepSpeed's BF16_Optimizer, in fp32 too, with its work for each parameter done once for each group.

Its buffers, partitions and hooks into DeepSpeed's engine stay as they are. Replaced is the work between a
backward and the update, which for GPT-2 XL's 580 parameters was some 3,500 launches and 18 passes over the gradients
(docs/benchmarks/engine_work.md). Here one step is: gradients into the fp32 buffer, by copy for the first micro step and
by addition for the others; one reduce-scatter a group; one norm; clipping inside of fused AdamW; one cast a group. In
fp32 the masters are the weights themselves, and nothing is cast.

Names of BF16_Optimizer in this file: `bf16_groups`, `bf16_groups_flat`, `bf16_partitioned_groups`,
`fp32_groups_gradients`, `fp32_groups_gradients_flat`, `fp32_groups_gradient_flat_partition`,
`fp32_groups_flat_partition`, `real_dp_process_group`, `update_lp_params`, `_global_grad_norm`, `clip_grad`; of
DeepSpeed's engine: `enable_backward_allreduce`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed_api import BF16_Optimizer

ROW = 2048  # numbers in one partial sum of squares


class FlatZero1(BF16_Optimizer):
    """A BF16_Optimizer that `flatten` has taken over. Gradients are summed over dp, not averaged."""

    mesh: Mesh
    into: list[list[Tensor]]  # by group: the buffer of each parameter's accumulated gradient, in its shape
    counted: list[Tensor]  # the gradients of this rank that count in the global norm: each element on one rank
    accumulated: bool  # the buffer holds gradients of this step
    shared: bool  # fp32: the masters are the weights' own memory

    def backward_prologue(self) -> None:
        """Nothing: `update_hp_grads` leaves no gradient behind."""

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """After each backward: its gradients into the fp32 buffer."""
        for group, into in zip(self.bf16_groups, self.into, strict=True):
            pairs = [(to, p.grad) for to, p in zip(into, group, strict=True) if p.grad is not None]
            targets, grads = [to for to, _ in pairs], [grad for _, grad in pairs]
            if self.accumulated:
                torch._foreach_add_(targets, grads)
            else:
                if len(pairs) < len(group):
                    torch._foreach_zero_(into)
                torch._foreach_copy_(targets, grads)
            for p in group:
                p.grad = None
        self.accumulated = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Reduce, norm, update. AdamW asks its gate, and divides by `grad_scale` while it reads the gradients."""
        self.accumulated = False
        groups = (self.fp32_groups_gradients_flat, self.fp32_groups_gradient_flat_partition, self.real_dp_process_group)
        for flat, part, dp_group in zip(*groups, strict=True):
            if self.mesh.dp > 1:
                dist.reduce_scatter_tensor(part, flat, group=dp_group)
        self._global_grad_norm = norm = self._norm()
        if self.clip_grad > 0:
            self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1.0)
        self.optimizer.step()
        if self.mesh.dp > 1 or not self.shared:
            self.update_lp_params()

    def _norm(self) -> Tensor:
        """The L2 norm of the whole gradient, fp32 scalar, the same on every rank."""
        squares = torch.stack([vector_norm(x) for x in self.counted]).square().sum()
        for size, group in ((self.mesh.dp, self.mesh.dp_group), (self.mesh.tp, self.mesh.tp_group)):
            if size > 1:
                dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: the first micro step overwrites the buffer."""


def flatten(engine: Any, mesh: Mesh) -> None:
    """Take over a DeepSpeed engine's BF16_Optimizer."""
    zero = engine.optimizer
    if type(zero) is not BF16_Optimizer:
        raise RuntimeError(f"DeepSpeed made a {type(zero)} where flat_zero1.py knows BF16_Optimizer")
    zero.__class__ = FlatZero1
    zero.mesh = mesh
    zero.accumulated = False
    zero.shared = zero.bf16_groups_flat[0].dtype == torch.float32
    zero.into = [
        [flat.view(p.shape) for flat, p in zip(flats, group, strict=True)]
        for flats, group in zip(zero.fp32_groups_gradients, zero.bf16_groups, strict=True)
    ]
    parts = zero.fp32_groups_gradient_flat_partition
    weights = [group[mesh.dp_rank] for group in zero.bf16_partitioned_groups]
    for master, part, weight, group in zip(
        zero.fp32_groups_flat_partition, parts, weights, zero.bf16_groups, strict=True
    ):
        master.grad = part
        if zero.shared:
            _share(master, weight, group)
    zero.counted = list(parts) if mesh.tp_rank == 0 else _split_parts(zero)
    engine.enable_backward_allreduce = False


def _share(master: Tensor, weight: Tensor, group: Iterable[Any]) -> None:
    """Give the weights' own memory to a master, and free the copy that it was."""
    master.data = weight
    for mapping in (p._hp_mapping for p in group if p._hp_mapping is not None):
        mapping.hp_fragment = weight.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)


def _split_parts(zero: Any) -> list[Tensor]:
    """The fragments of this rank's partitions that no other tp rank holds: without the replicated parameters."""
    partitions = zero.fp32_groups_gradient_flat_partition
    fragments = [
        flat.narrow(0, p._hp_mapping.hp_fragment_address.start, p._hp_mapping.hp_fragment_address.numel)
        for flat, group in zip(partitions, zero.bf16_groups, strict=True)
        for p in group
        if p._hp_mapping is not None and getattr(p, "tensor_model_parallel", False)
    ]
    return fragments or [partitions[0][:0]]


def vector_norm(x: Tensor) -> Tensor:
    """Of a vector, fp32 scalar; row by row, since torch loses digits over a long one on a CPU."""
    while x.numel() > ROW:
        whole = x.numel() // ROW * ROW
        x = torch.cat([torch.linalg.vector_norm(x[:whole].view(-1, ROW), dim=1), x[whole:]])
    return torch.linalg.vector_norm(x)
