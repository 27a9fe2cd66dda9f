"""Forwards that all ranks make together, though each has its own number of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from trainer.model.gpt import GPT


def run_in_lockstep(model: GPT, forwards: Iterator[None]) -> None:
    """Exhaust `forwards`, which yields before each forward of `model`, inside `GPT.for_inference`.

    Under ZeRO-3 a forward gathers weights from all ranks. There all ranks make as many forwards as the one that needs
    most: a rank that has none left, or never had any, computes a single token and ignores it.
    """
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())  # DeepSpeed's mark on parameters of ZeRO-3
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.mesh.device)
    with model.for_inference():
        more = next(forwards, False) is None
        while _any_rank(more, model.mesh.device) if partitioned else more:
            if more:
                more = next(forwards, False) is None
            else:
                model.logits(token_11)


def _any_rank(flag: bool, device: torch.device) -> bool:
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)
