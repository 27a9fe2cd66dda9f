"""AdamW with decay and no-decay groups, and a gate before the update. Muon is in `muon.py`; `engine.py` chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.optim import OptimConfig
from trainer.model.gpt import is_frozen


class GatedAdamW(torch.optim.AdamW):
    """torch's AdamW that asks `gate()` before it changes a weight or a moment; a closed gate leaves both as they are.

    DeepSpeed's wrappers call `step` after they know the global gradient norm, some once for each parameter group. A
    gate here, instead of an exception, lets a wrapper finish its own bookkeeping: the next step starts clean.
    """

    gate: Callable[[], bool] | None = None
    observe: Callable[[torch.optim.Optimizer], None] | None = None  # called first, with the gradients in place
    grad_scale: Tensor | None = None  # divides gradients while they are read: clipping without a pass of its own

    def step(self, closure: Any = None) -> Any:
        if self.observe is not None:
            self.observe(self)
        if self.gate is None or self.gate():
            self.update()
        return None

    def update(self) -> None:
        super().step()


def param_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Weights and embeddings decay; biases, gains and frozen weights do not."""
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for _, p in named:
        (decay if p.ndim >= 2 and not is_frozen(p) else keep).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def adamw(model: nn.Module, cfg: OptimConfig) -> GatedAdamW:
    """Fused: one pass over a flat group, on CPU as on GPU. The rate is set again for each step (`schedule.py`)."""
    groups = param_groups(model.named_parameters(), cfg.weight_decay)
    return GatedAdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
