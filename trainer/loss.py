"""The training loss. One of megatron-core's doors.

Legend: T time, B batch, V vocabulary on this rank (padding included).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainer.parallel import Mesh

IGNORE = -100  # a label that carries no loss: torch's own convention


def token_loss(logits_TBV: Tensor, labels_TB: Tensor, mesh: Mesh) -> Tensor:
    """Sum of -log p(label) in nats over the labels that are not IGNORE: an fp32 scalar, equal on all tp ranks.

    The softmax is taken in fp32. Logits of padding are -inf. At tp > 1 fp32 logits are overwritten.
    """
    if mesh.tp == 1:
        return F.cross_entropy(
            logits_TBV.float().flatten(0, 1), labels_TB.flatten(), ignore_index=IGNORE, reduction="sum"
        )
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    labels_TB = labels_TB.contiguous()  # it takes views
    loss_TB = vocab_parallel_cross_entropy(logits_TBV, labels_TB)  # IGNORE is no one's token: the loss is log Z there
    return loss_TB.masked_fill(labels_TB == IGNORE, 0.0).sum()
