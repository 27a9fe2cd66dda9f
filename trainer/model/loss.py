"""The training loss. One of megatron-core's doors.

Legend: T time, B batch, V vocabulary on this rank (padding included), N = T x B tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_pipeline.config import IGNORE
from trainer.distributed.mesh import Mesh
from trainer.model.arithmetic import LOSS_CHUNK_BYTES


def token_loss(logits_TBV: Tensor, labels_TB: Tensor, mesh: Mesh) -> Tensor:
    """Sum of -log p(label) in nats over the labels that are not IGNORE: an fp32 scalar, equal on all tp ranks.

    The softmax is taken in fp32. Logits of padding are -inf. The logits are gone after backward: at tp = 1 their
    gradient takes their place, at tp > 1 fp32 logits are overwritten.
    """
    if mesh.tp == 1:
        loss: Tensor = _VocabLoss.apply(logits_TBV.flatten(0, 1), labels_TB.flatten())
        return loss
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    labels_TB = labels_TB.contiguous()  # it takes views
    loss_TB = vocab_parallel_cross_entropy(logits_TBV, labels_TB)  # IGNORE is no one's token: the loss is log Z there
    return loss_TB.masked_fill(labels_TB == IGNORE, 0.0).sum()


class _VocabLoss(torch.autograd.Function):
    """Cross entropy that never holds a second copy of the logits: they are the largest tensor of a step.

    Kept for backward: the logits in their own dtype, and for each token in fp32 the largest logit and log Z beside it
    (their sum alone would cost p digits where logits are large). Backward writes the gradient over the logits; fp32
    values live for a chunk of tokens only, or, compiled, in registers.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        most_N = logits_NV.amax(-1).float()
        parts = (x.split(_rows(logits_NV)) for x in (logits_NV, most_N[:, None]))
        log_z_N = torch.cat([(x.float() - most).exp_().sum(-1).log() for x, most in zip(*parts, strict=True)])
        valid_N = labels_N != IGNORE
        label_N1 = labels_N.where(valid_N, 0)[:, None]
        ctx.save_for_backward(logits_NV, label_N1, valid_N, most_N, log_z_N)
        loss_N = log_z_N + (most_N - logits_NV.gather(-1, label_N1).squeeze(-1).float())
        return loss_N.where(valid_N, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_NV, label_N1, valid_N, most_N, log_z_N = ctx.saved_tensors
        scale_N1 = grads[0] * valid_N[:, None]
        id_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device)
        rows = _rows(logits_NV)
        parts = (x.split(rows) for x in (logits_NV, label_N1, scale_N1, most_N[:, None], log_z_N[:, None]))
        for logits, label, scale, most, log_z in zip(*parts, strict=True):
            p = (logits.float() - most - log_z).exp_()
            logits.copy_((p - (id_V == label).float()) * scale)
        return logits_NV, None


def _rows(logits_NV: Tensor) -> int:
    """Tokens of a chunk. All of them where a compiler fuses what is done to a logit."""
    return len(logits_NV) if torch.compiler.is_compiling() else max(1, LOSS_CHUNK_BYTES // (4 * logits_NV.shape[-1]))
