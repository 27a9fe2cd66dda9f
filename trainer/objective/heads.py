"""Heads on a trunk's hidden states, such as a reward's or a class's score.

Legend: T time (under sequence parallelism T / tp on each rank), B batch, C n_embd, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.model import ModelConfig
from trainer.config.parallel import Recompute
from trainer.distributed.mesh import Mesh
from trainer.model.gpt import GPT
from trainer.model.specs import ParamSpec


class Head(nn.Module):
    """A linear layer from C to K outputs, whole on every tp rank. To be an attribute `head` of the trunk's module.

    Its parameters are replicated and carry no marks: each tp rank sees all hidden states and has the whole gradient.
    `std`: of its first weights.
    """

    def __init__(
        self, n_embd: int, n_out: int, mesh: Mesh, *, std: float = 0.02, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(n_out, n_embd))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.mesh = mesh
        self.sequence_parallel = sequence_parallel and mesh.tp > 1

    def forward(
        self, x_TBC: Tensor, at_B: Tensor | None = None, merge: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        """Scores [T, B, K] in fp32, of all T also where `x_TBC` is this rank's part.

        With `at_B` the scores of `merge(x_BC)`, x_BC the states of one token of each row. Products are in fp32 too: a
        bf16 score of 5 would be right to 0.02, which is as much as two answers may differ by.
        """
        if self.sequence_parallel:
            x_TBC = gather_sequence(x_TBC, self.mesh)
        if at_B is not None:
            x_TBC = merge(x_TBC[at_B, torch.arange(len(at_B), device=at_B.device)])
        return F.linear(x_TBC.float(), self.weight.float(), self.bias.float())

    def specs(self) -> dict[str, ParamSpec]:
        """Every parameter by name."""
        return {name: ParamSpec(tuple(p.shape), tuple(p.shape), None) for name, p in self.named_parameters()}

    def touch(self) -> Tensor:
        """A scalar whose gradient reaches every parameter, at the least cost."""
        return self(self.bias.new_zeros(1, 1, self.weight.shape[-1])).sum()


class WithHead(GPT):
    """A trunk and a head on its hidden states: `head.*`. The first `frozen` blocks keep their weights."""

    head: Head

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: Mesh,
        *,
        n_out: int,
        std: float = 0.02,
        frozen: int = 0,
        sequence_parallel: bool = False,
        recompute: Recompute = Recompute.none,
    ) -> None:
        super().__init__(cfg, mesh, sequence_parallel=sequence_parallel, recompute=recompute)
        self.freeze(frozen)
        self.head = Head(cfg.n_embd, n_out, mesh, std=std, sequence_parallel=sequence_parallel)


class _GatherSequence(torch.autograd.Function):
    """[T / tp, B, C] -> [T, B, C]; in backward each rank keeps its rows.

    Every tp rank computes the same from the gathered states, so that the gradients are equal already: a sum over the
    ranks, which is megatron-core's default, would be tp times too large.
    """

    @staticmethod
    def forward(ctx: Any, x_TBC: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        whole_TBC = x_TBC.new_empty(mesh.tp * x_TBC.shape[0], *x_TBC.shape[1:])
        dist.all_gather_into_tensor(whole_TBC, x_TBC.contiguous(), group=mesh.tp_group)
        return whole_TBC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.mesh.tp)[ctx.mesh.tp_rank].contiguous(), None


def gather_sequence(x_TBC: Tensor, mesh: Mesh) -> Tensor:
    """The hidden states of all T, from the parts that sequence parallelism leaves on the tp ranks."""
    whole_TBC: Tensor = _GatherSequence.apply(x_TBC, mesh)
    return whole_TBC
