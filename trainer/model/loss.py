"""The training loss: cross entropy over a vocabulary that may be split over the tensor-parallel ranks.

Legend: T time, B batch, V vocabulary on this rank (padding included), N = T x B tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_pipeline.config import IGNORE
from trainer.distributed.mesh import Mesh
from trainer.model.arithmetic import LOSS_CHUNK_BYTES


def token_loss(logits_TBV: Tensor, labels_TB: Tensor, mesh: Mesh, n_true: int | None = None) -> Tensor:
    """Sum of `token_losses` over all tokens: an fp32 scalar."""
    return token_losses(logits_TBV, labels_TB, mesh, n_true).sum()


def token_losses(logits_TBV: Tensor, labels_TB: Tensor, mesh: Mesh, n_true: int | None = None) -> Tensor:
    """-log p(label) in nats of each token, 0 where the label is IGNORE: fp32 [T, B], equal on all tp ranks.

    The softmax is taken in fp32 over the first `n_true` logits of this rank; the others are padding. None: there is no
    padding. The logits are gone after backward: their gradient takes their place.
    """
    V = logits_TBV.shape[-1]
    logits_NV, labels_N, n_true = logits_TBV.flatten(0, 1), labels_TB.flatten(), V if n_true is None else n_true
    losses_N: Tensor
    if mesh.tp == 1 and not torch.compiler.is_compiling():
        losses_N = _WholeLoss.apply(logits_NV, labels_N, n_true)
    else:
        group = mesh.tp_group if mesh.tp > 1 else None
        losses_N = _VocabLoss.apply(logits_NV, labels_N, n_true, mesh.tp_rank * V, group)
    return losses_N.view(labels_TB.shape)


class _WholeLoss(torch.autograd.Function):
    """Cross entropy where one rank holds the whole vocabulary, by torch's fused kernels, a chunk of tokens at a time.

    Kept for backward: the logits alone, over which it writes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, n_true: int) -> Tensor:
        ctx.n_true = n_true
        ctx.save_for_backward(logits_NV, labels_N)
        rows = _rows(logits_NV)
        parts = zip(logits_NV[:, :n_true].split(rows), labels_N.split(rows), strict=True)
        losses = [F.cross_entropy(x.float(), y, reduction="none", ignore_index=IGNORE) for x, y in parts]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N = ctx.saved_tensors
        scale_N1 = (grads[0] * (labels_N != IGNORE))[:, None]
        label_N1 = labels_N.clamp(min=0)[:, None]
        rows = _rows(logits_NV)
        for logits, label, scale in zip(*(x.split(rows) for x in (logits_NV, label_N1, scale_N1)), strict=True):
            p = logits[:, : ctx.n_true].softmax(-1, dtype=torch.float32).mul_(scale)
            logits[:, : ctx.n_true] = p.scatter_add_(-1, label, -scale)
            logits[:, ctx.n_true :] = 0.0
        return logits_NV, None, None


class _VocabLoss(torch.autograd.Function):
    """Cross entropy over a part of the vocabulary, or compiled, that never holds a second copy of the logits.

    Kept for backward: the logits in their own dtype, and for each token in fp32 the largest logit and, apart from it,
    the softmax's denominator Z (the logarithm of both in one number would cost digits of p where logits are large).
    Backward writes the gradient over the logits; fp32 values live for a chunk of tokens only, or, compiled, in
    registers.

    With `group` (tp > 1) the largest logit, Z and the label's logit are reduced over it, and the result has the bits of
    megatron-core's `vocab_parallel_cross_entropy`, which holds an fp32 copy of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, n_true: int, first: int, group: Any) -> Tensor:
        chunks = logits_NV.split(_rows(logits_NV))
        max_N = torch.cat([_fp32(x, n_true).amax(-1) for x in chunks])
        if group is not None:
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group)
        maxima = max_N[:, None].split(_rows(logits_NV))
        z_N = torch.cat([_fp32(x, n_true).sub_(m).exp_().sum(-1) for x, m in zip(chunks, maxima, strict=True)])
        valid_N = labels_N != IGNORE
        local_N = labels_N - first
        own_N = valid_N & (local_N >= 0) & (local_N < logits_NV.shape[-1])
        label_N1 = local_N.where(own_N, -1)[:, None]
        label_logit_N = logits_NV.gather(-1, label_N1.clamp(min=0)).squeeze(-1).float()
        below_max_N = (max_N - label_logit_N).where(own_N, 0.0)
        if group is not None:
            both_2N = torch.stack([z_N, below_max_N])
            dist.all_reduce(both_2N, group=group)
            z_N, below_max_N = both_2N.unbind()
        log_z_N = z_N.log()
        ctx.n_true = n_true
        ctx.divides = group is not None
        ctx.save_for_backward(logits_NV, label_N1, valid_N, max_N, z_N if ctx.divides else log_z_N)
        return (log_z_N + below_max_N).where(valid_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_NV, label_N1, valid_N, max_N, z_N = ctx.saved_tensors
        scale_N1 = (grads[0] * valid_N)[:, None]
        id_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
        rows = _rows(logits_NV)
        parts = (x.split(rows) for x in (logits_NV, label_N1, scale_N1, max_N[:, None], z_N[:, None]))
        for logits, label, scale, largest, z in zip(*parts, strict=True):
            p = _fp32(logits, ctx.n_true).sub_(largest)
            p = p.exp_().div_(z) if ctx.divides else p.sub_(z).exp_()
            logits.copy_(p.sub_((id_V == label).float()).mul_(scale))
        return logits_NV, None, None, None, None


def _fp32(logits_NV: Tensor, n_true: int) -> Tensor:
    """A copy in fp32, -inf in the padding."""
    V = logits_NV.shape[-1]
    x_NV = logits_NV.to(torch.float32, copy=True)
    if n_true == V:
        return x_NV
    return x_NV.masked_fill_(torch.arange(V, device=x_NV.device) >= n_true, -torch.inf)


def _rows(logits_NV: Tensor) -> int:
    """Tokens of a chunk. All of them if a compiler fuses the operations on a logit."""
    return len(logits_NV) if torch.compiler.is_compiling() else max(1, LOSS_CHUNK_BYTES // (4 * logits_NV.shape[-1]))
